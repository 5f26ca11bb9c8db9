"""Does it still work on Colab, and with whatever is newest? Asked without Colab.

    python -m utils.colab_check             Colab's versions, then the set-up cell's own
    python -m utils.colab_check --newest    the newest that requirements.txt admits

Either makes an environment from the interpreter that runs it and walks all six
notebooks in it on the pocket profile: `make colab-check PYTHON=python3.13`.
"""

import argparse
import re
import sys
import time
from collections.abc import Mapping, Sequence

from utils import colab
from utils.colab_versions import VERSIONS, python_of
from utils.config import OLDEST_PYTHON, ROOT
from utils.environments import (
    Environment,
    Failed,
    changes,
    normalised,
    numbers,
    read_versions,
    show,
)

CONSTRAINTS = ROOT / "constraints.txt"
# The set-up cell's install, in a process that takes itself for Colab's. What it has
# installed can be imported in that very process: no restart.
SET_UP = """
import sys, types
sys.modules["google.colab"] = types.ModuleType("google.colab")
from utils import colab
colab.set_up()
import trl
"""


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
    may_move = {normalised(name) for name in (*named, *colab.MAY_MOVE)}
    for name, change in changes(before, after).items():
        if name in before and name not in after:
            if name != "torchao":
                wrong.append(f"{name} is {change}: only torchao may be removed.")
        elif name in before and name not in may_move:
            wrong.append(
                f"{name} moved ({change}), and the set-up cell never named it."
            )
    if "torchao" in after and numbers(after["torchao"]) < (0, 16):
        wrong.append(f"torchao {after['torchao']} is still there: PEFT fails with it.")
    for line in sorted(set(conflicts_after) - set(conflicts_before)):
        wrong.append(f"a new conflict: {line}")
    return wrong


def named_in(said: str) -> list[str]:
    """The packages that the set-up cell said it installs."""
    return [
        re.match(r"[\w.-]+", requirement)[0]
        for line in said.splitlines()
        if line.startswith("installing: ")
        for requirement in line.removeprefix("installing: ").split(", ")
    ]


def nearest(wanted: str, available: Sequence[str], least: str = "0") -> str | None:
    """The one of `available` next to `wanted`: below it if there is one, else above.

    Args:
        least: what requirements.txt admits at the least.
    """
    admitted = [v for v in available if numbers(v) >= numbers(least)]
    below = [v for v in admitted if numbers(v) <= numbers(wanted)]
    if below:
        return max(below, key=numbers)
    return min(admitted, key=numbers, default=None)


def no_wheel_for(said: str) -> str | None:
    """The name of what pip said it has no distribution of, None if it said no such."""
    found = re.search(r"No matching distribution found for ([\w.-]+)==", said)
    return normalised(found[1]) if found else None


def install_versions(environment: Environment, wanted: Mapping[str, str]) -> list[str]:
    """Install `wanted` without regard to what needs what: that is how Colab has it.

    Only wheels. Of what has none for this interpreter the nearest version is taken that
    requirements.txt admits, or none at all.

    Returns:
        What was taken instead, a line each.

    Raises:
        Failed: pip could not install them for another reason.
    """
    least = dict(line.split(">=") for line in colab.requirements() if ">=" in line)
    least = {normalised(name): version for name, version in least.items()}
    wanted, instead = dict(wanted), []
    while True:
        pins = [f"{name}=={version}" for name, version in wanted.items()]
        try:
            environment.install("--no-deps", "--only-binary=:all:", *pins)
            return instead
        except Failed as failed:
            name = no_wheel_for(str(failed))
            if name not in wanted:
                raise
        version = wanted.pop(name)
        near = nearest(version, environment.available(name), least.get(name, "0"))
        if near:
            wanted[name] = near
        instead.append(f"{name} {version}: {near or 'left out, there is no other'}")


def torch_build(versions: Mapping[str, str]) -> str:
    """Which build of torch is among `versions`: only CUDA's comes with cuBLAS."""
    if any(name.startswith("nvidia-cublas") for name in versions):
        return "torch is a CUDA build, which runs without a GPU as well"
    return "torch is a CPU build"


def check_colab(environment: Environment, torch: str) -> None:
    """Colab's versions, the set-up cell on top, and the six notebooks.

    Raises:
        Failed: something is not as it should be.
    """
    wanted = read_versions(VERSIONS)
    about = VERSIONS.read_text("utf-8").partition("\n")[0].strip("# ")
    print(about)
    if python_of(about) != "{}.{}".format(*sys.version_info):
        print(f"this is another Python: PYTHON=python{python_of(about)} gives Colab's")
    print(f"installing {len(wanted)} packages as on Colab, and torch {torch}")
    instead = install_versions(environment, wanted)
    show("without a wheel for this Python, and what is taken instead", instead)
    # Whatever torch needs that is there already stays as it is.
    pins = [f"{name}=={version}" for name, version in environment.versions().items()]
    held = environment.folder / "held.txt"
    held.write_text("\n".join(pins).replace("setuptools==", "# "), encoding="utf-8")
    environment.install("--constraint", str(held), f"torch=={torch}")

    before, conflicts = environment.versions(), environment.conflicts()
    print(torch_build(before))
    show("conflicts before the set-up cell, which are Colab's own", conflicts)
    began = time.perf_counter()
    said = environment.run("-c", SET_UP)
    print(said.strip())
    print(f"the set-up cell: {time.perf_counter() - began:.0f} s", flush=True)
    after = environment.versions()
    show("changed by the set-up cell", changes(before, after))
    wrong = judge(before, after, named_in(said), conflicts, environment.conflicts())
    again = environment.run("-c", SET_UP)
    if named_in(again) or changes(after, environment.versions()):
        wrong.append(f"run a second time it installs again: {again.strip()}")
    if wrong:
        raise Failed("\n".join(wrong))
    environment.walk()


def check_newest(environment: Environment, torch: str | None) -> None:
    """The newest releases that requirements.txt admits, and the six notebooks.

    Raises:
        Failed: something is not as it should be.
    """
    environment.install("--upgrade", "pip")
    pin = (f"torch=={torch}",) if torch else ()
    print(f"installing the newest of requirements.txt, torch {torch or 'too'}")
    environment.install(*pin, "--requirement", str(ROOT / "requirements.txt"))
    found, tested = environment.versions(), read_versions(CONSTRAINTS)
    print(torch_build(found))
    # Without the build: torch 2.13.0+cpu is the release 2.13.0.
    shared = {name: found[name].split("+")[0] for name in found if name in tested}
    differ = changes({name: tested[name] for name in shared}, shared)
    show(f"of {len(shared)} packages, other than in constraints.txt", differ)
    show("new beside constraints.txt", sorted(found.keys() - tested.keys()))
    if conflicts := environment.conflicts():
        raise Failed("\n".join(f"a conflict: {line}" for line in conflicts))
    environment.walk()


def main(arguments: Sequence[str] | None = None) -> None:
    """Check from the command line; exit code 1 with a sentence on what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.colab_check",
        description="Walk the notebooks with Colab's versions, or with the newest.",
    )
    parser.add_argument(
        "--newest", action="store_true", help="the newest releases instead"
    )
    parser.add_argument(
        "--torch",
        metavar="VERSION",
        help="which torch (constraints.txt's for Colab, else the newest): "
        "PyPI's newest for Linux brings gigabytes of CUDA",
    )
    options = parser.parse_args(arguments)
    name = "newest" if options.newest else "colab"
    began = time.perf_counter()
    try:
        if sys.version_info < OLDEST_PYTHON:
            raise Failed("this Python is too old: give PYTHON=python3.11 or newer.")
        environment = Environment(ROOT / f".venv-{name}")
        if options.newest:
            check_newest(environment, options.torch)
        else:
            torch = options.torch or read_versions(CONSTRAINTS)["torch"]
            check_colab(environment, torch)
    except (Failed, OSError, ValueError) as error:
        sys.exit(f"make {name}-check: {error}")
    print(f"make {name}-check: all well in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
