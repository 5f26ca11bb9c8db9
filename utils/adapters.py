"""Where adapters lie, in the run, on the Hub or shipped, and what made them.

Files only, nothing is loaded here. Adapters made elsewhere are fetched as safetensors
only.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import snapshot_download

from utils.config import (
    POCKET,
    PROFILES,
    RUNS,
    Settings,
    display_path,
    is_local,
    load_chat_settings,
    load_settings,
    resolve,
)
from utils.remote import HTTP_ERRORS
from utils.results import ADAPTER_LOG

ADAPTERS = ("first_aid", "finetome")
ADAPTER_INFO = "adapter_info.json"
NEEDED = ("adapter_config.json", "adapter_model.safetensors")
FETCHED = (*NEEDED, ADAPTER_INFO, ADAPTER_LOG)
OF_ANOTHER_RUN = (
    *("PROFILE", "BASE_MODEL", "FIRST_AID_DATASET", "FINETOME_DATASET", "RUN_DIR"),
    *("LOAD_IN_4BIT", "QUICK"),
)
MAKERS = {
    "first_aid": "notebooks/02_fine_tune_on_first_aid.ipynb",
    "finetome": "notebooks/03_fine_tune_on_finetome.ipynb",
}


def weights_fingerprint(folder: Path) -> str:
    """A hash of the safetensors in a model's folder, as adapters note their base's."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


def adapter_dir(settings: Settings, name: str) -> Path:
    """Where the run keeps the adapter `name`."""
    return settings.run_dir / "adapters" / name


@dataclass(frozen=True)
class AdapterSource:
    """An adapter's folder and a sentence on where it comes from."""

    path: Path
    origin: str


def find_adapter(settings: Settings, name: str) -> AdapterSource:
    """The run's own adapter, or the one shipped with the pocket Llama.

    Raises:
        FileNotFoundError: there is neither; the message names the notebook to run.
    """
    own = adapter_dir(settings, name)
    if (own / "adapter_model.safetensors").is_file():
        return AdapterSource(own, f"this run's, {display_path(own)}")
    shipped = POCKET / "adapters" / name
    if resolve(settings.base_model) == POCKET and shipped.is_dir():
        return AdapterSource(
            shipped,
            f"shipped in {display_path(shipped)}, because this run has none yet",
        )
    raise FileNotFoundError(
        f"no adapter {name!r} in {display_path(own)}. Run {MAKERS[name]} first; it "
        "makes one."
    )


def read_adapter_info(path: Path) -> dict:
    """What made an adapter: data fingerprint, base, steps, seed, hardware."""
    file = path / ADAPTER_INFO
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def has_adapters(settings: Settings) -> bool:
    """Whether both adapters are here, the run's own or shipped ones."""
    try:
        for name in ADAPTERS:
            find_adapter(settings, name)
    except FileNotFoundError:
        return False
    return True


def settings_with_adapters(
    settings: Settings, runs: Path = RUNS, environ: Mapping[str, str] = os.environ
) -> Settings:
    """The settings to look at adapters with, whichever notebook was opened first.

    The run's own adapters, in the project or on Drive, come first; then those that
    `FIRST_AID_ADAPTER` and `FINETOME_ADAPTER` name, which are for the 1 B unless
    `PROFILE` or `BASE_MODEL` says otherwise; then, for the pocket Llama, the shipped
    ones. If there are none for this base, it is the pocket profile instead, and a
    printed sentence says so and which notebook makes the real ones.

    Args:
        settings: of the run that was asked for.
        runs: folder in which each run has its own.
        environ: where the variables are looked up.

    Raises:
        OSError, ValueError: as `with_adapters`; a named adapter is never left out.
    """
    own = [adapter_dir(settings, name) / NEEDED[1] for name in ADAPTERS]
    if all(file.is_file() for file in own):
        return settings
    if named := load_chat_settings(environ).adapters:
        print(f"adapters: those named, {' and '.join(named.values())}")
        on_pocket = settings.base_model == PROFILES["pocket"].base_model
        if on_pocket and not environ.get("PROFILE", "").strip():
            print(
                "They are taken to be for profile llama_1b, which is slow without a "
                "GPU; PROFILE=pocket if they are for the pocket Llama."
            )
            settings = load_settings({**environ, "PROFILE": "llama_1b"}, runs)
        return with_adapters(settings, named, runs)
    if has_adapters(settings):
        return settings
    missing = [MAKERS[n] for n, file in zip(ADAPTERS, own) if not file.is_file()]
    print(
        f"No adapters for {settings.base_model} in {display_path(settings.run_dir)}: "
        f"{' and '.join(missing)} would make them. Going on with the pocket profile, "
        "a much smaller Llama and the adapters that are shipped with it."
    )
    rest = {key: value for key, value in environ.items() if key not in OF_ANOTHER_RUN}
    return load_settings({**rest, "PROFILE": "pocket"}, runs)


def with_adapters(
    settings: Settings, named: Mapping[str, str], runs: Path = RUNS
) -> Settings:
    """`settings` of a run folder of its own that holds the adapters `named`.

    Only the configuration, safetensors and our own records are taken; a `.bin` is never
    read.

    Args:
        settings: of the run; its base is kept.
        named: by adapter, a folder or the name of a Hub repository.
        runs: folder for the new run folder.

    Raises:
        OSError: one is not there, or the Hub is out of reach.
        ValueError: one holds no safetensors.
    """
    mark = hashlib.sha256(repr(sorted(named.items())).encode()).hexdigest()[:10]
    run_dir = runs / f"{settings.profile}-named-{mark}"
    settings = replace(settings, run_dir=run_dir, figures_dir=run_dir / "imgs")
    for name, source in named.items():
        target = adapter_dir(settings, name)
        target.mkdir(parents=True, exist_ok=True)
        folder = resolve(source) if is_local(source) else _fetch(name, source)
        for file in FETCHED:
            if (folder / file).is_file():
                shutil.copyfile(folder / file, target / file)
            elif file in NEEDED:
                raise ValueError(
                    f"{name.upper()}_ADAPTER={source}: there is no {file} in it. "
                    "Name a folder or Hub repository with a LoRA adapter that PEFT "
                    "saved as safetensors; pickles (.bin) are refused."
                )
    return settings


def _fetch(name: str, source: str) -> Path:
    try:
        return Path(snapshot_download(source, allow_patterns=list(FETCHED)))
    except (*HTTP_ERRORS, OSError, ValueError) as error:
        raise OSError(
            f"{name.upper()}_ADAPTER={source} cannot be fetched from the Hub "
            f"({type(error).__name__}). Check its spelling and the network; a private "
            "repository needs HF_TOKEN."
        ) from error
