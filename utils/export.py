"""Turns a base into what OpenVINO runs fast on a CPU: `make export`.

    python -m utils.export [--format int4|int8|fp16|fp32]

optimum-intel does it, in an environment of its own (`.venv-export`), because it holds
Transformers back. An export stands aside until it has answered a question; only then
does it replace an older one. Adapters stay LoRA files beside the base.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

from utils import results
from utils.adapters import weights_fingerprint
from utils.config import (
    DATA,
    MODELS,
    ROOT,
    RUNS,
    Settings,
    display_path,
    is_local,
    load_chat_settings,
    load_settings,
    resolve,
)
from utils.remote import HTTP_ERRORS

EXPORTS = RUNS / "exports"
ENVIRONMENT = ROOT / ".venv-export"
PROGRAMS = "Scripts" if os.name == "nt" else "bin"
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
DEFAULT = "int4"
LOOK_S = 5  # how often a line says that it still goes on
PACKAGES = ("optimum-intel", "nncf", "openvino", "openvino-genai", "transformers")
ASKED_TOKENS = 8
# Run in the export's own environment: some tokens, and what made them, as JSON.
ANSWER = """
import json, sys
from importlib.metadata import version
import openvino_genai
pipe = openvino_genai.LLMPipeline(sys.argv[1], "CPU", ATTENTION_BACKEND="SDPA")
tokenizer = pipe.get_tokenizer()
turn = [{"role": "user", "content": "What helps against a small burn?"}]
prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True)
ids = tokenizer.encode(prompt, add_special_tokens=False)
count = int(sys.argv[2])
options = {"max_new_tokens": count, "min_new_tokens": count}
found = pipe.generate(ids, **options, do_sample=False)
said = list(found.tokens[0])
versions = {name: version(name) for name in sys.argv[3:]}
print(json.dumps([len(said), tokenizer.decode(said), versions]))
"""


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


def make_environment() -> Path:
    """Make optimum-intel's environment where it is not there yet.

    Returns:
        The folder of its programs.

    Raises:
        RuntimeError: pip failed; its last line says why.
    """
    programs, ready = ENVIRONMENT / PROGRAMS, ENVIRONMENT / ".installed"
    if ready.is_file():
        return programs
    print(f"making {display_path(ENVIRONMENT)} (once; some minutes)", flush=True)
    venv.create(ENVIRONMENT, with_pip=True, clear=True)
    pip = [str(programs / "python"), "-m", "pip"]
    with tempfile.TemporaryDirectory() as aside:
        # The torch that was tested; the rest is what optimum-intel asks for.
        pins = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        torch = Path(aside) / "torch.txt"
        torch.write_text("\n".join(pin for pin in pins if pin.startswith("torch==")))
        wanted = ["-r", str(ROOT / "requirements-export.txt"), "-c", str(torch)]
        _run([*pip, "install", "--quiet", *wanted], "installing optimum-intel")
    # optimum-intel asks for it for models that see; where torch is a CPU build and it
    # is not, importing Transformers fails on it.
    _run([*pip, "uninstall", "--quiet", "--yes", "torchvision"], "tidying up")
    ready.touch()
    return programs


def export(settings: Settings, weight_format: str = DEFAULT) -> Export:
    """Export the settings' base, check it, and only then let it replace an older one.

    Args:
        settings: of the run; its base is exported.
        weight_format: `int4` (symmetric, groups of 128), `int8`, `fp16` or `fp32`.

    Raises:
        ValueError: no such format, or the export does not answer.
        OSError: the base is not to be had, or the disk is full.
        RuntimeError: optimum-intel failed; its last line says why.
    """
    if weight_format not in FORMATS:
        known = ", ".join(FORMATS)
        raise ValueError(f"weight format {weight_format!r}: choose one of {known}.")
    base, fingerprint = fetch_base(settings)
    programs = make_environment()
    final = export_dir(settings, weight_format)
    aside = final.with_name(f"{final.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    began = time.perf_counter()
    command = [str(programs / "optimum-cli"), "export", "openvino"]
    command += ["--model", str(base), "--task", "text-generation-with-past"]
    command += ["--weight-format", weight_format, *FORMATS[weight_format]]
    try:
        what = f"exporting {display_base(settings)} to {weight_format}"
        _run([*command, str(aside)], what)
        answer, versions = _ask(programs, aside)
        seconds = time.perf_counter() - began
        record = {
            "base_model": display_base(settings),
            "base_fingerprint": fingerprint,
            "weight_format": weight_format,
            "options": list(FORMATS[weight_format]),
            "files": {
                file.name: file.stat().st_size for file in sorted(aside.iterdir())
            },
            "seconds": round(seconds, 1),
            "versions": versions,
            "hardware": results.hardware(),
            "when": results.now(),
        }
        results.write_json(aside / RECORD, record)
        made = read_export(aside)
        _replace(aside, final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"{display_path(final)}: {made.size / 1e6:,.1f} MB in {seconds:.0f} s")
    print(f"asked about a burn, it begins: {answer!r} (a check, not medical advice)")
    return read_export(final)


def _replace(aside: Path, final: Path) -> None:
    """Put a checked export where the older one is; there is always one of the two."""
    old = final.with_name(f"{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    aside.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _run(command: Sequence[str], what: str) -> None:
    """Run `command` with a line on how long it has gone on.

    Raises:
        RuntimeError: it failed; the message holds its last line.
    """
    began = time.perf_counter()
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, env=environ
        )
        try:
            while process.poll() is None:
                seconds = time.perf_counter() - began
                print(f"\r{what}: {seconds:.0f} s …", end="", flush=True)
                try:
                    process.wait(LOOK_S)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            process.kill()
            process.wait()
        print(f"\r{what}: {time.perf_counter() - began:.0f} s  ", flush=True)
        said.seek(0)
        lines = said.read().strip().splitlines() or ["it gave no reason"]
    if process.returncode:
        raise RuntimeError(
            f"{what} failed ({lines[-1].strip()[:300]}); nothing was replaced"
        )


def _ask(programs: Path, folder: Path) -> tuple[str, dict[str, str]]:
    """Let the export answer in a process of its own, whose crash is not ours.

    Returns:
        The beginning of its answer, and the versions of what made it.

    Raises:
        ValueError: it does not answer.
    """
    done = subprocess.run(
        [
            str(programs / "python"),
            "-c",
            ANSWER,
            str(folder),
            str(ASKED_TOKENS),
            *PACKAGES,
        ],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:300]
    if not done.returncode:
        tokens, answer, versions = json.loads(done.stdout.splitlines()[-1])
        if tokens == ASKED_TOKENS:
            return answer.strip(), versions
        said = f"{tokens} of {ASKED_TOKENS} tokens came"
    raise ValueError(f"the export does not answer ({said}); nothing was replaced")


def main(arguments: Sequence[str] | None = None) -> None:
    """Export from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.export",
        description="Export the base named by BASE_MODEL or PROFILE for OpenVINO.",
    )
    parser.add_argument(
        "--format",
        choices=list(FORMATS),
        default=DEFAULT,
        help="of the weights; the smaller, the faster (int4)",
    )
    options = parser.parse_args(arguments)
    try:
        made = export(load_settings(), options.format)
        if load_chat_settings().engine != "openvino":
            print(f"CHAT_ENGINE=openvino make chat   lets {made.about()} answer")
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"make export: {error}")


if __name__ == "__main__":
    main()
