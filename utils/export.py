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
from pathlib import Path

from utils import results
from utils.config import (
    ROOT,
    Settings,
    display_path,
    load_chat_settings,
    load_settings,
)
from utils.exported import (
    FORMATS,
    RECORD,
    Export,
    display_base,
    export_dir,
    fetch_base,
    read_export,
)

ENVIRONMENT = ROOT / ".venv-export"
PROGRAMS = "Scripts" if os.name == "nt" else "bin"
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
