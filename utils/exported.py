"""Bases exported for OpenVINO: where they lie, whose they are, what they cost.

Reads only; `utils.export` makes them. A Space that answers with one needs no more.
"""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

from utils import results
from utils.adapters import weights_fingerprint
from utils.config import (
    DATA,
    MODELS,
    RUNS,
    Settings,
    display_path,
    is_local,
    resolve,
)
from utils.remote import HTTP_ERRORS

EXPORTS = RUNS / "exports"
RECORD = "export.json"  # written last: an export without it is half of one
NEEDED = (
    *("openvino_model.xml", "openvino_model.bin", "config.json"),
    *("openvino_tokenizer.xml", "openvino_detokenizer.xml"),
)
FORMATS = {
    "int4": ("--sym", "--group-size", "128", "--ratio", "1.0"),
    "int8": (),
    "fp16": (),
    "fp32": (),
}


@dataclass(frozen=True)
class Export:
    """An exported base that is complete, and what made it."""

    path: Path
    weight_format: str
    base_model: str
    base_fingerprint: str
    size: int  # bytes on the disk

    def about(self) -> str:
        """A few words on it, for whoever sees its answers."""
        return f"{self.base_model} in {self.weight_format}"


def export_dir(settings: Settings, weight_format: str) -> Path:
    """Where an export of the settings' base is kept."""
    return EXPORTS / f"{Path(settings.base_model).name}-{weight_format}"


def read_export(path: Path) -> Export:
    """The export in the folder `path`.

    Raises:
        ValueError: it is none, or half of one; the sentence says what to do.
    """
    again = "`make export` makes it anew"
    missing = [name for name in (RECORD, *NEEDED) if not (path / name).is_file()]
    if missing:
        raise ValueError(
            f"{display_path(path)} is no complete export (no {missing[0]}): {again}."
        )
    try:
        record = results.read_json(path / RECORD)
        sizes = dict(record["files"])  # bytes by name
        made = Export(
            path,
            record["weight_format"],
            record["base_model"],
            record["base_fingerprint"],
            sum(sizes.values()),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{display_path(path / RECORD)} cannot be read ({error}): {again}."
        ) from error
    for name, size in sizes.items():
        file = path / name
        here = file.stat().st_size if file.is_file() else 0
        if here != size:
            raise ValueError(
                f"{display_path(file)} has {here:,} of {size:,} bytes, so the export "
                f"is half-written: {again}."
            )
    return made


def find_export(settings: Settings, named: str = "") -> Export | None:
    """The export to answer with: the one `named`, or the smallest of our own.

    Args:
        settings: of the run; its base is looked for.
        named: a folder, or a Hub repository that holds an export.

    Raises:
        OSError: the one named is not to be had.
        ValueError: it is half of one, or of another base than the settings'.
    """
    if named:
        return _of_this_base(read_export(_fetch_export(named)), settings)
    for weight_format in FORMATS:
        folder = export_dir(settings, weight_format)
        if folder.is_dir():
            return _of_this_base(read_export(folder), settings)
    return None


def cost_file(profile: str) -> Path:
    """Where `utils.engine_cost` records what fewer bits cost on a profile."""
    return DATA / "results" / profile / "engine.json"


def cost_rows(settings: Settings) -> list[dict]:
    """What fewer bits cost, a row a format and model, for a table.

    Returns:
        No row where nothing is recorded, or something of another base; a printed
        sentence then says how to measure it.
    """
    file = cost_file(settings.profile)
    record = results.read_json(file) if file.is_file() else {}
    known = record.get("base_model", ""), record.get("base_fingerprint", "")
    if not is_of(settings, *known):
        what = "another base" if record else "nothing yet"
        print(
            f"note: {display_path(file)} holds {what}; `python -m utils.engine_cost` "
            "measures what 8 and 4 bits cost"
        )
        return []
    return [
        {
            "weights": name,
            "MB": round(cell["bytes"] / 1e6, 1),
            "model": MODELS[key].label,
            "perplexity": round(scores["perplexity"], 2),
            "ROUGE-L": round(scores["rougeL_f1"], 4),
            "same answers": f"{scores['same_answers']} of {record['n']}",
        }
        for name, cell in record["formats"].items()
        for key, scores in cell["models"].items()
    ]


def _fetch_export(named: str) -> Path:
    if is_local(named):
        return resolve(named)
    try:
        return Path(snapshot_download(named))
    except (*HTTP_ERRORS, OSError, ValueError) as error:
        raise OSError(
            f"ENGINE_MODEL={named} cannot be fetched from the Hub "
            f"({type(error).__name__}). Check its spelling and the network; a "
            "private repository needs HF_TOKEN."
        ) from error


def _of_this_base(made: Export, settings: Settings) -> Export:
    """`made`, unless the base it was made from is not the one that lies here now."""
    if not is_of(settings, made.base_model, made.base_fingerprint):
        raise ValueError(
            f"{display_path(made.path)} is an export of another base than "
            f"{display_base(settings)} is now: `make export` makes it anew."
        )
    return made


def is_of(settings: Settings, base_model: str, fingerprint: str) -> bool:
    """Whether a record is of the settings' base: by content, or by its name on the Hub.

    Nobody asks the Hub for a revision here: the adapters know theirs.
    """
    if is_local(settings.base_model):
        return weights_fingerprint(resolve(settings.base_model)) == fingerprint
    return settings.base_model == base_model


def display_base(settings: Settings) -> str:
    """The base's name, without the folders of anybody's machine."""
    name = settings.base_model
    return display_path(resolve(name)) if is_local(name) else name


def fetch_base(settings: Settings) -> tuple[Path, str]:
    """The folder of the settings' base, from the Hub if need be, and its fingerprint.

    Raises:
        OSError: the Hub is out of reach or has no such model.
    """
    if is_local(settings.base_model):
        folder = resolve(settings.base_model)
        return folder, weights_fingerprint(folder)
    try:
        folder = Path(
            snapshot_download(
                settings.base_model,
                allow_patterns=["*.json", "*.jinja", "*.safetensors"],
            )
        )
    except (*HTTP_ERRORS, OSError, ValueError) as error:
        raise OSError(
            f"BASE_MODEL={settings.base_model} cannot be fetched from the Hub "
            f"({type(error).__name__}). Check its spelling and the network."
        ) from error
    return folder, folder.name  # a snapshot's folder is called as its commit
