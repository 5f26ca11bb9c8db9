"""Does it still work on Colab, and with whatever is newest? Asked without Colab.

    python -m utils.colab_check             Colab's versions, then the set-up cell's own
    python -m utils.colab_check --newest    the newest that requirements.txt admits

Either makes an environment from the interpreter that runs it and walks all six
notebooks in it on the pocket profile. The standard library only, so that any Python can
be asked: `make colab-check PYTHON=python3.13`.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils import colab
from utils.config import DATA, ROOT, display_path

VERSIONS = DATA / "colab" / "versions.txt"
CONSTRAINTS = ROOT / "constraints.txt"
# Colab has a CUDA build of its own; this one runs anywhere, and Colab's is not touched.
TORCH = "2.13.0"
# The set-up cell's install, in a process that takes itself for Colab's.
SET_UP = """
import sys, types
sys.modules["google.colab"] = types.ModuleType("google.colab")
from utils import colab
colab.set_up()
"""


class Failed(Exception):
    """What did not go as it should, in a sentence."""


def read_versions(path: Path) -> dict[str, str]:
    """The `name==version` lines of a file, by normalised name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is something else; the message names it.
    """
    found = {}
    lines = path.read_text("utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        bare = line.split("#")[0].strip()
        if not bare:
            continue
        name, _, version = bare.partition("==")
        if not version or not re.fullmatch(r"[\w.-]+", name.strip()):
            raise ValueError(
                f"{path.name}, line {number}: {line!r} is no name==version"
            )
        found[_normal(name)] = version.strip()
    return found


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str]:
    """What differs between two environments, by name: `1 -> 2`, `new 2`, `gone (1)`."""
    differ = {}
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        differ[name] = f"new {new}" if old is None else f"{old} -> {new}"
        if new is None:
            differ[name] = f"gone ({old})"
    return differ


def judge(
    before: Mapping[str, str],
    after: Mapping[str, str],
    named: Sequence[str],
    conflicts_before: Sequence[str],
    conflicts_after: Sequence[str],
) -> list[str]:
    """What is wrong with what the set-up cell has changed, a sentence each.

    Args:
        before, after: versions by normalised name.
        named: what the set-up cell said that it installs.
        conflicts_before, conflicts_after: lines of `pip check`.
    """
    wrong = []
    may = {_normal(name) for name in (*named, *colab.MAY_MOVE, "torchao")}
    for name, change in changes(before, after).items():
        if not change.startswith("new ") and name not in may:
            wrong.append(
                f"{name} changed ({change}), and the set-up cell never said so"
            )
    if "torchao" in after and _numbers(after["torchao"]) < (0, 16):
        wrong.append(f"torchao {after['torchao']} is still there: PEFT fails with it")
    for line in sorted(set(conflicts_after) - set(conflicts_before)):
        wrong.append(f"a new conflict: {line}")
    return wrong


class Environment:
    """A virtual environment of this interpreter, made anew."""

    def __init__(self, folder: Path):
        self.python = folder / "bin" / "python"
        print(f"making {display_path(folder)} with Python {_version()}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        self.run("-m", "pip", "install", "--quiet", "--upgrade", "pip")

    def run(self, *arguments: str, check: bool = True, **environ: str) -> str:
        """Run this environment's Python; returns what it printed.

        Raises:
            Failed: its exit code was not 0, and `check`.
        """
        done = subprocess.run(
            [str(self.python), *arguments],
            cwd=ROOT,
            env={**os.environ, **environ},
            capture_output=True,
            text=True,
        )
        if check and done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-12:]
            raise Failed(
                "\n".join([f"python {' '.join(arguments)[:100]} failed:", *said])
            )
        return done.stdout

    def install(self, *wanted: str) -> None:
        """Install with pip; raises as `run`."""
        self.run("-m", "pip", "install", "--quiet", *wanted)

    def versions(self) -> dict[str, str]:
        """Version by normalised name of all that is installed, pip aside."""
        rows = json.loads(self.run("-m", "pip", "list", "--format=json"))
        return {
            _normal(row["name"]): row["version"] for row in rows if row["name"] != "pip"
        }

    def conflicts(self) -> list[str]:
        """The lines of `pip check`, empty if there are none."""
        said = self.run("-m", "pip", "check", check=False).splitlines()
        return [line for line in said if "No broken requirements" not in line]

    def walk(self) -> None:
        """Execute all six notebooks here on the pocket profile.

        Raises:
            Failed: a notebook failed; the message names cell and error.
        """
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            environ = {
                key: value
                for key, value in os.environ.items()
                if not re.fullmatch(r".*_DATASET|.*_ADAPTER|BASE_MODEL|MAX_STEPS", key)
            }
            environ |= {"PROFILE": "pocket", "RUN_DIR": folder}
            done = subprocess.run(
                [str(self.python), "-m", "utils.walk"], cwd=ROOT, env=environ
            )
        if done.returncode:
            raise Failed("the walk failed; its last lines above say where and why")
        print(f"all six notebooks: {time.perf_counter() - began:.0f} s", flush=True)


def install_versions(environment: Environment, wanted: Mapping[str, str]) -> None:
    """Install exactly `wanted`, without looking at what needs what, as Colab has it.

    Where this interpreter has no build of a version, the nearest one is taken instead.
    All that differs from Colab's list in the end is printed.
    """
    exact = [
        f"{name}=={version}" for name, version in wanted.items() if name != "torch"
    ]
    try:
        environment.install("--no-deps", *exact)
    except Failed:
        print("not all of Colab's versions fit this Python; one by one", flush=True)
        for name, version in wanted.items():
            if name != "torch":
                _install_nearest(environment, name, version)
    # With all that it needs: newer than Colab's own, it may need newer others.
    environment.install(f"torch=={TORCH}")
    have = environment.versions()
    for name, version in wanted.items():
        if have.get(name) != version:
            print(f"  {name}: {have.get(name)} instead of Colab's {version}")


def _install_nearest(environment: Environment, name: str, version: str) -> None:
    for bound in ("==", "<=", ">="):
        try:
            environment.install(
                "--no-deps", "--only-binary=:all:", f"{name}{bound}{version}"
            )
            return
        except Failed as error:
            failure = error
    raise failure


def check_colab(folder: Path) -> None:
    """Colab's versions, the set-up cell on top, and the six notebooks.

    Raises:
        Failed: something is not as it should be.
    """
    wanted = read_versions(VERSIONS)
    first_line = VERSIONS.read_text("utf-8").partition("\n")[0].strip("# ")
    print(first_line)
    if f"Python {'.'.join(_version().split('.')[:2])}." not in first_line:
        print(f"this is Python {_version()}; `PYTHON=` names another one")
    environment = Environment(folder)
    print(f"installing {len(wanted)} packages as on Colab, torch {TORCH}", flush=True)
    install_versions(environment, wanted)
    before, conflicts = environment.versions(), environment.conflicts()
    began = time.perf_counter()
    said = environment.run("-c", SET_UP)
    print(said.strip())
    print(f"the set-up cell's install: {time.perf_counter() - began:.0f} s")
    after = environment.versions()
    named = [
        re.match(r"[\w.-]+", name)[0]
        for line in said.splitlines()
        if line.startswith("installing: ")
        for name in line.removeprefix("installing: ").split(", ")
    ]
    for name, change in changes(before, after).items():
        print(f"  {name:24} {change}")
    print(f"conflicts among Colab's own before: {len(conflicts)}")
    wrong = judge(before, after, named, conflicts, environment.conflicts())
    again = environment.run("-c", SET_UP)
    if "everything was there already" not in again:
        wrong.append(f"a second run of the set-up cell installs again: {again.strip()}")
    if wrong:
        raise Failed("\n".join(wrong))
    environment.walk()


def check_newest(folder: Path) -> None:
    """The newest releases that requirements.txt admits, and the six notebooks.

    Torch is held at the version that `TORCH` names ("" for the newest): its newest
    build for Linux brings several gigabytes of CUDA.

    Raises:
        Failed: something is not as it should be.
    """
    environment = Environment(folder)
    torch = os.environ.get("TORCH", TORCH)
    pin = (f"torch=={torch}",) if torch else ()
    print(f"installing the newest of requirements.txt, torch {torch or 'too'}")
    environment.install("--upgrade", *pin, "-r", str(ROOT / "requirements.txt"))
    found = environment.versions()
    tested = read_versions(CONSTRAINTS)
    shared = {name: tested[name] for name in found if name in tested}
    for name, change in changes(shared, {n: found[n] for n in shared}).items():
        print(f"  {name:24} {change}")
    if conflicts := environment.conflicts():
        raise Failed("\n".join(conflicts))
    environment.walk()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _version() -> str:
    return ".".join(map(str, sys.version_info[:3]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Check from the command line; exit code 1 with what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.colab_check",
        description="Walk the notebooks with Colab's versions, or with the newest.",
    )
    parser.add_argument(
        "--newest", action="store_true", help="the newest releases instead"
    )
    newest = parser.parse_args(arguments).newest
    try:
        if newest:
            check_newest(ROOT / ".venv-newest")
        else:
            check_colab(ROOT / ".venv-colab")
    except (Failed, OSError, ValueError) as error:
        sys.exit(f"{'newest' if newest else 'colab'}-check: {error}")
    print("all well")


if __name__ == "__main__":
    main()
