"""The set-up on Colab, and the address that `make address` stamps."""

import re
import shutil
import subprocess
import sys
import types

import pytest
from packaging.requirements import Requirement
from test_alone import copy_tracked

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
    """A module in the place of `google.colab`, as good as empty."""
    package, module = types.ModuleType("google"), types.ModuleType("google.colab")
    package.colab = module
    monkeypatch.setitem(sys.modules, "google", package)
    monkeypatch.setitem(sys.modules, "google.colab", module)
    return module


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


def test_what_python_has_loaded_is_known_by_its_package():
    loaded = colab.loaded_packages()
    assert {"pytest", "packaging"} <= loaded
    assert not {"jupyterlab", "pip"} & loaded
    assert loaded <= colab.installed().keys()


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


def test_the_address_is_stamped_everywhere(tree, capsys):
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


def test_a_stamped_project_is_fit_and_can_be_stamped_again(tmp_path):
    """By the command itself, with as long an address as fits, and back again."""
    folder = copy_tracked(tmp_path / "project")
    before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}

    def run(module, *arguments):
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    long = f"{'owner-' * 6}xyz/{'name-' * 5}of.a_pro"
    assert len(f'REPOSITORY = "{long}"') == 88
    assert "notebooks/06" in run("utils.colab", "--address", long)
    run("ruff", "check", ".")
    run("ruff", "format", "--check", ".")
    run("utils.hygiene")
    assert "changed: nothing" in run("utils.colab", "--address", long)
    assert "README.md" in run("utils.colab", "--address", "a/b")
    run("utils.hygiene")
    run("utils.colab", "--address", colab.REPOSITORY)
    after = {path: path.read_bytes() for path in before}
    assert [path.name for path in before if before[path] != after[path]] == []


def test_the_same_letters_elsewhere_are_no_address(tree, monkeypatch):
    """`a/b` stands in many a picture's base64, and in many a path."""
    monkeypatch.setattr(colab, "REPOSITORY", "a/b")
    text = "src=data:image/png;base64,xa/bZ data/b github.com/a/bc github.com/a/b.git"
    (tree / "README.md").write_text(text)
    assert colab.stamp_address("c/d") == ["README.md"]
    stamped = text.replace("github.com/a/b.git", "github.com/c/d.git")
    assert (tree / "README.md").read_text() == stamped


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


def test_the_drive_is_mounted_and_each_run_gets_its_folder_on_it(on_colab, capsys):
    mounted = []
    on_colab.drive = types.SimpleNamespace(mount=mounted.append)
    runs = colab.runs_folder(True)
    assert mounted == ["/content/drive"]
    assert "MyDrive/llama-first-aid/runs" in capsys.readouterr().out
    settings = load_settings({"PROFILE": "pocket"}, runs=runs)
    assert settings.run_dir == runs / "pocket"
    assert settings.figures_dir == runs / "pocket" / "imgs"  # on the Drive as well


def test_a_drive_that_is_refused_is_said(on_colab):
    def mount(place):
        raise ValueError("mount failed")  # as google.colab.drive does

    on_colab.drive = types.SimpleNamespace(mount=mount)
    with pytest.raises(RuntimeError, match=r"\(mount failed\).*USE_DRIVE = False"):
        colab.runs_folder(True)
