"""Measures fine-tuning against a plain TRL script: the same rows, steps and seed.

Each side runs in a process of its own, one after the other, several times over, so that
a ratio holds on a machine that others use as well. On a CPU: the pocket Llama, our
trainer against TRL's with padded batches in random order. On a CUDA GPU: a Llama of the
1 B's shape with random weights, ours against the recipe of the original project (4-bit,
10 rows times 4, padded, activations recomputed).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from utils import dataset, generation, models, prompts, sources, step_log, training
from utils.config import ROOT, load_settings
from utils.metrics import perplexity

LAYERS = [
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
]
LLAMA_1B = dict(  # the shape of Llama 3.2 1B
    vocab_size=128_256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
)
# Dense half-precision peaks from NVIDIA's data sheets, in FLOP/s.
PEAKS = {"T4": 65e12, "A100": 312e12, "H100": 989e12, "H200": 989e12, "L4": 121e12}
T4 = PEAKS["T4"]


@dataclass(frozen=True)
class Setup:
    """One side of a pair, as its process reads it."""

    side: str  # "ours" or "plain"
    base: str  # folder of the base model
    tokenizer: str
    rows: str  # a data set, as FIRST_AID_DATASET takes it
    run_dir: str
    micro: int  # rows at once, on the plain side
    batch: int  # rows of an optimizer step
    steps: int
    rank: int
    rate: float
    seed: int = 42
    load_in_4bit: bool = False
    recompute: bool = False
    validate: bool = True


def run_side(setup: Setup) -> dict:
    """Fine-tune one side in this process.

    Returns:
        `rows_per_second`, `tokens_per_second` (no padding counted), `seconds` of
        training, `validation_nll` (nats per answer token; None if not asked for),
        `peak_memory_gb` and `parameters`.
    """
    # Half precision on any GPU: the 1 B is to be tuned as on a T4.
    capability = (7, 5) if torch.cuda.is_available() else (0, 0)
    precision = models.choose_precision(capability)
    settings = load_settings(
        {
            "PROFILE": "pocket",
            "BASE_MODEL": setup.base,
            "FIRST_AID_DATASET": setup.rows,
            "RUN_DIR": setup.run_dir,
            "LOAD_IN_4BIT": "1" if setup.load_in_4bit else "0",
        }
    )
    tokenizer = models.load_tokenizer(setup.tokenizer)
    split = dataset.split_rows(sources.load_source(settings.first_aid_dataset))
    train, _ = prompts.encode_rows(tokenizer, split.train, 2048)
    validation, _ = prompts.encode_rows(tokenizer, split.validation, 2048)
    base = models.load_base(settings, precision)
    parameters = sum(p.numel() for p in base.parameters())
    lora = LoraConfig(
        r=setup.rank,
        lora_alpha=2 * setup.rank,
        target_modules=LAYERS,
        task_type="CAUSAL_LM",
    )
    sft = SFTConfig(
        output_dir=str(Path(setup.run_dir) / "checkpoints"),
        max_steps=setup.steps,
        per_device_train_batch_size=setup.micro,
        gradient_accumulation_steps=setup.batch // setup.micro,
        learning_rate=setup.rate,
        warmup_steps=max(1, setup.steps // 10),
        lr_scheduler_type="linear",
        gradient_checkpointing=setup.recompute,
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=setup.seed,
        **precision.trainer_flags,
    )
    if setup.side == "ours":
        job = training.Job("first_aid", lora, sft, train, validation, split.fingerprint)
        began = time.perf_counter()
        tuned = training.fine_tune(settings, job, base, tokenizer)
        seconds = time.perf_counter() - began
    else:
        chats = [prompts.row_messages(row) for row in split.train]
        pairs = [{"prompt": c[:-1], "completion": c[-1:]} for c in chats]
        trainer = SFTTrainer(
            model=base,
            args=sft,
            peft_config=lora,
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
        )
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:  # TRL's bfloat16 on a 4-bit base breaks fp16
                parameter.data = parameter.data.float()
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        tuned = trainer.model
    nll = None
    if setup.validate:
        nll = perplexity(generation.answer_nll(tuned, validation))["nll"]
    mean_tokens = sum(len(row["input_ids"]) for row in train) / len(train)
    rows = setup.steps * setup.batch / seconds
    return {
        "rows_per_second": round(rows, 2),
        "tokens_per_second": round(rows * mean_tokens, 1),
        "seconds": round(seconds, 2),
        "validation_nll": nll,
        "peak_memory_gb": round(step_log.peak_memory_gb(), 3),
        "parameters": parameters,
    }


def in_own_process(setup: Setup) -> dict:
    """`run_side` in a fresh process, in a run folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        setup = replace(setup, run_dir=folder)
        command = [sys.executable, "-m", "utils.benchmark_training", "--side"]
        done = subprocess.run(
            [*command, json.dumps(asdict(setup))],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return json.loads(done.stdout.splitlines()[-1])


def compare(ours: Setup, plain: Setup, repeats: int) -> dict:
    """Both sides in turn, `repeats` times with a seed each.

    Returns:
        Every run, the median of the paired ratios of rows per second, and the largest
        paired ratio of validation NLL (None where it was not measured).
    """
    pairs = []
    for number in range(repeats):
        seed = ours.seed + number
        # Who goes first changes, so that a machine that slows down favours nobody.
        sides = {"ours": replace(ours, seed=seed), "plain": replace(plain, seed=seed)}
        order = list(sides)[:: -1 if number % 2 else 1]
        done = {name: in_own_process(sides[name]) for name in order}
        pairs.append({"seed": seed, **done})
        print(json.dumps(pairs[-1]), flush=True)

    def ratios(figure: str) -> list[float]:
        return [p["ours"][figure] / p["plain"][figure] for p in pairs]

    losses = ratios("validation_nll") if ours.validate else []
    return {
        "steps": ours.steps,
        "batch": ours.batch,
        "pairs": pairs,
        "rows_per_second_ratio": round(statistics.median(ratios("rows_per_second")), 3),
        "worst_validation_nll_ratio": round(max(losses), 4) if losses else None,
    }


def _on_pocket(rows: str, steps: int) -> Setup:
    """Our side on the pocket Llama, micro-batch 16, float32, nothing recomputed."""
    base = load_settings({"PROFILE": "pocket"}).base_model
    return Setup(
        side="ours",
        base=base,
        tokenizer=base,
        rows=rows,
        run_dir="",
        micro=16,
        batch=16,
        steps=steps,
        rank=32,
        rate=2e-3,
    )


def on_cpu(rows: str, steps: int, repeats: int) -> dict:
    """The pocket Llama, micro-batch 16 on both sides, float32, nothing recomputed."""
    ours = _on_pocket(rows, steps)
    report = compare(ours, replace(ours, side="plain"), repeats)
    return {"what": "pocket Llama, ours against plain TRL, CPU", **report}


def four_bit(rows: str, steps: int) -> dict:
    """Our trainer on the pocket Llama with an NF4 base, against the same in float32."""
    plain = _on_pocket(rows, steps)
    quantised = in_own_process(replace(plain, load_in_4bit=True))
    whole = in_own_process(plain)
    ratio = quantised["validation_nll"] / whole["validation_nll"]
    return {
        "what": "pocket Llama, 4-bit base against float32, ours",
        "steps": steps,
        "four_bit": quantised,
        "float32": whole,
        "validation_nll_ratio": round(ratio, 4),
    }


def write_1b_shape(folder: Path) -> Path:
    """Write a Llama of the 1 B's shape with random half-precision weights."""
    config = LlamaConfig(
        **LLAMA_1B,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        bos_token_id=128_000,
        eos_token_id=[128_001, 128_008, 128_009],
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).half().save_pretrained(folder)
    return folder


def on_gpu(rows: str, tokenizer: str, steps: int, repeats: int, shape: Path) -> dict:
    """The 1 B's shape, float16 as on a T4, against the original's recipe.

    Args:
        rows: the data set.
        tokenizer: folder of Llama 3's tokenizer, with a chat template.
        steps: optimizer steps of 40 rows on each side.
        repeats: how often.
        shape: folder of the model (`write_1b_shape`).

    Returns:
        As `compare`, with the model FLOPs utilisation of our side and the time that
        three epochs of 5,550 rows would take on a T4 at that utilisation.
    """
    ours = Setup(
        side="ours",
        base=str(shape),
        tokenizer=tokenizer,
        rows=rows,
        run_dir="",
        micro=40,
        batch=40,
        steps=steps,
        rank=16,
        rate=2e-4,
        validate=False,
    )
    original = replace(ours, side="plain", micro=10, load_in_4bit=True, recompute=True)
    report = compare(ours, original, repeats)
    return {
        "what": "Llama 3.2 1B's shape, random weights, float16, ours against the "
        "original's recipe in plain TRL",
        **report,
        **utilisation(report["pairs"]),
    }


def utilisation(pairs: Sequence[Mapping]) -> dict:
    """Model FLOPs utilisation of our side, and what it projects to on a T4.

    LoRA without recomputation costs 4 FLOPs per parameter and token: 2 forward, and 2
    backward for the activations alone (Kaplan et al. 2020, less the weights' share).
    The projection is a projection: no T4 has been measured.
    """
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((flops for key, flops in PEAKS.items() if key in name), None)
    if peak is None:
        return {"model_flops_utilisation": None, "projected_t4_seconds": None}
    ours = [pair["ours"] for pair in pairs]
    rate = statistics.median(run["tokens_per_second"] for run in ours)
    flops = 4 * ours[0]["parameters"]
    used = rate * flops / peak
    rows_rate = statistics.median(run["rows_per_second"] for run in ours)
    tokens = 3 * 5550 * rate / rows_rate
    return {
        "model_flops_utilisation": round(used, 4),
        "projected_t4_seconds": round(tokens * flops / (T4 * used)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """One side, in the process that `in_own_process` starts."""
    parser = argparse.ArgumentParser(prog="python -m utils.benchmark_training")
    parser.add_argument("--side", required=True, help="a Setup as JSON")
    setup = Setup(**json.loads(parser.parse_args(arguments).side))
    print(json.dumps(run_side(setup)))


if __name__ == "__main__":
    main()
