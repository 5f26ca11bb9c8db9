"""Sets the project up on Colab; the standard library only, since nothing is there yet.

The set-up cell of every notebook fetches the project and calls `set_up`. Elsewhere
nothing is installed: `make` or conda have done that.

    python -m utils.colab --address owner/name    stamp the repository's address
"""

import argparse
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import (
    PackageNotFoundError,
    distributions,
    packages_distributions,
    version,
)
from pathlib import Path

# `make address REPO=owner/name` sets it, here and in all that `STAMPED` names.
REPOSITORY = "OWNER/llama-first-aid"
ROOT = Path(__file__).resolve().parents[1]
DRIVE = Path("/content/drive")  # Colab's own place for it
ON_DRIVE = ("MyDrive", "llama-first-aid", "runs")
# TRL 1.x needs newer ones than Colab has; everything else that is there stays.
MAY_MOVE = {"datasets", "pyarrow", "fsspec"}
NOT_ON_COLAB = {"jupyter"}  # Colab is the Jupyter; another one only gets in its way
STAMPED = ("*.md", "notebooks/*.ipynb", "utils/colab.py")


def set_up() -> None:
    """On Colab install what is missing there, elsewhere do nothing; safe to run twice.

    Raises:
        SystemExit: it cannot be done; the sentence says why and what to do.
    """
    if "google.colab" not in sys.modules:
        return
    print(runtime())
    before, loaded = installed(), loaded_packages()
    missing = missing_requirements()
    if missing:
        print("installing:", ", ".join(missing))
        install(missing)
    remove_old_torchao()
    importlib.invalidate_caches()  # what has just come can be imported at once
    after = installed()
    moved = sorted(n for n in before if before[n] != after.get(n))
    for name in moved:
        if name in after:
            print(f"moved: {name} {before[name]} -> {after[name]}")
    if still := missing_requirements():
        sys.exit(
            f"Still missing after the installation: {', '.join(still)}. Runtime > "
            "Disconnect and delete runtime, then run this cell again."
        )
    if stale := loaded.intersection(moved):
        sys.exit(
            f"Python had loaded {' and '.join(sorted(stale))} before this cell changed "
            "it: Runtime > Restart session, then run this cell first."
        )
    print("token:", use_secret())
    print("set up: " + ("installed" if missing else "everything was there already"))


def install(missing: Sequence[str]) -> None:
    """Install what is `missing` with pip, and let everything that is there stay.

    Raises:
        SystemExit: pip failed; the sentence gives its reason.
    """
    try:
        with tempfile.NamedTemporaryFile("w", suffix=".txt", delete=False) as file:
            file.write("\n".join(installed_constraints()))
    except OSError as error:
        sys.exit(_failed(missing, f"OSError: {error}"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "-c", file.name]
    done = subprocess.run([*pip, *missing], capture_output=True, text=True)
    Path(file.name).unlink()
    if done.returncode:
        sys.exit(_failed(missing, done.stderr))


def _failed(missing: Sequence[str], said: str) -> str:
    """One sentence on why nothing was installed, from what pip has said."""
    if "No space left" in said:
        return (
            "The disk is full, so nothing more can be installed: delete files, or "
            "Runtime > Disconnect and delete runtime, then run this cell again."
        )
    if re.search(r"NewConnection|NameResolution|Max retries|[Tt]imed? ?out", said):
        return (
            "There is no network, so nothing can be installed: check the connection, "
            "then run this cell again."
        )
    if in_use := sorted(MAY_MOVE & sys.modules.keys()):
        return (
            f"{' or '.join(in_use)} may be needed in another version than the one that "
            "Python has loaded: Runtime > Restart session, then run this cell first."
        )
    reasons = [line for line in said.splitlines() if line.startswith("ERROR")]
    reason = reasons[-1] if reasons else "no reason given"
    return (
        f"pip could not install {', '.join(missing)} ({reason}): "
        "Runtime > Disconnect and delete runtime, then run this cell again; if that "
        "does not help, please open an issue with this sentence."
    )


def use_secret() -> str:
    """Let Colab's secret `HF_TOKEN` win over the environment's; says which there is.

    The libraries read the environment. The token itself is never printed.
    """
    try:
        from google.colab import userdata

        if secret := userdata.get("HF_TOKEN").strip():
            os.environ["HF_TOKEN"] = secret
            return "Colab's secret HF_TOKEN"
    except ImportError:
        pass  # another notebook service that carries Colab's name
    except Exception as error:  # noqa: BLE001 - Colab's errors share no public class
        kind = type(error).__name__
        if kind == "NotebookAccessError":
            print(
                "Colab keeps a secret HF_TOKEN that this notebook may not see: the key "
                "at the left gives it access; it is needed for what is not public only"
            )
        elif kind != "SecretNotFoundError":
            print(f"Colab's secrets do not answer ({kind}): going on without them")
    if os.environ.get("HF_TOKEN", "").strip():
        return "HF_TOKEN of the environment"
    return "none, and none is needed: all defaults are open to everyone"


def runs_folder(use_drive: bool) -> Path:
    """Where runs are kept: in the project, or on Google Drive, which stays.

    Args:
        use_drive: on Colab, mount the reader's Drive (it asks) and keep runs there, so
            that a disconnected runtime loses nothing.

    Raises:
        RuntimeError: there is no Drive here, or it was not mounted.
    """
    if not use_drive:
        return ROOT / "data" / "runs"
    if "google.colab" not in sys.modules:
        raise RuntimeError(
            "USE_DRIVE works on Colab only; elsewhere RUN_DIR names a folder that stays"
        )
    from google.colab import drive

    try:
        drive.mount(str(DRIVE))
    except Exception as error:  # noqa: BLE001 - Colab's errors share no public class
        raise RuntimeError(
            f"Your Drive was not mounted ({error}): run this cell again and allow it, "
            "or set USE_DRIVE = False"
        ) from error
    print(f"runs are kept on your Drive, in {'/'.join(ON_DRIVE)}")
    return DRIVE.joinpath(*ON_DRIVE)


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


def installed() -> dict[str, str]:
    """The version of every installed package, by its normalised name.

    Where a package is there twice (Debian's copy under Colab's), the first one counts.
    """
    first: dict[str, str] = {}
    for found in distributions():
        if found.name:
            first.setdefault(_normalised(found.name), found.version)
    return first


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def loaded_packages() -> set[str]:
    """The normalised names of the packages of which Python has loaded a module."""
    return {
        _normalised(package)
        for module, packages in packages_distributions().items()
        if module in sys.modules
        for package in packages
    }


def installed_constraints() -> list[str]:
    """What pip may not move, at its very version: all but `MAY_MOVE`.

    Of those, too, whatever is imported already: another version of it on the disk would
    not fit the one in memory.
    """
    free = MAY_MOVE - sys.modules.keys()
    return [f"{n}=={v}" for n, v in sorted(installed().items()) if n not in free]


def remove_old_torchao() -> None:
    """PEFT refuses to make any LoRA while a torchao older than 0.16 is installed.

    Raises:
        SystemExit: pip cannot remove it; the sentence gives its reason.
    """
    try:
        have = version("torchao")
    except PackageNotFoundError:
        return
    if _numbers(have) < (0, 16):
        print(f"removing torchao {have}: PEFT fails with versions before 0.16")
        pip = [sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", "torchao"]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            sys.exit(
                f"torchao {have} could not be removed, and PEFT fails with it "
                f"({reason}): Runtime > Disconnect and delete runtime, then run this "
                "cell again."
            )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def stamp_address(repository: str) -> list[str]:
    """Write the repository's address wherever it stands; returns the changed files.

    It stands in addresses of GitHub and Colab, in quotes and in backticks. The same
    letters elsewhere, in a picture's base64 for one, are something else.

    Raises:
        ValueError: not of the form owner/name.
    """
    if not re.fullmatch(r"\w[\w-]*/[\w.-]*\w", repository, re.ASCII):
        raise ValueError(f"REPO={repository!r}: give it as owner/name")
    address = re.compile(rf'(github(?:\.com)?/|["`]){re.escape(REPOSITORY)}(?![\w-])')
    changed = []
    for pattern in STAMPED:
        for path in sorted(ROOT.glob(pattern)):
            text = path.read_text("utf-8")
            stamped = address.sub(rf"\g<1>{repository}", text)
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
