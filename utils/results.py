"""Reads and writes what a run leaves behind: logs, answers, scores, `run.json`.

Everything the figures and the README say goes through these files, and every one of
them says which profile, base, data, seed, versions and hardware made it.
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from utils.config import DATA, POCKET, PROFILES, Settings, display_path

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "evaluate",
    "rouge_score",
    "bitsandbytes",
    "gradio",
)
PUBLISHED = DATA / "published" / "t4_runs.json"
ADAPTER_LOG = "training.jsonl"  # the log of its run, beside an adapter
FIRST_AID_QA_AUDIT = DATA / "published" / "first_aid_qa_audit.json"


def training_log(settings: Settings, name: str) -> Path:
    """Where the steps and evaluations of a run are logged, line by line."""
    return settings.run_dir / f"training_{name}.jsonl"


def append_line(path: Path, row: Mapping) -> None:
    """Append `row` to a JSON-lines file and flush it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_lines(path: Path, rows: Sequence[Mapping]) -> None:
    """Write `rows` as JSON lines, aside first, then renamed: never half a file."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    _write(path, text)


def read_lines(path: Path) -> list[dict]:
    """Read a JSON-lines file.

    Raises:
        FileNotFoundError: it is not there; the message says which notebook makes it.
        ValueError: a line is broken; the message names it.
    """
    if not path.is_file():
        makers = {
            "training_first_aid.jsonl": "02",
            "training_finetome.jsonl": "03",
            "answers.jsonl": "05",
        }
        maker = makers.get(path.name, "01")
        raise FileNotFoundError(
            f"{display_path(path)} is not there yet; run notebook {maker} first."
        )
    rows = []
    text = path.read_text("utf-8").removesuffix("\n")
    # Not `splitlines`, which would also cut at characters that an answer may hold.
    for number, line in enumerate(text.split("\n") if text else [], start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{display_path(path)}, line {number}: {error.msg}. The file was cut "
                "short; delete that line or run the notebook again."
            ) from error
    return rows


def write_json(path: Path, content: object) -> None:
    """Write `content` as JSON, aside first, then renamed."""
    _write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def read_json(path: Path) -> dict:
    """Read a JSON file."""
    return json.loads(path.read_text("utf-8"))


def update_run(settings: Settings, section: str, content: Mapping) -> dict:
    """Set one section of the run's `run.json`, which says what made the results."""
    path = settings.run_dir / "run.json"
    run = read_json(path) if path.is_file() else {}
    run.update(describe_run(settings))
    run[section] = {**content, "when": now()}
    write_json(path, run)
    return run


def describe_run(settings: Settings) -> dict:
    """Profile, base, data, seed, versions and hardware, as JSON can hold them."""
    return {
        "profile": settings.profile,
        "base_model": _shown(settings.base_model),
        "first_aid_dataset": _shown(settings.first_aid_dataset),
        "finetome_dataset": _shown(settings.finetome_dataset),
        "max_steps": settings.max_steps,
        "seed": settings.seed,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
        "hardware": hardware(),
    }


def _shown(source: str) -> str:
    """A source without the folders of anybody's machine."""
    path = Path(source).expanduser()
    return path.name if path.is_absolute() or ".." in path.parts else source


def hardware() -> str:
    """The GPU with its memory, or the number of CPU cores with their name."""
    import torch

    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        return f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB"
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    count = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # Linux: what this process may use
        count = len(os.sched_getaffinity(0))
    return f"{count} CPU core{'s' if count != 1 else ''} ({name})"


def show_run(settings: Settings, precision) -> None:
    """Print seed, versions, hardware, precision and why: a notebook's first output."""
    run = describe_run(settings)
    versions = [f"{name} {number}" for name, number in run["versions"].items()]
    print(f"{'seed':16} {settings.seed}")
    print(f"{'hardware':16} {run['hardware']}")
    print(f"{'precision':16} {str(precision.dtype)[6:]}: {precision.reason}")
    for start in range(0, len(versions), 5):
        label = "" if start else "versions"
        print(f"{label:16} {', '.join(versions[start : start + 5])}")
    settings.show()


def stamp(run: Mapping) -> str:
    """The small line under every figure: what made it."""
    steps = f" · only {run['max_steps']} steps" if run.get("max_steps") else ""
    base = (
        "pocket Llama, not Llama 3.2 1B"
        if "pocket" in run["base_model"]
        else run["base_model"]
    )
    return (
        f"profile {run['profile']} · base: {base} · seed {run['seed']}{steps} · "
        f"{run['hardware']} · {now()[:10]}"
    )


def now() -> str:
    """The time in UTC, to the second, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def split_log(rows: Sequence[Mapping]) -> tuple[list[dict], list[dict]]:
    """A training log's optimizer steps and its evaluations."""
    steps = [dict(row) for row in rows if "loss" in row]
    evaluations = [dict(row) for row in rows if "eval_nll" in row]
    return steps, evaluations


SEEDS = "seeds.json"


def seeds_file(profile: str) -> Path:
    """Where `utils.seeds` records what several seeds found on a profile."""
    return DATA / "results" / profile / SEEDS


SAME_RUN = ("base_fingerprint", "data_fingerprint", "hyperparameters", "steps")


def seed_rows(profile: str, info: Mapping) -> list[dict]:
    """What other seeds found for an adapter with this very base, data and knobs.

    Args:
        profile: of the run.
        info: of the adapter, as `adapter_info.json` holds it.

    Returns:
        One row a seed, for a table; none where `make seeds` has not recorded them, or
        has with something else, which is then said.
    """
    path = seeds_file(profile)
    record = read_json(path) if path.is_file() else {"adapters": {}}
    theirs = record["adapters"].get(info["adapter"])
    if theirs != {key: info[key] for key in SAME_RUN}:
        print("note: seeds are not measured with this base, these data and knobs")
        return []
    rows = []
    for seed in record["seeds"]:
        perplexity = seed["validation_perplexity"][info["adapter"]]
        row = {"seed": seed["seed"], "perplexity of the base": perplexity["before"]}
        row["perplexity, tuned"] = perplexity["after"]
        if info["adapter"] == "first_aid":
            row["test ROUGE-L of the base"] = seed["rougeL_f1"]["base"]
            row["test ROUGE-L, tuned"] = seed["rougeL_f1"]["first_aid"]
        rows.append(row)
    return rows


def find_training_log(settings: Settings, name: str) -> tuple[Path, str]:
    """The run's own log of `name`, or one that came with its adapter, and which it is.

    If there is neither, `read_lines` of the path says which notebook makes it.
    """
    own = training_log(settings, name)
    if own.is_file():
        return own, f"this run's, {display_path(own)}"
    fetched = settings.run_dir / "adapters" / name / ADAPTER_LOG
    if fetched.is_file():
        return fetched, f"fetched with the adapter, {display_path(fetched)}"
    shipped = POCKET / "adapters" / name / ADAPTER_LOG
    if settings.base_model == PROFILES["pocket"].base_model and shipped.is_file():
        return shipped, f"shipped with the adapter, {display_path(shipped)}"
    return own, "missing"
