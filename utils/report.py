"""Renders the README's results from snapshots of finished runs.

    python -m utils.report

Takes the snapshot of the current default run into `data/results/<profile>/`, then
writes what every snapshot says between two markers in the README. Doing it twice
changes nothing the second time.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from utils import results
from utils.config import (
    DATA,
    MODELS,
    REPORT_QUESTIONS,
    ROOT,
    Settings,
    display_path,
    load_settings,
)

SNAPSHOTS = DATA / "results"
README = ROOT / "README.md"
BEGIN = "<!-- results:begin (make report writes this part) -->"
END = "<!-- results:end -->"
NAMES = {
    "pocket": "Pocket profile (a 5 M-parameter Llama; not Llama 3.2 1B)",
    "llama_1b": "Llama 3.2 1B Instruct",
}


def take_snapshot(settings: Settings) -> Path:
    """Copy scores, `run.json` and the answers to the report's questions.

    References of data sets that are not ours stay out.

    Raises:
        ValueError: the run's data or base are not the profile's own.
        FileNotFoundError: the run is not finished.
    """
    if not settings.is_default:
        raise ValueError(
            f"{display_path(settings.run_dir)} ran on data or a base that are not the "
            f"profile's own, so it is no report of profile {settings.profile}. Unset "
            f"{', '.join(settings.overrides)} and run again."
        )
    needed = [settings.run_dir / name for name in ("scores.json", "run.json")]
    for path in needed:
        if not path.is_file():
            raise FileNotFoundError(
                f"{display_path(path)} is not there yet; `make run` makes it."
            )
    folder = SNAPSHOTS / settings.profile
    for path in needed:
        results.write_json(folder / path.name, results.read_json(path))
    kept = []
    for row in results.read_lines(settings.run_dir / "answers.jsonl"):
        if row["question"] in REPORT_QUESTIONS and row["model"] in MODELS:
            if settings.profile != "pocket":
                row["reference"] = ""
            row.pop("seconds", None)  # a timing of one machine on one day
            kept.append(row)
    results.write_lines(folder / "answers.jsonl", kept)
    return folder


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
                "fills this in; the 1 B needs a GPU."
            )
    return "\n\n".join(parts)


def _render_snapshot(folder: Path) -> list[str]:
    run = results.read_json(folder / "run.json")
    scores = results.read_json(folder / "scores.json")
    rows = results.read_lines(folder / "answers.jsonl")
    versions = ", ".join(
        f"{name} {run['versions'][name]}"
        for name in ("torch", "transformers", "trl", "peft")
    )
    steps = f", cut short at {run['max_steps']} steps" if run.get("max_steps") else ""
    parts = [
        f"Base `{run['base_model']}`, data `{run['first_aid_dataset']}` (fingerprint "
        f"`{run['data']['first_aid_fingerprint']}`) and `{run['finetome_dataset']}` "
        f"(`{run['data']['finetome_fingerprint']}`), seed {run['seed']}{steps}, "
        f"{run['hardware']}, {versions}; run on {run['comparison']['when'][:10]}.",
        _training_table(run),
        _score_table(scores["first_aid"], run["comparison"]["perplexity"]),
    ]
    gain = run["comparison"]["gain_over_base"]
    search = run["comparison"]["gain_over_nearest"]
    parts.append(
        f"First-aid tuning moves ROUGE-L by {_interval(gain)} against the base, and by "
        f"{_interval(search)} against the answer of the nearest training question."
    )
    parts.append("#### The three questions of the report")
    parts += _answers(rows)
    return parts


def _interval(pair: Mapping) -> str:
    return (
        f"**{pair['difference']:+.3f}** (95 % interval {pair['low']:+.3f} to "
        f"{pair['high']:+.3f}, n = {pair['n']})"
    )


def _training_table(run: Mapping) -> str:
    lines = [
        "| adapter | train rows | steps | validation perplexity, step 0 → end | "
        "training time | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("first_aid", "finetome"):
        info = run[f"training_{name}"]
        before, after = (info["eval_perplexity"][k] for k in ("before", "after"))
        lines.append(
            f"| {MODELS[name].label} | {info['rows']['train']:,} | {info['steps']} | "
            f"{before:,.1f} → {after:,.1f} | {info['training_seconds']:.0f} s | "
            f"{info['peak_memory_gb']:.2f} GB |"
        )
    return "\n".join(lines)


def _score_table(scores: Mapping, perplexity: Mapping) -> str:
    labels = {key: look.label for key, look in MODELS.items()} | {
        "nearest": "nearest training answer (no model)",
        "echo": "the question itself (no model)",
        "random": "a random training answer (no model)",
    }
    n = scores["base"]["original"]["n"]
    lines = [
        f"| {n} held-out first-aid questions | ROUGE-1 | ROUGE-2 | ROUGE-L (95 %) | "
        "words | advises help | perplexity |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, label in labels.items():
        cell = scores[key]["original"]
        value = f"{perplexity[key]['first aid']:,.1f}" if key in perplexity else "–"
        lines.append(
            f"| {label} | {cell['rouge1_f1']:.3f} | {cell['rouge2_f1']:.3f} | "
            f"{cell['rougeL_f1']:.3f} ({cell['rougeL_f1_low']:.3f} to "
            f"{cell['rougeL_f1_high']:.3f}) | {cell['answer_words']:.0f} | "
            f"{cell['advises_help']:.0%} | {value} |"
        )
    return "\n".join(lines)


def _answers(rows: list[dict]) -> list[str]:
    parts = []
    for number, question in enumerate(REPORT_QUESTIONS, start=1):
        asked = [row for row in rows if row["question"] == question]
        if not asked:
            continue
        parts.append(f"**{number}. {question}**")
        lines = ["| | answer |", "|---|---|"]
        originals = {r["model"]: r for r in asked if r["phrasing"] == "original"}
        for key, look in MODELS.items():
            lines.append(f"| {look.label} | {_cell(originals[key]['answer'])} |")
        if originals["base"]["reference"]:
            lines.append(f"| *reference* | {_cell(originals['base']['reference'])} |")
        for row in asked:
            if row["model"] == "first_aid" and row["phrasing"] != "original":
                label = (
                    f"{MODELS['first_aid'].label}, *asked as* “{_cell(row['asked'])}”"
                )
                lines.append(f"| {label} | {_cell(row['answer'])} |")
        parts.append("\n".join(lines))
    return parts


def _cell(text: str) -> str:
    """`text` inside a Markdown table: one line, nothing interpreted."""
    text = re.sub(r"\s+", " ", text or "(empty)").strip()
    return re.sub(r"([\\|<>*_`\[\]])", r"\\\1", text)


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


def main() -> None:
    """Take the snapshot and render the README."""
    try:
        settings = load_settings()
        if (settings.run_dir / "scores.json").is_file():
            print(f"snapshot: {display_path(take_snapshot(settings))}")
        else:
            print(
                f"no finished run in {display_path(settings.run_dir)}; rendering only"
            )
        changed = write_readme(render_results())
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"make report: {error}")
    print("README.md " + ("rendered anew" if changed else "was up to date already"))


if __name__ == "__main__":
    main()
