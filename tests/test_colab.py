"""The set-up on Colab, and the address that `make address` stamps."""

import re
import shutil
import subprocess
import sys
import types

import pytest
from packaging.requirements import Requirement

from utils import colab
from utils.config import ROOT, load_settings


@pytest.fixture
def commands(monkeypatch):
    """What would be run, instead of running it."""
    run = []

    def note(command, **_):
        run.append(command)
        return subprocess.CompletedProcess(command, 0, "Tesla T4, 15360 MiB\n", "")

    monkeypatch.setattr(colab.subprocess, "run", note)
    monkeypatch.setattr(colab.shutil, "which", lambda name: None)
    return run


@pytest.fixture
def on_colab(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))


def pretend(monkeypatch, **versions):
    """Let packages seem to have another version; None: not installed."""
    real = colab.version

    def version(name):
        have = versions.get(name, real)
        if have is None:
            raise colab.PackageNotFoundError(name)
        return real(name) if have is real else have

    monkeypatch.setattr(colab, "version", version)


def test_elsewhere_nothing_is_installed_or_removed(monkeypatch, commands):
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    pretend(monkeypatch, trl=None, torchao="0.10.0")
    colab.set_up()
    assert commands == []


def test_the_runtime_names_its_gpu_or_how_to_get_one(monkeypatch, commands):
    assert "T4 GPU switches one on" in colab.runtime()
    monkeypatch.setattr(colab.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert colab.runtime() == "GPU: Tesla T4, 15360 MiB"


def test_requirements_are_read_without_comments():
    lines = colab.requirements()
    assert "trl>=1.16" in lines
    assert all(Requirement(line) for line in lines)
    assert len(lines) == len({Requirement(line).name for line in lines})


def test_nothing_is_missing_here():
    assert colab.missing_requirements() == []


def test_missing_means_absent_or_too_old(monkeypatch):
    pretend(
        monkeypatch,
        trl=None,
        datasets="4.0.0",  # as on Colab
        transformers="5.15.0",
        torch="2.11.0+cu128",
        jupyter=None,  # Colab is the Jupyter
    )
    missing = [Requirement(line).name for line in colab.missing_requirements()]
    assert missing == ["trl", "datasets"]


def test_versions_are_compared_as_numbers(monkeypatch):
    pretend(monkeypatch, peft="0.9.0", gradio="6.100.0", evaluate="0.4.6.post1")
    missing = [Requirement(line).name for line in colab.missing_requirements()]
    assert missing == ["peft"]


def test_constraints_hold_all_but_what_may_move(monkeypatch):
    held = colab.installed_constraints
    lines = held()
    assert all(re.fullmatch(r"[\w.-]+==\S+", line) for line in lines)
    names = [line.split("==")[0].lower() for line in lines]
    assert "torch" in names and "numpy" in names
    # What is imported already is held as well; this process has imported some.
    assert set(names) & colab.MAY_MOVE == colab.MAY_MOVE & sys.modules.keys()
    monkeypatch.delitem(sys.modules, "pyarrow", raising=False)
    assert not any(line.startswith("pyarrow==") for line in held())


def test_a_package_that_is_there_twice_is_held_once(monkeypatch):
    there = [
        types.SimpleNamespace(name="pip_tools", version="2.0"),
        types.SimpleNamespace(name="pip-tools", version="1.0"),  # Debian's, behind
        types.SimpleNamespace(name=None, version="0"),  # a broken one
    ]
    monkeypatch.setattr(colab, "distributions", lambda: iter(there))
    assert colab.installed_constraints() == ["pip-tools==2.0"]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A copy of everything that carries the address, which may be stamped."""
    monkeypatch.setattr(colab, "ROOT", tmp_path)
    for pattern in colab.STAMPED:
        for path in ROOT.glob(pattern):
            target = tmp_path / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return tmp_path


def test_the_address_is_stamped_everywhere(tree, monkeypatch, capsys):
    colab.main(["--address", "some-one/my.fork_2"])
    said = capsys.readouterr().out
    for path in tree.rglob("*.*"):
        text = path.read_text("utf-8")
        assert colab.REPOSITORY not in text, path.name
        relative = path.relative_to(tree).as_posix()
        assert (relative in said) == ("some-one/my.fork_2" in text)
    assert 'REPOSITORY = "some-one/my.fork_2"' in (
        tree / "utils" / "colab.py"
    ).read_text("utf-8")
    notebooks = sorted((tree / "notebooks").glob("*.ipynb"))
    assert len(notebooks) == 6
    for path in notebooks:
        badge = f"colab.research.google.com/github/some-one/my.fork_2/blob/main/{path}"
        assert badge.replace(f"{tree}/", "") in path.read_text("utf-8")
    # Again with the next address: what was stamped is what is looked for.
    monkeypatch.setattr(colab, "REPOSITORY", "some-one/my.fork_2")
    assert len(colab.stamp_address("other/name")) >= 7
    assert colab.stamp_address("some-one/my.fork_2") == []  # stands nowhere now


def test_the_address_stands_only_where_it_is_stamped():
    stamped = {path for pattern in colab.STAMPED for path in ROOT.glob(pattern)}
    owner = colab.REPOSITORY.split("/")[0]
    for path in ROOT.rglob("*"):
        if path.suffix not in (".py", ".md", ".ipynb", ".toml", ".yml", ".json"):
            continue
        inside = path.relative_to(ROOT).parts
        if inside[0].startswith(".v") or inside[:2] == ("data", "runs"):
            continue
        strays = re.findall(rf"\b{re.escape(owner)}/[\w.-]+", path.read_text("utf-8"))
        if path not in stamped and path.parent.name != "tests":
            assert not strays, f"{path.name}: {strays[0]} would not be stamped"


@pytest.mark.parametrize(
    "address",
    [
        "",
        "name",
        "a/b/c",
        "a b/c",
        "https://github.com/a/b",
        "a/",
        "/b",
        "../..",
        "ä/b",
    ],
)
def test_a_bad_address_is_refused_and_changes_nothing(tree, address):
    before = {path: path.read_bytes() for path in tree.rglob("*.*")}
    with pytest.raises(SystemExit, match="give it as owner/name"):
        colab.main(["--address", address])
    assert before == {path: path.read_bytes() for path in tree.rglob("*.*")}


def test_runs_stay_in_the_project_unless_the_drive_is_asked_for(monkeypatch):
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    assert colab.runs_folder(False) == ROOT / "data" / "runs"
    with pytest.raises(RuntimeError, match="USE_DRIVE works on Colab only"):
        colab.runs_folder(True)


def test_the_drive_is_mounted_and_each_run_gets_its_folder_on_it(monkeypatch, on_colab):
    mounted = []
    module = sys.modules["google.colab"]
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    module.drive = types.SimpleNamespace(mount=mounted.append)
    monkeypatch.setattr(sys.modules["google"], "colab", module, raising=False)
    runs = colab.runs_folder(True)
    assert mounted == ["/content/drive"]
    settings = load_settings({"PROFILE": "pocket"}, runs=runs)
    assert settings.run_dir == runs / "pocket"
    assert settings.figures_dir == runs / "pocket" / "imgs"  # on the Drive as well
