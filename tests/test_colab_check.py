"""`make colab-check` and `make newest-check`: what they install, compare and say."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from importlib.metadata import PackageNotFoundError, requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from utils import colab, colab_versions
from utils import colab_check as check
from utils import environments as made
from utils.config import ROOT

ABOUT = "# Colab GPU runtime, August 2026, Python 3.13.15 (somewhere)"
BEFORE = {"numpy": "2.1.3", "pyarrow": "18.1.0", "torchao": "0.10.0"}
AFTER = {"numpy": "2.1.3", "pyarrow": "26.0.1", "trl": "1.16.0"}


def judged(after=AFTER, named=("trl",), before=BEFORE, conflicts=((), ())):
    return check.judge(before, after, named, *conflicts)


# --- what is read and compared ---


def test_versions_are_read_by_normalised_name(tmp_path):
    file = tmp_path / "versions.txt"
    file.write_text("# about\nRouge_Score==0.1.2  # why\n\ntorch==2.11.0+cu128\n")
    assert made.read_versions(file) == {
        "rouge-score": "0.1.2",
        "torch": "2.11.0+cu128",
    }


@pytest.mark.parametrize("line", ["numpy", "numpy>=2", "a b==1", "=="])
def test_a_line_that_is_no_version_is_named(tmp_path, line):
    file = tmp_path / "versions.txt"
    file.write_text(f"a==1\n{line}\n")
    with pytest.raises(ValueError, match=r"versions.txt, line 2: .* no name==version"):
        made.read_versions(file)


def test_changes_say_from_what_to_what():
    assert made.changes(BEFORE, AFTER) == {
        "pyarrow": "18.1.0 -> 26.0.1",
        "torchao": "gone (0.10.0)",
        "trl": "new 1.16.0",
    }


def test_what_the_set_up_cell_names_may_move():
    assert judged() == []
    moved = judged(AFTER | {"Datasets": "5"}, before=BEFORE | {"Datasets": "4"})
    assert len(moved) == 1  # names are compared normalised
    assert (
        judged(AFTER | {"datasets": "5.0.1"}, before=BEFORE | {"datasets": "4"}) == []
    )


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (AFTER | {"numpy": "2.4.0"}, "numpy moved (2.1.3 -> 2.4.0), and the set-up"),
        ({"trl": "1.16.0", "pyarrow": "26"}, "numpy is gone (2.1.3): only torchao may"),
        ({"trl": "1.16.0", "numpy": "2.1.3"}, "pyarrow is gone (18.1.0)"),
        (AFTER | {"torchao": "0.10.0"}, "torchao 0.10.0 is still there"),
    ],
)
def test_anything_else_that_changes_is_wrong(after, said):
    (line,) = judged(after)
    assert said in line


def test_a_torchao_that_peft_bears_may_stay_and_new_packages_may_come():
    there = {"torchao": "0.17.0"}
    assert judged(AFTER | there, before=BEFORE | there) == []
    assert judged(AFTER | {"datasketch": "2.0.0"}, named=()) == []


def test_only_new_conflicts_count():
    old = ["a 1 requires b"]
    assert judged(conflicts=(old, old)) == []
    assert judged(conflicts=(old, [])) == []
    (said,) = judged(conflicts=(old, [*old, "trl 1 requires c"]))
    assert said == "a new conflict: trl 1 requires c"


def test_what_the_set_up_cell_names_is_read_from_what_it_says():
    said = "no GPU\ninstalling: trl>=1.16, rouge_score>=0.1.2\nmoved: datasets 4 -> 5"
    assert check.named_in(said) == ["trl", "rouge_score"]
    assert check.named_in("set up: everything was there already") == []


# --- versions without a wheel ---


@pytest.mark.parametrize(
    ("wanted", "available", "least", "near"),
    [
        ("2.1.3", ["2.4.0", "2.1.10", "2.1.2", "2.0.0"], "0", "2.1.2"),
        ("2.1.3", ["2.4.0", "2.2.0"], "0", "2.2.0"),
        ("2.1.3", ["2.4.0", "1.9.0"], "2.0", "2.4.0"),  # 1.9 is not admitted
        ("2.10.0", ["2.9.0", "2.11.0"], "0", "2.9.0"),  # numbers, not text
        ("2.1.3", ["1.0"], "2.0", None),
        ("0.2.2", [], "0", None),
    ],
)
def test_the_nearest_is_below_if_it_can_be(wanted, available, least, near):
    assert check.nearest(wanted, available, least) == near


def test_pips_word_on_a_missing_wheel_is_understood():
    said = (
        "ERROR: Could not find a version that satisfies the requirement audioop_lts"
        "==0.2.2 (from versions: none)\n"
        "ERROR: No matching distribution found for audioop_lts==0.2.2"
    )
    assert check.no_wheel_for(said) == "audioop-lts"
    assert check.no_wheel_for("ERROR: No space left on device") is None


class Pip:
    """An environment whose index holds what the test says."""

    def __init__(self, **index):
        self.index, self.tries = index, []

    def install(self, *arguments):
        self.tries.append(arguments)
        for name, version in (line.split("==") for line in arguments[2:]):
            if version not in self.index.get(name, []):
                raise made.Failed(
                    f"No matching distribution found for {name}=={version}"
                )

    def available(self, name):
        return self.index.get(name, [])


def test_what_has_no_wheel_is_replaced_and_said():
    pip = Pip(scipy=["1.18.0", "1.12.0"], six=["1.17.0"])
    wanted = {"scipy": "1.16.3", "six": "1.17.0", "audioop-lts": "0.2.2"}
    assert check.install_versions(pip, wanted) == [
        "scipy 1.16.3: 1.18.0",  # requirements.txt wants 1.13 at least
        "audioop-lts 0.2.2: left out, there is no other",
    ]
    assert pip.tries[-1][2:] == ("six==1.17.0", "scipy==1.18.0")
    assert len(wanted) == 3  # the caller's own list stays


def test_another_failure_of_pip_is_not_taken_for_a_missing_wheel():
    class Full(Pip):
        def install(self, *arguments):
            raise made.Failed("ERROR: No space left on device")

    with pytest.raises(made.Failed, match="No space left"):
        check.install_versions(Full(), {"six": "1.17.0"})


def test_the_build_of_torch_is_told_by_what_came_with_it():
    cpu = {"torch": "2.13.0", "nvidia-ml-py": "13"}
    assert check.torch_build(cpu) == "torch is a CPU build"
    said = check.torch_build({"torch": "2.13.0", "nvidia-cublas": "13.1"})
    assert said == "torch is a CUDA build, which runs without a GPU as well"


# --- what is taken from Colab's list ---


def test_a_freeze_is_read_and_what_is_no_pin_is_kept_apart():
    text = f"{ABOUT}\nRouge_Score==1\ntorch==2.11.0+cu128\nx==1/x\n# a\n\na @ file:///b"
    about, pins, others = colab_versions.read_freeze(text)
    assert about == ABOUT[2:] and colab_versions.python_of(about) == "3.13"
    assert pins == {"rouge-score": "1", "torch": "2.11.0+cu128"}
    assert others == ["x==1/x", "a @ file:///b"]


@pytest.mark.parametrize("text", ["", "numpy==2.1.3", "# a list of August 2026"])
def test_a_list_without_date_source_and_python_is_refused(text):
    with pytest.raises(ValueError, match="must name its date, source and Python"):
        colab_versions.read_freeze(text)


def test_pip_is_held_to_colabs_versions_but_for_what_moves():
    freeze = {"datasets": "4", "torch": "2", "setuptools": "75", "nvidia-nvtx": "1"}
    kept = {"numpy": "2.1.3", "torchao": "0.10.0", "torchdata": "0.11"}
    assert colab_versions.held(freeze | kept) == [
        "numpy==2.1.3",
        "torchao==0.10.0",
        "torchdata==0.11",
    ]


def test_what_the_tree_touches_is_selected_and_what_colab_lacks_is_named():
    freeze = {"pyarrow": "18.1.0", "torchao": "0.10.0", "geopandas": "1", "pip": "24"}
    freeze |= {"triton": "3.6.0", "torch": "2.11.0+cu128", "setuptools": "75"}
    report = {
        "install": [
            {"metadata": {"name": name}}
            for name in ("PyArrow", "torch", "triton", "Rouge_Score", "nvidia-nvtx")
        ]
    }
    names = colab_versions.names_in(report)
    assert names == {"pyarrow", "torch", "triton", "rouge-score", "nvidia-nvtx"}
    kept, lacking = colab_versions.select(freeze, names)
    assert kept == {"pip": "24", "pyarrow": "18.1.0", "torchao": "0.10.0"}
    assert lacking == ["rouge-score"]


def test_what_is_written_can_be_read(tmp_path):
    text = colab_versions.render(ABOUT[2:], {"pip": "24"}, ["trl", "jedi"])
    assert text.splitlines()[0] == ABOUT
    assert "# Colab has none of: trl, jedi" in text
    (tmp_path / "versions.txt").write_text(text)
    assert made.read_versions(tmp_path / "versions.txt") == {"pip": "24"}


def test_a_list_is_derived_with_colabs_python_only(tmp_path, monkeypatch):
    shipped = tmp_path / "colab" / "versions.txt"
    monkeypatch.setattr(colab_versions, "VERSIONS", shipped)
    freeze = tmp_path / "freeze.txt"
    freeze.write_text("# Colab, Python 3.99.0\nnumpy==2.1.3\n")
    with pytest.raises(SystemExit, match=r"Python 3.99, .* run this with python3.99"):
        colab_versions.main([str(freeze)])
    assert not shipped.exists()


def test_a_list_is_derived_and_written_with_its_source(tmp_path, monkeypatch, capsys):
    """The subcommand as a whole; pip's answer is given."""
    shipped = tmp_path / "colab" / "versions.txt"
    monkeypatch.setattr(colab_versions, "VERSIONS", shipped)
    tree = {"numpy", "trl", "torch"}
    monkeypatch.setattr(colab_versions, "resolve", lambda freeze, torch: tree)
    freeze = tmp_path / "freeze.txt"
    about = "# Colab, Python {}.{}.9 (x)".format(*sys.version_info)
    freeze.write_text(f"{about}\nnumpy==2.1.3\ngeopandas==1\ntorchao==0.10.0\na @ b\n")
    colab_versions.main([str(freeze)])
    text = shipped.read_text()
    assert text.startswith(f"{about}\n") and "has none of: pip, trl\n" in text
    assert text.endswith("\nnumpy==2.1.3\ntorchao==0.10.0\n")
    said = capsys.readouterr().out
    assert "passed over, since it is no name==version: a @ b" in said
    assert "2 of 3 packages" in said


# --- the list that is shipped ---


def lacking() -> set[str]:
    """What the shipped list says that Colab has not got."""
    text = colab_versions.VERSIONS.read_text("utf-8")
    return set(re.search(r"# Colab has none of: (.+)", text)[1].split(", "))


def test_the_list_names_its_source_and_every_requirement():
    text = colab_versions.VERSIONS.read_text("utf-8")
    about, listed, others = colab_versions.read_freeze(text)
    assert "Colab GPU runtime" in about and others == []
    assert listed["torchao"] == "0.10.0" and "pip" in listed
    assert not any(colab_versions.TORCHS_OWN.fullmatch(name) for name in listed)
    moved = []
    for line in colab.requirements():
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name in colab.NOT_ON_COLAB or colab_versions.TORCHS_OWN.fullmatch(name):
            continue
        assert (name in listed) != (name in lacking()), name
        if name in listed and not requirement.specifier.contains(listed[name]):
            moved.append(name)
    assert set(moved) <= colab.MAY_MOVE


def needed_here(lines: list[str]) -> set[str]:
    """All distributions that `lines` need in this environment, their own included."""
    seen, waiting = set(), [Requirement(line) for line in lines]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                needs = map(Requirement, requires(name) or [])
            except PackageNotFoundError:
                continue  # optional, or for another system
            waiting += [
                need
                for need in needs
                if need.marker is None or need.marker.evaluate({"extra": extra})
            ]
    return {name for name, _ in seen}


def test_what_the_set_up_cell_installs_finds_its_needs_in_the_list():
    """As far as it can be told from the versions here, which may need more or less."""
    listed = made.read_versions(colab_versions.VERSIONS)
    installed = ("trl", "datasets", "evaluate", "rouge_score", "datasketch")
    lines = [x for x in colab.requirements() if Requirement(x).name in installed]
    assert len(lines) == len(installed)
    newer = {"cloudpickle", "httpcore2", "httpx2", "truststore"}  # than Colab's need
    for name in needed_here(lines) - listed.keys() - lacking() - newer:
        assert colab_versions.TORCHS_OWN.fullmatch(name), (
            f"{name}: run utils.colab_versions again with Colab's list"
        )


# --- environments ---


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An empty one, without pip, which is made in a moment."""
    folder = tmp_path_factory.mktemp("made") / "environment"
    with pytest.MonkeyPatch.context() as patch:
        create = venv.create
        patch.setattr(made.venv, "create", lambda folder, **_: create(folder))
        return made.Environment(folder)


def test_an_environment_is_made_anew_and_lets_nothing_else_in(
    environment, monkeypatch, tmp_path, capsys
):
    (tmp_path / "stray.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    said = environment.run("-c", "import sys; print(sys.prefix)")
    assert said.strip() == str(environment.folder)
    with pytest.raises(made.Failed, match="No module named 'stray'"):
        environment.run("-c", "import stray")
    assert environment.run("-c", "import stray", check=False) == ""


def test_an_old_environment_is_thrown_away(tmp_path, monkeypatch):
    monkeypatch.setattr(made.venv, "create", lambda folder, **_: folder.mkdir())
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "trace").touch()
    made.Environment(tmp_path / "old")
    assert not (tmp_path / "old" / "trace").exists()


def test_the_versions_that_an_index_has_are_read(environment, monkeypatch):
    said = "six (1.17.0)\nAvailable versions: 1.17.0, 1.16.0\n  INSTALLED: 1.17.0"
    monkeypatch.setattr(environment, "run", lambda *_, **__: said)
    assert environment.available("six") == ["1.17.0", "1.16.0"]
    monkeypatch.setattr(environment, "run", lambda *_, **__: "ERROR: none")
    assert environment.available("six") == []


def test_conflicts_are_pips_lines_and_none_if_all_fits(environment, monkeypatch):
    said = "ipython 7.34.0 requires jedi, which is not installed.\n"
    monkeypatch.setattr(environment, "run", lambda *_, **__: said)
    assert environment.conflicts() == [said.strip()]
    fine = "No broken requirements found.\n"
    monkeypatch.setattr(environment, "run", lambda *_, **__: fine)
    assert environment.conflicts() == []


def test_a_kernel_of_another_environment_is_found_out():
    installed = {"rouge-score": "0.1.2", "trl": "1.16.0"}
    made.check_kernel({"python": "3.13.0", "rouge_score": "0.1.2"}, installed)
    with pytest.raises(made.Failed, match=r"ran with trl 1\.15\.0.*kernelspec list"):
        made.check_kernel({"trl": "1.15.0"}, installed)


def walked(monkeypatch, environment, code, versions):
    """What a walk was given, where a stand-in takes the place of the notebooks."""
    given = {}

    def run(command, cwd, env):
        given.update(env, command=command[1:])
        folder = environment.folder / "run"
        folder.mkdir(exist_ok=True)
        (folder / "run.json").write_text(json.dumps({"versions": versions}))
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(made.subprocess, "run", run)
    monkeypatch.setattr(environment, "versions", lambda: {"trl": "1.16.0"})
    environment.walk()
    return given


def test_a_walk_is_the_pocket_run_in_a_folder_of_its_own(monkeypatch, environment):
    monkeypatch.setenv("PROFILE", "llama_1b")
    monkeypatch.setenv("FIRST_AID_DATASET", "mine.jsonl")
    monkeypatch.setenv("QUICK", "1")
    given = walked(monkeypatch, environment, 0, {"trl": "1.16.0"})
    assert given["command"] == ["-m", "utils.walk"]  # and not in place
    assert given["PROFILE"] == "pocket" and "FIRST_AID_DATASET" not in given
    assert given["RUN_DIR"] == str(environment.folder / "run")
    assert given["QUICK"] == "1"  # a quick look stays one


def test_a_walk_that_fails_or_ran_elsewhere_is_said(monkeypatch, environment):
    with pytest.raises(made.Failed, match="do not run with these versions"):
        walked(monkeypatch, environment, 1, {})
    with pytest.raises(made.Failed, match="ran with trl 1.15.0"):
        walked(monkeypatch, environment, 0, {"trl": "1.15.0"})


# --- both checks, with environments that are told what to say ---


class Told:
    """An environment that remembers what was done and says what the test tells it."""

    def __init__(self, folder, states, says=(), conflicts=((), ())):
        self.folder, self.states = folder, list(states)
        self.says, self.found = list(says), [list(lines) for lines in conflicts]
        self.done = []

    def install(self, *arguments):
        self.done.append(arguments)

    def run(self, *arguments):
        return self.says.pop(0)

    def versions(self):
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def conflicts(self):
        return self.found.pop(0)

    def walk(self):
        self.done.append("walk")


SAID = "installing: trl>=1.16\nmoved: pyarrow 18.1.0 -> 26.0.1"
THERE = "set up: everything was there already"


def test_colabs_check_ends_with_the_walk_and_tells_what_changed(tmp_path, capsys):
    env = Told(tmp_path, [BEFORE, BEFORE, AFTER], [SAID, THERE])
    check.check_colab(env, "2.13.0")
    assert env.done[-1] == "walk" and env.done[-2][-1] == "torch==2.13.0"
    out = capsys.readouterr().out
    assert "Colab GPU runtime" in out and "changed by the set-up cell: 3" in out
    assert "torch is a CPU build" in out
    assert re.search(r"pyarrow +18.1.0 -> 26.0.1", out)
    assert "numpy" not in out.partition("changed by")[2]


@pytest.mark.parametrize(("python", "told"), [((3, 13, 0), False), ((3, 12, 9), True)])
def test_another_python_than_colabs_is_told(
    tmp_path, monkeypatch, capsys, python, told
):
    env = Told(tmp_path, [BEFORE, BEFORE, AFTER], [SAID, THERE])
    with monkeypatch.context() as patch:
        patch.setattr(check.sys, "version_info", python)
        check.check_colab(env, "2.13.0")
    assert ("PYTHON=python3.13 gives Colab's" in capsys.readouterr().out) == told


@pytest.mark.parametrize(
    ("states", "says", "conflicts", "said"),
    [
        ([AFTER | {"numpy": "2.4"}], [SAID, THERE], [[], []], "numpy moved"),
        ([AFTER], [SAID, THERE], [[], ["trl 1 requires x"]], "a new conflict: trl"),
        ([AFTER], [SAID, SAID], [[], []], "a second time it installs again"),
        ([AFTER, BEFORE], [SAID, THERE], [[], []], "a second time it installs again"),
    ],
)
def test_colabs_check_fails_before_the_walk(tmp_path, states, says, conflicts, said):
    env = Told(tmp_path, [BEFORE, BEFORE, *states], says, conflicts)
    with pytest.raises(check.Failed, match=said):
        check.check_colab(env, "2.13.0")
    assert "walk" not in env.done


def test_the_newest_check_tells_what_differs_and_walks(tmp_path, capsys):
    tested = made.read_versions(check.CONSTRAINTS)
    newest = tested | {
        "trl": "9.9",
        "brand-new": "1",
        "torch": tested["torch"] + "+cpu",
    }
    env = Told(tmp_path, [newest], conflicts=[[]])
    check.check_newest(env, "2.13.0")
    out = capsys.readouterr().out
    assert re.search(rf"trl +{re.escape(tested['trl'])} -> 9\.9", out)
    assert "other than in constraints.txt: 1" in out
    assert "new beside constraints.txt: 1\n  brand-new" in out
    wanted = env.done[1]
    assert wanted[0] == "torch==2.13.0" and str(check.CONSTRAINTS) not in wanted
    assert env.done[-1] == "walk"
    check.check_newest(Told(tmp_path, [tested], conflicts=[[]]), None)
    assert "torch too" in capsys.readouterr().out


def test_the_newest_check_fails_on_a_conflict(tmp_path):
    env = Told(tmp_path, [{"trl": "9.9"}], conflicts=[["trl 9.9 requires y"]])
    with pytest.raises(check.Failed, match="a conflict: trl 9.9 requires y"):
        check.check_newest(env, None)
    assert "walk" not in env.done


@pytest.mark.parametrize(("flags", "name"), [([], "colab"), (["--newest"], "newest")])
def test_a_failure_is_exit_code_1_with_its_sentence(monkeypatch, flags, name):
    def fail(folder):
        raise check.Failed(f"{folder.name} is no place.")

    monkeypatch.setattr(check, "Environment", fail)
    with pytest.raises(SystemExit) as caught:
        check.main(flags)
    assert caught.value.code == f"make {name}-check: .venv-{name} is no place."
    monkeypatch.setattr(check.sys, "version_info", (3, 10, 1))
    with pytest.raises(SystemExit, match="too old: give PYTHON=python3.11"):
        check.main(flags)


@pytest.mark.parametrize("target", ["colab-check", "newest-check"])
@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_make_asks_the_python_and_the_torch_that_it_is_given(target):
    # `make test` would pass its own flags and variables on to this make.
    passed_on = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PYTHON", "TORCH")
    clean = {name: value for name, value in os.environ.items() if name not in passed_on}

    def dry(*variables):
        command = ["make", "--dry-run", target, *variables]
        done = subprocess.run(
            command, cwd=ROOT, env=clean, capture_output=True, text=True
        )
        return done.stdout.split()

    check = ["-m", "utils.colab_check"]
    check += ["--newest"] if target == "newest-check" else []
    assert dry() == ["python3", *check]
    given = dry("PYTHON=python3.13", "TORCH=2.13.0")
    assert given == ["python3.13", *check, "--torch", "2.13.0"]


@pytest.mark.slow
def test_colabs_check_as_a_whole(tmp_path):
    """With the real index, in this Python, a part of the rows: some ten minutes."""
    command = ["make", "colab-check", f"PYTHON={sys.executable}"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "QUICK": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"torchao +gone \(0\.10\.0\)", done.stdout)
    assert "6 notebooks in " in done.stdout and "all well" in done.stdout
