"""Where a run's adapters lie and what made them: files only, nothing is loaded here."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from utils.config import POCKET, Settings, display_path, resolve

ADAPTERS = ("first_aid", "finetome")
ADAPTER_INFO = "adapter_info.json"


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
    number = {
        "first_aid": "02_fine_tune_on_first_aid",
        "finetome": "03_fine_tune_on_finetome",
    }
    raise FileNotFoundError(
        f"no adapter {name!r} in {display_path(own)}. Run "
        f"notebooks/{number[name]}.ipynb first; it makes one."
    )


def read_adapter_info(path: Path) -> dict:
    """What made an adapter: data fingerprint, base, steps, seed, hardware."""
    file = path / ADAPTER_INFO
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}
