"""Renders the README's results from snapshots of finished runs.

    python -m utils.report
    python -m utils.report --zip results-llama_1b.zip

Takes the snapshot of the current default run, or of a zip that notebook 05 made
elsewhere, into `data/results/<profile>/`, then writes what every snapshot says between
two markers in the README. Doing it twice changes nothing the second time.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from utils import report_parts, results, snapshot
from utils.config import DATA, ROOT, Settings, display_path, load_settings

SNAPSHOTS = DATA / "results"
README = ROOT / "README.md"
BEGIN = "<!-- results:begin (make report writes this part) -->"
END = "<!-- results:end -->"
NAMES = {
    "pocket": "Pocket profile (a 4 M-parameter Llama; not Llama 3.2 1B)",
    "llama_1b": "Llama 3.2 1B Instruct",
}


def take_snapshot(settings: Settings) -> Path:
    """Copy what the finished run says into its folder; see `utils.snapshot.take`.

    Raises:
        ValueError: the run's data or base are not the profile's own.
        FileNotFoundError: the run is not finished.
    """
    return snapshot.take(settings, SNAPSHOTS / settings.profile)


def render_results() -> str:
    """What the snapshots say, as Markdown; profiles without one are "not measured"."""
    parts = []
    for profile, name in NAMES.items():
        parts.append(f"### {name}")
        folder = SNAPSHOTS / profile
        if (folder / "run.json").is_file():
            parts += _render_snapshot(folder)
        else:
            parts.append(
                "Not measured: nobody has run this profile for this report yet. "
                f"`PROFILE={profile} make run && PROFILE={profile} make report` "
                "fills this in; the 1 B needs a GPU. Or run the notebooks on Colab: "
                f"the last cell of 05 makes `results-{profile}.zip`, and unpacking it "
                f"into `data/results/{profile}/` and typing `make report` does it."
            )
    return "\n\n".join(parts)


def _render_snapshot(folder: Path) -> list[str]:
    version = snapshot.check(folder)
    run = results.read_json(folder / "run.json")
    scores = results.read_json(folder / "scores.json")["first_aid"]
    rows = results.read_lines(folder / "answers.jsonl")
    comparison = run["comparison"]
    parts = [
        report_parts.made_by(run),
        report_parts.training_table(run),
        report_parts.rouge_table(scores),
        report_parts.findings(comparison),
        report_parts.seeds(_seeds(folder), run),
        report_parts.safety_table(scores, comparison.get("agreement", {})),
        report_parts.perplexity_table(comparison),
        "#### The three questions of the report",
        *report_parts.questions(rows),
    ]
    if version != snapshot.FORMAT:
        parts.insert(
            1,
            f"*This snapshot has format {version}; what was added since is shown as "
            f"{report_parts.UNKNOWN}. `make run && make report` brings it up to date.*",
        )
    return parts


def _seeds(folder: Path) -> dict:
    path = folder / results.SEEDS
    return results.read_json(path) if path.is_file() else {}


def write_readme(text: str) -> bool:
    """Put `text` between the README's markers; returns whether that changed it.

    Raises:
        ValueError: a marker is missing.
    """
    old = README.read_text("utf-8")
    if BEGIN not in old or END not in old:
        raise ValueError(f"README.md has lost a marker: {BEGIN} … {END}")
    head, rest = old.split(BEGIN, 1)
    new = f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.split(END, 1)[1]}"
    README.write_text(new, encoding="utf-8")
    return new != old


def main(arguments: Sequence[str] | None = None) -> None:
    """Take the snapshot, of the run or out of a zip, and render the README."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.report",
        description="Take the run's snapshot and render the README's results.",
    )
    parser.add_argument(
        "--zip", type=Path, help="results-<profile>.zip from the last cell of 05"
    )
    options = parser.parse_args(arguments)
    try:
        if options.zip:
            folder = snapshot.unpack(options.zip, SNAPSHOTS)
            print(f"snapshot: {display_path(folder)}, out of {options.zip.name}")
        else:
            _snapshot_of_the_run()
        changed = write_readme(render_results())
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"make report: {error}")
    print("README.md " + ("rendered anew" if changed else "was up to date already"))


def _snapshot_of_the_run() -> None:
    settings = load_settings()
    if (settings.run_dir / "scores.json").is_file():
        print(f"snapshot: {display_path(take_snapshot(settings))}")
    else:
        print(f"no finished run in {display_path(settings.run_dir)}; rendering only")


if __name__ == "__main__":
    main()
