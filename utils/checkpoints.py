"""Checkpoints that are complete or absent, and never those of another run.

A checkpoint is written into a staging folder, synced to the disk, marked as complete
and renamed. Whatever moment a run is killed at, what bears the mark can be resumed.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from utils.config import display_path

MARKER = "complete.json"
STAGING = ".writing"
KEPT_LAST = 2


def staging_folder(folder: Path) -> Path:
    """Where a checkpoint of `folder` is written before it counts."""
    return folder / STAGING


def publish(folder: Path, step: int, marker: Mapping) -> Path:
    """Make the staged checkpoint of `step` complete: sync, mark, rename.

    Args:
        folder: of the run's checkpoints.
        step: the optimizer step it was taken at.
        marker: what identifies the run, and the scores at this step.

    Raises:
        OSError: the disk is full or read-only; older checkpoints are untouched.
    """
    staged = staging_folder(folder) / f"checkpoint-{step}"
    final = folder / staged.name
    # The marker is the last file, so that it stands only beside complete ones.
    for file in [f for f in staged.rglob("*") if f.is_file()]:
        _sync(file)
    mark = staged / MARKER
    mark.write_text(json.dumps({"step": step, **marker}, indent=1), encoding="utf-8")
    _sync(mark)
    _sync(staged)
    if final.exists():  # unmarked, or it would have been resumed
        shutil.rmtree(final)
    staged.rename(final)
    _sync(folder)
    shutil.rmtree(staging_folder(folder), ignore_errors=True)
    return final


def _sync(path: Path) -> None:
    """Have the disk hold `path`, file or folder, before anything that follows."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def complete(folder: Path) -> dict[int, Path]:
    """The complete checkpoints in `folder` by step, in order."""
    found = {
        int(path.name.split("-")[1]): path
        for path in folder.glob("checkpoint-*")
        if (path / MARKER).is_file()
    }
    return dict(sorted(found.items()))


def latest(folder: Path, identity: Mapping) -> tuple[int, Path] | None:
    """The last complete checkpoint of this very run, or None; others are named.

    Raises:
        ValueError: the folder holds checkpoints of another run. Nothing is changed.
    """
    checkpoints = complete(folder)
    for path in sorted({*folder.glob("checkpoint-*")} - {*checkpoints.values()}):
        print(f"{display_path(path)} is not complete and left aside.")
    if not checkpoints:
        return None
    step, path = list(checkpoints.items())[-1]
    theirs = read_marker(path)["identity"]
    ours = json.loads(json.dumps(identity))  # tuples become lists, as in the file
    differing = [
        f"{key} was {theirs.get(key)!r} and is {ours.get(key)!r}"
        for key in sorted({*ours, *theirs})
        if ours.get(key) != theirs.get(key)
    ]
    if differing:
        raise ValueError(
            f"{display_path(path)} is a checkpoint of another run: "
            f"{'; '.join(differing)}. Nothing was changed. To start over, delete the "
            f"folder {display_path(folder)}; to keep both, set RUN_DIR to a new one."
        )
    return step, path


def read_marker(path: Path) -> dict:
    """What a complete checkpoint says of itself."""
    return json.loads((path / MARKER).read_text("utf-8"))


def prune(folder: Path) -> None:
    """Delete all but the last two checkpoints and the one with the lowest NLL."""
    checkpoints = complete(folder)
    scored = {
        step: nll
        for step, path in checkpoints.items()
        if (nll := read_marker(path).get("eval_nll")) is not None
    }
    best = min(scored, key=scored.get) if scored else None
    aside = staging_folder(folder)
    for step, path in list(checkpoints.items())[:-KEPT_LAST]:
        if step != best:
            # Out of sight first: half a deletion must not look complete, and what a
            # kill leaves of it there goes with the next checkpoint.
            aside.mkdir(exist_ok=True)
            path.rename(aside / path.name)
    shutil.rmtree(aside, ignore_errors=True)
