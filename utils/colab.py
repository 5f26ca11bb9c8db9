"""Sets the project up on Colab; the standard library only, since nothing is there yet.

The set-up cell of every notebook fetches the project and calls `set_up`. Elsewhere
nothing is installed: `make` or conda have done that.

    python -m utils.colab --address owner/name    stamp the repository's address
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

REPOSITORY = "OWNER/llama-first-aid"  # `make address REPO=owner/name` sets it
ROOT = Path(__file__).resolve().parents[1]
DRIVE = Path("/content/drive")  # Colab's own place for it
# TRL 1.x needs newer ones than Colab has; everything else that is there stays.
MAY_MOVE = {"datasets", "pyarrow", "fsspec"}
NOT_ON_COLAB = {"jupyter"}  # Colab is the Jupyter; another one only gets in its way
STAMPED = ("*.md", "notebooks/*.ipynb", "utils/colab.py")


def set_up() -> None:
    """On Colab install what is missing there, elsewhere do nothing; safe to run twice.

    Raises:
        SystemExit: pip failed; the sentence says what to do.
    """
    if "google.colab" not in sys.modules:
        return
    print(runtime())
    missing = missing_requirements()
    if missing:
        print("installing:", ", ".join(missing))
        with tempfile.NamedTemporaryFile("w", suffix=".txt", delete=False) as file:
            file.write("\n".join(installed_constraints()))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "-c", file.name]
        if subprocess.run([*pip, *missing]).returncode:
            sys.exit(
                "The installation failed; pip's message above says why. Runtime > "
                "Restart session, then run this cell again."
            )
    remove_old_torchao()
    print("set up: " + ("installed" if missing else "everything was there already"))


def runs_folder(use_drive: bool) -> Path:
    """Where runs are kept: in the project, or on Google Drive, which stays.

    Args:
        use_drive: on Colab, mount the reader's Drive (it asks) and keep runs there, so
            that a disconnected runtime loses nothing.

    Raises:
        RuntimeError: there is no Drive here.
    """
    if not use_drive:
        return ROOT / "data" / "runs"
    if "google.colab" not in sys.modules:
        raise RuntimeError(
            "USE_DRIVE works on Colab only; elsewhere RUN_DIR names a folder that stays"
        )
    from google.colab import drive

    drive.mount(str(DRIVE))
    return DRIVE / "MyDrive" / "llama-first-aid" / "runs"


def runtime() -> str:
    """One sentence on the hardware that this runtime has."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True)
        if found.returncode == 0 and found.stdout.strip():
            return f"GPU: {found.stdout.strip().splitlines()[0]}"
    return (
        "no GPU: Runtime > Change runtime type > T4 GPU switches one on; without one "
        "the notebooks go on with the pocket profile"
    )


def requirements() -> list[str]:
    """The lines of requirements.txt without their comments."""
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    return [bare for line in lines if (bare := line.split("#")[0].strip())]


def missing_requirements() -> list[str]:
    """The requirements that no installed package meets."""
    missing = []
    for requirement in requirements():
        name, least = re.match(r"([\w.-]+)(?:\s*>=\s*([\d.]+))?", requirement).groups()
        if name.lower() in NOT_ON_COLAB:
            continue
        try:
            have = version(name)
        except PackageNotFoundError:
            missing.append(requirement)
            continue
        if least and _numbers(have) < _numbers(least):
            missing.append(requirement)
    return missing


def installed_constraints() -> list[str]:
    """Everything installed at its very version, so that pip moves none of it.

    Where a package is there twice (Debian's copy under Colab's), the first one counts:
    two constraints that contradict each other make pip give up.
    """
    first: dict[str, str] = {}
    for found in distributions():
        if found.name and found.name.lower() not in MAY_MOVE:
            name = re.sub(r"[-_.]+", "-", found.name).lower()
            first.setdefault(name, f"{found.name}=={found.version}")
    return sorted(first.values())


def remove_old_torchao() -> None:
    """PEFT refuses to make any LoRA while a torchao older than 0.16 is installed."""
    try:
        have = version("torchao")
    except PackageNotFoundError:
        return
    if _numbers(have) < (0, 16):
        print(f"removing torchao {have}: PEFT fails with versions before 0.16")
        subprocess.run(
            [sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", "torchao"],
            check=True,
        )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def stamp_address(repository: str) -> list[str]:
    """Write the repository's address wherever it stands; returns the changed files.

    Raises:
        ValueError: not of the form owner/name.
    """
    if not re.fullmatch(r"\w[\w-]*/[\w.-]*\w", repository, re.ASCII):
        raise ValueError(f"REPO={repository!r}: give it as owner/name")
    changed = []
    for pattern in STAMPED:
        for path in sorted(ROOT.glob(pattern)):
            text = path.read_text("utf-8")
            stamped = text.replace(REPOSITORY, repository)
            if stamped != text:
                path.write_text(stamped, encoding="utf-8")
                changed.append(path.relative_to(ROOT).as_posix())
    return changed


def main(arguments: Sequence[str] | None = None) -> None:
    """Stamp the address from the command line."""
    parser = argparse.ArgumentParser(prog="python -m utils.colab", description=__doc__)
    parser.add_argument("--address", required=True, metavar="OWNER/NAME")
    try:
        changed = stamp_address(parser.parse_args(arguments).address)
    except ValueError as error:
        sys.exit(f"make address: {error}")
    print(f"changed: {', '.join(changed) or 'nothing'}")


if __name__ == "__main__":
    main()
