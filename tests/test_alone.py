"""Each notebook is executed first and alone, in a fresh clone of the project."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from utils import colab
from utils.config import ROOT

# A Colab for a kernel to start in: its package, with a Drive that is a folder.
COLAB = {
    "sitecustomize.py": "import google.colab",
    "google/colab/__init__.py": "",
    "google/colab/drive.py": """
import os, sys
from pathlib import Path

def mount(place):
    place = Path(os.environ["DRIVE"])
    place.mkdir(exist_ok=True)
    sys.modules["utils.colab"].DRIVE = place
""",
}


def copy_tracked(folder: Path) -> Path:
    """The tracked files as they are now, and none of the ignored ones."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
    )
    if listed.returncode:
        pytest.skip("this is no git checkout")
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture
def clone(tmp_path):
    return copy_tracked(tmp_path / "clone")


def without_knobs() -> dict[str, str]:
    """This process's environment, less what would make a run another one."""
    ends = ("_DATASET", "_ADAPTER", "PROFILE", "RUN_DIR", "MODEL", "MAX_STEPS")
    return {key: value for key, value in os.environ.items() if not key.endswith(ends)}


def walk(clone: Path, number: str, **knobs) -> str:
    """Execute one notebook in `clone`, without the Hub; all that it has put out."""
    assert not (clone / "data" / "runs").exists()
    done = subprocess.run(
        [sys.executable, "-m", "utils.walk", "--only", number],
        cwd=clone,
        env={**without_knobs(), "HF_HUB_OFFLINE": "1", **knobs},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = clone / "data" / "runs" / knobs["PROFILE"]
    (path,) = (run / "notebooks").glob("*.ipynb")
    assert path.name.startswith(number)
    cells = nbformat.read(path, as_version=4).cells
    counts = [cell.execution_count for cell in cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    return str([cell.get("outputs") for cell in cells])


@pytest.mark.slow
@pytest.mark.parametrize("number", ["01", "02", "03", "04", "05", "06"])
def test_it_works_first_and_alone(clone, number):
    steps = {"MAX_STEPS": "5"} if number in ("02", "03") else {}
    text = walk(clone, number, PROFILE="pocket", **steps)
    if number in ("04", "05", "06"):
        assert "shipped" in text  # it says whose adapters these are


@pytest.mark.slow
@pytest.mark.parametrize("number", ["04", "05", "06"])
def test_without_adapters_for_the_1b_it_goes_on_with_the_pocket_model(clone, number):
    """And says so, and which notebooks make the real ones."""
    text = walk(clone, number, PROFILE="llama_1b")
    assert "Going on with the pocket profile" in text
    assert "notebooks/02_fine_tune_on_first_aid.ipynb" in text
    assert "No adapters for unsloth/Llama-3.2-1B-Instruct" in text
    assert "shipped" in text


def open_in_colab(path: Path, content: Path) -> str:
    """Execute the notebook at `path` in the empty folder `content`; what it printed."""
    content.mkdir()
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace(colab.REPOSITORY, "some/project")
        cell.source = cell.source.replace("USE_DRIVE = False", "USE_DRIVE = True")
    resources = {"metadata": {"path": str(content)}}
    NotebookClient(
        notebook, timeout=600, resources=resources, store_widget_state=True
    ).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    return "".join(out.get("text", "") for out in outputs)


@pytest.mark.slow
def test_on_colab_a_run_on_drive_outlives_its_runtime(clone, tmp_path, monkeypatch):
    """Fetched by the set-up cell; 02 in one runtime, then 06 first in the next."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(clone)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    hub = tmp_path / "hub" / "some"
    hub.mkdir(parents=True)
    bare = ["git", "clone", "-q", "--bare", str(clone), str(hub / "project")]
    subprocess.run(bare, check=True)
    starts = tmp_path / "starts"
    for name, text in COLAB.items():
        (starts / name).parent.mkdir(parents=True, exist_ok=True)
        (starts / name).write_text(text)
    for name in os.environ.keys() - without_knobs().keys():
        monkeypatch.delenv(name)
    environ = {
        "PYTHONPATH": str(starts),
        "DRIVE": str(tmp_path / "drive"),
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{hub.parent.as_uri()}/.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://github.com/",
        "PIP_NO_INDEX": "1",  # all is here; what is not is not to come from outside
        "PROFILE": "pocket",
        "MAX_STEPS": "5",
        "HEADLESS": "1",
    }
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    notebooks = clone / "notebooks"
    text = open_in_colab(notebooks / "02_fine_tune_on_first_aid.ipynb", tmp_path / "a")
    assert "set up: everything was there already" in text
    assert "runs are kept on your Drive, in MyDrive/llama-first-aid/runs" in text
    run = tmp_path.joinpath("drive", *colab.ON_DRIVE, "pocket")
    assert (run / "adapters" / "first_aid" / "adapter_model.safetensors").is_file()
    assert (
        list(run.rglob("checkpoint-*")) and (run / "training_first_aid.jsonl").is_file()
    )
    assert not (tmp_path / "a" / "project" / "data" / "runs").exists()
    shutil.rmtree(tmp_path / "a")  # disconnected
    text = open_in_colab(notebooks / "06_chat_with_three_models.ipynb", tmp_path / "b")
    assert "FirstAidQA adapter: this run's" in text
    assert "FineTome adapter: shipped in" in text
