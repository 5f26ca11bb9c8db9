"""Measures the chat's two engines on this CPU: OpenVINO in 4 bits, and Transformers.

A Llama of the 1 B's shape with random weights and two LoRA adapters (r = 16, all seven
linear layers), a prompt of 40 tokens, 64 new ones. Each side answers in a process of
its own, through the back end that the chat uses, so that its peak of memory is its own.
The words are noise: `utils.engine_cost` measures what 4 bits do to answers.
"""

import argparse
import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from utils import export, exported, results
from utils.adapters import ADAPTERS, adapter_dir
from utils.config import POCKET, ROOT, Settings, load_settings
from utils.prompts import prompt_text
from utils.protocol import Backend, Sampling

PROMPT_TOKENS, NEW_TOKENS = 40, 64
RANK = 16
SIDES = ("openvino", "transformers")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def write_base(folder: Path) -> None:
    """Write the 1 B's shape and a tokenizer: `REAL_TOKENIZER`'s, or the pocket Llama's.

    A token costs the same whichever word it stands for, so the pocket Llama's 4,096
    words do where Llama 3's are not at hand.
    """
    from utils.benchmark_training import write_1b_shape

    write_1b_shape(folder)
    for name in TOKENIZER:
        shutil.copyfile(POCKET / name, folder / name)
    if real := os.environ.get("REAL_TOKENIZER", "").strip():
        for file in Path(real).expanduser().glob("tokenizer*.json*"):
            content = file.read_bytes()
            if file.suffix == ".gz":
                content = gzip.decompress(content)
            (folder / file.name.removesuffix(".gz")).write_bytes(content)


def write_adapters(settings: Settings) -> None:
    """Write two random adapters for the settings' base, as a run keeps them."""
    import torch
    from peft import LoraConfig, get_peft_model

    from utils.benchmark_training import LAYERS
    from utils.models import Precision, load_base

    base = load_base(settings, Precision(torch.bfloat16, "half the memory"))
    lora = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=LAYERS,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    for seed, name in enumerate(ADAPTERS, start=1):
        torch.manual_seed(seed)
        adapted = get_peft_model(base, lora)
        adapted.save_pretrained(
            adapter_dir(settings, name), save_embedding_layers=False
        )
        base = adapted.unload()


def prompt_of(tokenizer) -> list[dict]:
    """A question whose whole prompt has `PROMPT_TOKENS` tokens.

    Raises:
        ValueError: the chat template alone is longer.
    """
    for words in range(PROMPT_TOKENS):
        messages = [{"role": "user", "content": "burn" + " burn" * words}]
        ids = tokenizer(prompt_text(tokenizer, messages), add_special_tokens=False)
        if len(ids["input_ids"]) == PROMPT_TOKENS:
            return messages
    raise ValueError(f"no question makes a prompt of {PROMPT_TOKENS} tokens")


def open_side(side: str, settings: Settings) -> Backend:
    """The back end of one side, loaded; Transformers in bfloat16."""
    if side == "openvino":
        from utils.openvino_engine import OpenVinoBackend

        return OpenVinoBackend(settings, exported.find_export(settings))
    import torch
    from peft import PeftModel

    from utils.backends import LocalBackend
    from utils.models import Precision, load_base, load_tokenizer

    backend = LocalBackend(settings, load=False)  # it would load float32 on a CPU
    model = load_base(settings, Precision(torch.bfloat16, "the faster one on a CPU"))
    for name in ADAPTERS:
        folder = adapter_dir(settings, name)
        if isinstance(model, PeftModel):
            model.load_adapter(folder, adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name)
    backend.model, backend.tokenizer = model.eval(), load_tokenizer(settings.base_model)
    return backend


def run_side(side: str, settings: Settings, messages: list[dict], repeats: int) -> dict:
    """Answer with every model in turn, `repeats` times, in this process.

    Returns:
        Medians by model of `tokens_per_second` (all tokens over all seconds, as the
        chat shows it) and `first_token_s`, the seconds to load, and the peak of the
        process's resident memory in GB.
    """
    began = time.perf_counter()
    backend = open_side(side, settings)
    loaded = time.perf_counter() - began
    found: dict[str, list] = {key: [] for key in ("base", *ADAPTERS)}
    for number in range(repeats + 1):  # the first round warms up
        for key, runs in found.items():
            *_, last = backend.stream(key, messages, Sampling(NEW_TOKENS))
            if number:
                runs.append((last.tokens / last.seconds, last.first_token_s))
                if last.tokens != NEW_TOKENS:
                    raise RuntimeError(f"{side} gave {last.tokens} tokens to {key}")
    medians = {
        key: [statistics.median(values) for values in zip(*runs)]
        for key, runs in found.items()
    }
    return {
        "load_s": round(loaded, 2),
        "tokens_per_second": {
            key: round(rate, 2) for key, (rate, _) in medians.items()
        },
        "first_token_s": {key: round(first, 3) for key, (_, first) in medians.items()},
        "peak_memory_gb": round(peak_memory_gb(), 2),
    }


def peak_memory_gb() -> float:
    """The most memory that this process has held, in GB.

    Raises:
        OSError: this system has no /proc.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e9


def in_own_process(
    side: str, settings: Settings, messages: list[dict], repeats: int
) -> dict:
    """`run_side` in a fresh process."""
    task = {"side": side, "messages": messages, "repeats": repeats}
    base = Path(settings.base_model)
    done = subprocess.run(
        [sys.executable, "-m", "utils.benchmark_engine", str(base), json.dumps(task)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def compare(base: Path, repeats: int) -> dict:
    """Both sides on the base in a folder, which has its adapters and export beside it.

    Returns:
        Both sides, and by model OpenVINO's tokens per second over Transformers', and
        its time to the first token over theirs.
    """
    from utils.models import load_tokenizer

    settings = settings_of(base)
    messages = prompt_of(load_tokenizer(settings.base_model))
    sides = {side: in_own_process(side, settings, messages, repeats) for side in SIDES}
    ours, theirs = (sides[side] for side in SIDES)

    def ratios(figure: str) -> dict[str, float]:
        return {
            key: round(value / theirs[figure][key], 3)
            for key, value in ours[figure].items()
        }

    speeds, waits = ratios("tokens_per_second"), ratios("first_token_s")
    return {
        "what": "the 1 B's shape, random weights, two adapters of r = 16, "
        f"{PROMPT_TOKENS} tokens in and {NEW_TOKENS} out, OpenVINO int4 against "
        "Transformers bfloat16",
        **sides,
        "tokens_per_second_ratios": speeds,
        "first_token_ratios": waits,
        "worst_tokens_per_second_ratio": min(speeds.values()),
        "worst_first_token_ratio": max(waits.values()),
        "peak_memory_gb": ours["peak_memory_gb"],
    }


def settings_of(base: Path) -> Settings:
    """Settings of a run with that base; its export is looked for beside it, too."""
    exported.EXPORTS = base.parent
    environ = {"PROFILE": "pocket", "BASE_MODEL": str(base)}
    return load_settings({**environ, "RUN_DIR": str(base.with_name("run"))})


def on_cpu(repeats: int) -> dict | None:
    """The section `engine` of `utils.benchmark`; None where OpenVINO is not installed.

    It writes some 4 GB to the temporary folder, and deletes them.
    """
    from utils.openvino_engine import genai

    if genai is None:
        print("engine: not measured; pip install -r requirements-openvino.txt first")
        return None
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "llama-1b-shape"
        write_base(base)
        settings = settings_of(base)
        write_adapters(settings)
        made = export.export(settings, "int4")
        record = results.read_json(made.path / exported.RECORD)
        about = {key: record[key] for key in ("seconds", "versions")}
        return {**compare(base, repeats), "export": {"bytes": made.size, **about}}


def main(arguments: Sequence[str] | None = None) -> None:
    """One side, in the process that `in_own_process` starts."""
    parser = argparse.ArgumentParser(prog="python -m utils.benchmark_engine")
    parser.add_argument("base", type=Path, help="folder of the base")
    parser.add_argument("task", help="side, messages and repeats as JSON")
    options = parser.parse_args(arguments)
    settings = settings_of(options.base)
    print(json.dumps(run_side(settings=settings, **json.loads(options.task))))


if __name__ == "__main__":
    main()
