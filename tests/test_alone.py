"""Each notebook is executed first and alone, in a fresh clone of the project."""

import os
import shutil
import subprocess
import sys

import nbformat
import pytest

from utils.config import ROOT


@pytest.fixture
def clone(tmp_path):
    """The tracked files as they are now, and none of the ignored ones."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
    )
    if listed.returncode:
        pytest.skip("this is no git checkout")
    folder = tmp_path / "clone"
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", ["01", "02", "03", "04", "05", "06"])
def test_it_works_first_and_alone(clone, number):
    assert not (clone / "data" / "runs").exists()
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.endswith(("_DATASET", "_ADAPTER", "PROFILE", "RUN_DIR", "MODEL"))
    }
    steps = {"MAX_STEPS": "5"} if number in ("02", "03") else {}
    done = subprocess.run(
        [sys.executable, "-m", "utils.walk", "--only", number],
        cwd=clone,
        env={**kept, **steps, "PROFILE": "pocket", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (clone / "data" / "runs" / "pocket" / "notebooks").glob("*.ipynb")
    assert path.name.startswith(number)
    cells = nbformat.read(path, as_version=4).cells
    counts = [cell.execution_count for cell in cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    if number in ("04", "05", "06"):
        text = str([cell.get("outputs") for cell in cells])
        assert "shipped" in text  # it says whose adapters these are
