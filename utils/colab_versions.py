"""What Colab has installed of everything that our requirements' tree touches.

    python3.13 -m utils.colab_versions FREEZE

Takes Colab's whole list (`pip freeze` there, or the one that the Colab team publishes),
asks pip what our requirements need beside it, and writes what is in both to
`data/colab/versions.txt`, which `make colab-check` installs. FREEZE's first line is a
comment with its date and source, and with Colab's Python: `# Colab GPU runtime, August
2026, Python 3.13.15 (...)`.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils import colab
from utils.config import DATA, ROOT, display_path
from utils.environments import PIN, Failed, normalised, read_versions

VERSIONS = DATA / "colab" / "versions.txt"
# Colab's torch is a CUDA build for its own drivers. `make colab-check` takes the one
# that we tested with instead, and what goes with a torch comes with that one.
TORCHS_OWN = re.compile(r"torch|triton|setuptools|(nvidia|cuda)-.*")
# Nothing of ours needs these, but the set-up cell runs the one and removes the other.
BESIDES = ("pip", "torchao")


def read_freeze(text: str) -> tuple[str, dict[str, str], list[str]]:
    """Colab's list: what its first line says, versions by normalised name, other lines.

    Raises:
        ValueError: the first line does not say where it comes from and which Python.
    """
    first, *lines = text.splitlines() or [""]
    if not re.match(r"# .*Python 3\.\d+", first):
        raise ValueError(
            "the first line of the list must name its date, source and Python: "
            "`# Colab GPU runtime, August 2026, Python 3.13.15 (...)`"
        )
    pins, others = {}, []
    for line in (line.strip() for line in lines):
        if pin := PIN.fullmatch(line):
            pins[normalised(pin[1])] = pin[2]
        elif line and not line.startswith("#"):
            others.append(line)
    return first.removeprefix("# "), pins, others


def python_of(about: str) -> str:
    """Major and minor version of the Python that the first line of a list names."""
    return re.search(r"Python (3\.\d+)", about)[1]


def held(freeze: Mapping[str, str]) -> list[str]:
    """What pip may not choose anew beside Colab's list, as constraints."""
    return [
        f"{name}=={version}"
        for name, version in freeze.items()
        if name not in colab.MAY_MOVE and not TORCHS_OWN.fullmatch(name)
    ]


def resolve(freeze: Mapping[str, str], torch: str) -> set[str]:
    """The names of all that our requirements need beside Colab's versions.

    The requirements are those that Colab must meet, and pip resolves them for this very
    interpreter, without installing any.

    Raises:
        Failed: pip finds no way; the message ends with its reason.
    """
    lines = [
        line
        for line in colab.requirements()
        if normalised(re.match(r"[\w.-]+", line)[0]) not in colab.NOT_ON_COLAB
    ]
    with tempfile.TemporaryDirectory() as folder:
        constraints, report = Path(folder, "constraints.txt"), Path(folder, "report")
        constraints.write_text("\n".join(held(freeze)), encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
        pip += ["--ignore-installed", "--report", str(report), "-c", str(constraints)]
        done = subprocess.run(
            [*pip, *lines, f"torch=={torch}"], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-9:]
            raise Failed("\n".join(["pip cannot resolve our requirements:", *reason]))
        return names_in(json.loads(report.read_text("utf-8")))


def names_in(report: Mapping) -> set[str]:
    """The normalised names of what pip's report says it would install."""
    return {normalised(item["metadata"]["name"]) for item in report["install"]}


def select(freeze: Mapping[str, str], tree: set[str]) -> tuple[dict[str, str], list]:
    """Colab's versions of what is in `tree`, and the names there that Colab lacks."""
    ours = {name for name in tree if not TORCHS_OWN.fullmatch(name)} | {*BESIDES}
    kept = {name: freeze[name] for name in sorted(ours) if name in freeze}
    return kept, sorted(ours - kept.keys())


def render(about: str, kept: Mapping[str, str], lacking: Sequence[str]) -> str:
    """The text of `data/colab/versions.txt`."""
    lines = [
        f"# {about}",
        "# What of it our requirements' tree touches; python -m utils.colab_versions.",
        "# Not here: torch and what comes with it (triton, CUDA, setuptools), in whose",
        "# place make colab-check puts the torch of constraints.txt.",
        f"# Colab has none of: {', '.join(lacking)}",
    ]
    lines += [f"{name}=={version}" for name, version in kept.items()]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the versions from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.colab_versions",
        description="Keep what our requirements' tree touches of Colab's packages.",
    )
    parser.add_argument("freeze", type=Path, help="Colab's list, name==version a line")
    try:
        about, freeze, others = read_freeze(
            parser.parse_args(arguments).freeze.read_text("utf-8")
        )
        if sys.version_info[:2] != tuple(map(int, python_of(about).split("."))):
            raise ValueError(
                f"this list is of Python {python_of(about)}, and what a package needs "
                f"depends on it: run this with python{python_of(about)}"
            )
        torch = read_versions(ROOT / "constraints.txt")["torch"]
        kept, lacking = select(freeze, resolve(freeze, torch))
    except (Failed, OSError, ValueError) as error:
        sys.exit(f"colab_versions: {error}")
    VERSIONS.parent.mkdir(parents=True, exist_ok=True)
    VERSIONS.write_text(render(about, kept, lacking), encoding="utf-8")
    for line in others:
        print(f"passed over, since it is no name==version: {line}")
    print(f"{display_path(VERSIONS)}: {len(kept)} of {len(freeze)} packages")


if __name__ == "__main__":
    main()
