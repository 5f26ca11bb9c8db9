"""Fresh environments in which the project is tried with other versions than its own.

The standard library only, so that any Python can be asked. Each is made from the
interpreter that runs this, by `make colab-check` and `make newest-check`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.config import ROOT, display_path

PIN = re.compile(r"([A-Za-z\d][\w.-]*)==([\w.+!]+)")
# What would turn the pocket run into another one.
KNOBS = re.compile(r".*_DATASET|.*_ADAPTER|BASE_MODEL|MAX_STEPS|SEED|LOAD_IN_4BIT")


class Failed(Exception):
    """What did not go as it should, in a sentence."""


def normalised(name: str) -> str:
    """A distribution's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def numbers(version: str) -> tuple[int, ...]:
    """The release of a version, to compare it by."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))


def read_versions(path: Path) -> dict[str, str]:
    """The `name==version` lines of a file, by normalised name; comments are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is something else; the message names it.
    """
    found = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        bare = line.split("#")[0].strip()
        if not bare:
            continue
        pin = PIN.fullmatch(bare)
        if not pin:
            raise ValueError(
                f"{path.name}, line {number}: {line!r} is no name==version"
            )
        found[normalised(pin[1])] = pin[2]
    return found


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str]:
    """What differs between two environments, by name: `1 -> 2`, `new 2`, `gone (1)`."""
    differ = {}
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old is None:
            differ[name] = f"new {new}"
        elif new is None:
            differ[name] = f"gone ({old})"
        elif old != new:
            differ[name] = f"{old} -> {new}"
    return differ


class Environment:
    """A virtual environment of this interpreter, made anew in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.python = folder / "bin" / "python"
        python = ".".join(map(str, sys.version_info[:3]))
        print(f"making {display_path(folder)} with Python {python}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)

    def run(self, *arguments: str, check: bool = True) -> str:
        """Run this environment's Python at the project's root; what it printed.

        Raises:
            Failed: its exit code was not 0, and `check`; the message ends with the last
                lines that it wrote.
        """
        done = subprocess.run(
            [str(self.python), *arguments],
            cwd=ROOT,
            env=_alone(),
            capture_output=True,
            text=True,
        )
        if check and done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise Failed("\n".join([f"{' '.join(arguments)[:60]} failed:", *said[-9:]]))
        return done.stdout

    def install(self, *wanted: str) -> None:
        """Install with pip.

        Raises:
            Failed: pip could not; the message ends with its reason.
        """
        self.run("-m", "pip", "install", "--quiet", *wanted)

    def available(self, name: str) -> list[str]:
        """The released versions of `name` that have a wheel for this interpreter."""
        wheels = "--only-binary=:all:"
        said = self.run("-m", "pip", "index", "versions", wheels, name, check=False)
        listed = re.search(r"^Available versions: (.+)$", said, re.MULTILINE)
        return listed[1].split(", ") if listed else []

    def versions(self) -> dict[str, str]:
        """The version of all that is installed, by normalised name."""
        rows = json.loads(self.run("-m", "pip", "list", "--format=json"))
        return {normalised(row["name"]): row["version"] for row in rows}

    def conflicts(self) -> list[str]:
        """The lines of `pip check`, none where everything fits."""
        said = self.run("-m", "pip", "check", check=False).splitlines()
        return [line for line in said if "No broken requirements" not in line]

    def walk(self) -> None:
        """Execute all six notebooks here on the pocket profile, and not in place.

        The run stays in the environment's folder `run`.

        Raises:
            Failed: a notebook failed, or ran with other packages than those here.
        """
        began = time.perf_counter()
        run = self.folder / "run"
        environ = {k: v for k, v in _alone().items() if not KNOBS.fullmatch(k)}
        environ |= {"PROFILE": "pocket", "RUN_DIR": str(run)}
        # Older kernels would print a debugger's warning into every line of the walk.
        environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
        done = subprocess.run(
            [str(self.python), "-m", "utils.walk"], cwd=ROOT, env=environ
        )
        if done.returncode:
            raise Failed(
                "the notebooks do not run with these versions: the lines above say "
                "where and why"
            )
        ran = json.loads((run / "run.json").read_text("utf-8"))["versions"]
        check_kernel(ran, self.versions())
        print(f"all six notebooks: {time.perf_counter() - began:.0f} s", flush=True)


def check_kernel(ran: Mapping[str, str], installed: Mapping[str, str]) -> None:
    """See that the notebooks' kernel had the packages that are `installed`.

    Raises:
        Failed: it had others, as it does when Jupyter finds the kernel of another
            environment.
    """
    for name, version in ran.items():
        if name != "python" and installed.get(normalised(name)) != version:
            raise Failed(
                f"the notebooks ran with {name} {version}, not with the one in this "
                "environment: see `jupyter kernelspec list` for a python3 of your own"
            )


def _alone() -> dict[str, str]:
    """This process's environment without what lets other packages in."""
    lets_in = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
    kept = {name: value for name, value in os.environ.items() if name not in lets_in}
    return kept | {"PYTHONNOUSERSITE": "1"}


def show(title: str, differ: Mapping[str, str] | Sequence[str]) -> None:
    """Print a titled list of changes or lines; `none` where there are none."""
    lines = differ
    if isinstance(differ, Mapping):
        lines = [f"{name:24} {change}" for name, change in differ.items()]
    print(f"{title}: {len(lines) or 'none'}")
    for line in lines:
        print(f"  {line}", flush=True)
