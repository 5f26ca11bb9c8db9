"""What Colab has installed of everything that our requirements touch.

    python -m utils.colab_versions FREEZE

Takes Colab's own list (`pip freeze` there, or `pip-freeze.gpu.txt` that the Colab team
publishes), keeps what the requirements of this environment need directly or through
others, and writes it to `data/colab/versions.txt`, which `make colab-check` installs.
Once more with the Python that it has made, and what Colab's older versions need is in.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from utils import colab
from utils.colab_check import VERSIONS, read_versions
from utils.config import display_path

# Not ours, but Colab's torchao is what the set-up cell has to take out.
BESIDES = ("torchao",)


def tree(names: Iterable[str]) -> set[str]:
    """All distributions that `names` need here, themselves included.

    Args:
        names: of requirements; an extra in brackets is followed.

    Returns:
        Normalised names, of which some may not be installed.
    """
    found: set[str] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found and not requirement.extras:
            continue
        found.add(name)
        try:
            needed = [Requirement(line) for line in requires(name) or ()]
        except PackageNotFoundError:
            continue
        for other in needed:
            extras = {"", *requirement.extras}
            wanted = other.marker is None or any(
                other.marker.evaluate({"extra": extra}) for extra in extras
            )
            if wanted and canonicalize_name(other.name) not in found:
                waiting.append(other)
    return found


def select(freeze: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """The versions in `freeze` of all that `names` need; the rest Colab has not."""
    wanted = tree(names) | {canonicalize_name(name) for name in BESIDES}
    return {name: freeze[name] for name in sorted(wanted) if name in freeze}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the versions from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.colab_versions",
        description="Keep what our requirements touch of Colab's list of packages.",
    )
    parser.add_argument("freeze", type=Path, help="Colab's list, name==version a line")
    parser.add_argument(
        "--about", default="", help="its date and source, for the first line"
    )
    options = parser.parse_args(arguments)
    try:
        freeze = read_versions(options.freeze)
    except (OSError, ValueError) as error:
        sys.exit(f"colab_versions: {error}")
    listed = read_versions(VERSIONS) if VERSIONS.is_file() else {}
    kept = select(freeze, [*colab.requirements(), *listed])
    lines = [f"# {options.about}".rstrip(), "# What of it our requirements touch."]
    lines += [f"{name}=={version}" for name, version in kept.items()]
    VERSIONS.parent.mkdir(parents=True, exist_ok=True)
    VERSIONS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{display_path(VERSIONS)}: {len(kept)} of {len(freeze)} packages")


if __name__ == "__main__":
    main()
