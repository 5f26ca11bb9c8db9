"""Whether a result hangs on the seed: the fine-tuning done again with other seeds.

    python -m utils.seeds

Takes the finished default run, walks notebooks 02, 03 and 05 again for each further
seed in a run folder of its own, and writes what they found, seed by seed, to
`data/results/<profile>/seeds.json`. A seed decides the adapter's first weights and the
order of the rows; the split and the base stay what they are.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils import results
from utils.config import ROOT, RUNS, Settings, display_path, load_settings
from utils.models import ADAPTERS

NOTEBOOKS = ("02", "03", "05")
MORE_SEEDS = (43, 44)
ARMS = ("base", "first_aid", "finetome", "nearest", "echo", "random")


def collect(run_dir: Path) -> dict:
    """What one finished run found, as one row of the record.

    Raises:
        FileNotFoundError: the run is not finished.
    """
    for name in ("run.json", "scores.json"):
        if not (run_dir / name).is_file():
            raise FileNotFoundError(
                f"{display_path(run_dir / name)} is not there yet; `make run` makes it."
            )
    run = results.read_json(run_dir / "run.json")
    scores = results.read_json(run_dir / "scores.json")["first_aid"]
    found = run["comparison"]
    return {
        "seed": run["seed"],
        "hardware": run["hardware"],
        "when": found["when"],
        "validation_perplexity": {
            name: run[f"training_{name}"]["eval_perplexity"] for name in ADAPTERS
        },
        "test_perplexity": found["perplexity"],
        "rougeL_f1": {arm: scores[arm]["original"]["rougeL_f1"] for arm in ARMS},
        "ended": {
            name: scores[name]["original"]["ended"] for name in ("base", "first_aid")
        },
        "gain_over_base": found["gain_over_base"],
        "gain_over_random": found["gain_over_random"],
        "n": scores["base"]["original"]["n"],
    }


def adapters_of(run: Mapping) -> dict[str, dict]:
    """What the adapters of runs must share to be rows of one record."""
    return {
        name: {key: run[f"training_{name}"][key] for key in results.SAME_RUN}
        for name in ADAPTERS
    }


def walk_with(seed: int, settings: Settings) -> Path:
    """Walk the notebooks that depend on the seed; returns the run's folder.

    Raises:
        subprocess.CalledProcessError: a notebook failed; its message stands above.
    """
    run_dir = RUNS / f"{settings.run_dir.name}-seed-{seed}"
    environment = {
        **os.environ,
        "PROFILE": settings.profile,
        "SEED": str(seed),
        "RUN_DIR": str(run_dir),
    }
    command = [sys.executable, "-m", "utils.walk", "--only", *NOTEBOOKS]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return run_dir


def record(settings: Settings, more: Sequence[int] = MORE_SEEDS) -> dict:
    """Walk what is missing, collect all, and write the profile's record.

    Raises:
        FileNotFoundError: the default run is not finished.
        ValueError: a run used other data, another base or other knobs.
    """
    rows = [collect(settings.run_dir)]
    shared = adapters_of(results.read_json(settings.run_dir / "run.json"))
    for seed in more:
        run_dir = walk_with(seed, settings)
        if adapters_of(results.read_json(run_dir / "run.json")) != shared:
            raise ValueError(
                f"{display_path(run_dir)} differs from {display_path(settings.run_dir)}"
                " in data, base or knobs; delete the older one and run again."
            )
        rows.append(collect(run_dir))
    written = {"profile": settings.profile, "adapters": shared, "seeds": rows}
    results.write_json(results.seeds_file(settings.profile), written)
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    """Record the seeds from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.seeds",
        description="Do the fine-tuning of the default run again with other seeds.",
    )
    parser.add_argument(
        "--more", type=int, nargs="+", default=MORE_SEEDS, help="further seeds (43 44)"
    )
    options = parser.parse_args(arguments)
    settings = load_settings()
    try:
        written = record(settings, options.more)
    except (OSError, ValueError) as error:
        sys.exit(f"make seeds: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"make seeds: a notebook failed (exit code {error.returncode}).")
    for row in written["seeds"]:
        gain = row["gain_over_base"]
        print(
            f"seed {row['seed']}: ROUGE-L {row['rougeL_f1']['base']:.3f} → "
            f"{row['rougeL_f1']['first_aid']:.3f} ({gain['low']:+.3f} to "
            f"{gain['high']:+.3f})"
        )
    print(f"written to {display_path(results.seeds_file(settings.profile))}")


if __name__ == "__main__":
    main()
