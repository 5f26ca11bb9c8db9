"""The snapshot of a finished run that the README shows, and the zip it travels in.

A snapshot is `snapshot.json` (format, profile), `run.json`, `scores.json` and
`answers.jsonl` with the answers to the report's questions: never a row of a data set
that is not ours.
"""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

from utils import comparison, metrics, results
from utils.arms import GENERATED
from utils.config import (
    MODELS,
    PROFILES,
    REPORT_QUESTIONS,
    Settings,
    display_path,
)

FORMAT = 2  # 1 had no snapshot.json, and fewer measures
MANIFEST = "snapshot.json"
FILES = (MANIFEST, "run.json", "scores.json", "answers.jsonl")
ZIP_LIMIT = 5_000_000  # bytes unpacked; a snapshot has some 100 kB
KEPT = (  # of an answer; its timing on one machine on one day is not
    *("dataset", "id", "question", "asked", "phrasing", "model", "reference"),
    *("answer", "tokens", "hit_cap", "rougeL_f1", "answer_words"),
    *("advises_help", "must_n", "met", "missed", "violated"),
)


def take(settings: Settings, folder: Path) -> Path:
    """Copy what a finished run says into `folder`; returns it.

    References of data sets that are not ours stay out; what was measured against them
    is kept.

    Raises:
        ValueError: the run's data or base are not the profile's own, it was a quick
            look, or its files do not belong together.
        FileNotFoundError: the run is not finished.
    """
    if not settings.is_default:
        raise ValueError(
            f"{display_path(settings.run_dir)} ran on data or a base that are not the "
            f"profile's own, so it is no report of profile {settings.profile}. Unset "
            f"{', '.join(settings.overrides)} and run again."
        )
    if settings.quick:
        raise ValueError("a quick look is no report; unset QUICK and run again")
    run, scores = (_finished(settings, name) for name in ("run.json", "scores.json"))
    check_run(run, settings.profile, display_path(settings.run_dir / "run.json"))
    rows = [
        row
        for row in results.read_lines(settings.run_dir / "answers.jsonl")
        if row["question"] in REPORT_QUESTIONS and row["model"] in GENERATED
    ]
    manifest = {"format": FORMAT, "profile": settings.profile}
    results.write_json(folder / MANIFEST, manifest)
    results.write_json(folder / "run.json", run)
    results.write_json(folder / "scores.json", scores)
    results.write_lines(
        folder / "answers.jsonl", _report_rows(rows, settings.profile == "pocket")
    )
    return folder


def _finished(settings: Settings, name: str) -> dict:
    path = settings.run_dir / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{display_path(path)} is not there yet; `make run` makes it."
        )
    return results.read_json(path)


def _report_rows(rows: list[dict], with_references: bool) -> list[dict]:
    """The answers with what was measured on each, less rows that are not ours."""
    if not rows:
        return []
    cards = comparison.cards_of([])
    scored, _ = metrics.score_answers(rows, cards)
    kept = []
    for row in scored:
        card = cards.get(row["question"], {})
        row |= comparison.verdict(row["answer"], card)
        if not with_references:
            row["reference"] = ""
        kept.append({name: row[name] for name in KEPT if name in row})
    return kept


def check_run(run: Mapping, profile: str, where: str) -> None:
    """Refuse a `run.json` that is not of `profile`'s own base and data.

    Raises:
        ValueError: it is of another profile, base or data set, it lacks a part, or its
            adapters were trained on another split than they were tested on.
    """
    own = PROFILES.get(profile)
    if own is None:
        raise ValueError(f"{where}: {profile!r} is no profile")
    wanted = {
        "profile": profile,
        "base_model": own.base_model,
        "first_aid_dataset": own.first_aid,
        "finetome_dataset": own.finetome,
    }
    for name, value in wanted.items():
        if run.get(name) != value:
            raise ValueError(
                f"{where}: {name} is {run.get(name)!r}, and profile {profile} has "
                f"{value!r}; results of other data or bases are no report of it"
            )
    parts = ("data", "comparison", *(f"training_{name}" for name in _tuned()))
    if missing := [part for part in parts if part not in run]:
        raise ValueError(
            f"{where} lacks {', '.join(missing)}; run notebooks 01 to 05 to the end"
        )
    for name in _tuned():
        tested = run["data"].get(f"{name}_fingerprint")
        trained = run[f"training_{name}"].get("data_fingerprint")
        compared = run["comparison"].get(f"{name}_fingerprint", tested)
        if not tested == trained == compared:
            raise ValueError(
                f"{where}: the {MODELS[name].label} adapter was trained on the split "
                f"{trained}, the data were split as {tested} and compared as "
                f"{compared}; run notebooks 01 to 05 again on one data set"
            )


def _tuned() -> tuple[str, ...]:
    return tuple(key for key in MODELS if key != "base")


def check(folder: Path) -> int:
    """The format of the snapshot in `folder`, if this version can read it.

    Raises:
        ValueError: it was made by another version, or is of another profile or data.
    """
    path = folder / MANIFEST
    manifest = results.read_json(path) if path.is_file() else {"format": 1}
    where = display_path(path)
    if manifest.get("format") not in (1, FORMAT):
        raise ValueError(_other_format(where, manifest.get("format")))
    if manifest.get("profile", folder.name) != folder.name:
        raise ValueError(
            f"{where} is of profile {manifest['profile']!r} and lies in the folder of "
            f"{folder.name!r}; move it"
        )
    run = results.read_json(folder / "run.json")
    check_run(run, folder.name, display_path(folder / "run.json"))
    return manifest["format"]


def _other_format(where: str, found: object) -> str:
    return (
        f"{where} has format {found!r}, and this version reads {FORMAT}. Run notebook "
        "05 again with this version, or fetch the version that made it."
    )


def pack(folder: Path, path: Path) -> Path:
    """Zip the snapshot in `folder`; the same snapshot gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in FILES:
            entry = zipfile.ZipInfo(name)  # dated 1980, so that nothing hangs on today
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, (folder / name).read_bytes())
    return path


def unpack(path: Path, snapshots: Path) -> Path:
    """Check the zip at `path` and unpack it into `snapshots/<profile>`; returns that.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no zip of a snapshot, of another version, or of another
            profile's data; or it holds rows of a data set that is not ours.
    """
    where = path.name
    try:
        with zipfile.ZipFile(path) as archive:
            if sorted(archive.namelist()) != sorted(FILES):
                names = ", ".join(archive.namelist()) or "nothing"
                raise ValueError(
                    f"{where} holds {names[:200]}, and a "
                    f"snapshot is {', '.join(FILES)}; take the zip of notebook 05"
                )
            if sum(entry.file_size for entry in archive.infolist()) > ZIP_LIMIT:
                raise ValueError(f"{where} unpacks to more than {ZIP_LIMIT:,} bytes")
            texts = {name: archive.read(name).decode("utf-8") for name in FILES}
    except zipfile.BadZipFile as error:
        raise ValueError(f"{where} is no zip, or was cut short: {error}") from error
    manifest, run, scores = (_json(texts[name], where, name) for name in FILES[:3])
    if manifest.get("format") != FORMAT:
        raise ValueError(_other_format(where, manifest.get("format")))
    profile = str(manifest.get("profile"))
    check_run(run, profile, f"{where}, run.json")
    lines = texts["answers.jsonl"].removesuffix("\n").split("\n")
    rows = [_json(line, where, "answers.jsonl") for line in lines if line]
    _check_answers(rows, profile, where)
    folder = snapshots / profile
    results.write_json(folder / MANIFEST, manifest)
    results.write_json(folder / "run.json", run)
    results.write_json(folder / "scores.json", scores)
    results.write_lines(folder / "answers.jsonl", rows)
    return folder


def _json(text: str, where: str, name: str) -> dict:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}, {name}: {error}; the file is broken") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where}, {name}: holds {text[:40]!r}, not an object")
    return found


def _check_answers(rows: list[dict], profile: str, where: str) -> None:
    for row in rows:
        known = row.get("question") in REPORT_QUESTIONS
        if not known or row.get("model") not in GENERATED:
            raise ValueError(
                f"{where}, answers.jsonl: {str(row.get('question'))[:60]!r} by "
                f"{row.get('model')!r} is not of the report; it may not be ours to show"
            )
        if profile != "pocket" and row.get("reference"):
            raise ValueError(
                f"{where}, answers.jsonl: holds a reference of {profile}'s data set, "
                "which is not ours to show; take the zip of notebook 05"
            )
