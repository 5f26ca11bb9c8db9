"""TRL's trainer with a log that keeps every step, and evaluation that weighs tokens."""

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils.notebook import NotebookProgressCallback
from trl import SFTTrainer

from utils.config import Settings
from utils.generation import answer_nll
from utils.metrics import perplexity
from utils.models import ADAPTER_INFO
from utils.results import append_line, describe_run, now, write_json


def to_dataset(encoded: list[dict]) -> Dataset:
    """Encoded rows as the pre-tokenised data set that TRL takes as it is."""
    return Dataset.from_list(encoded)


class LoggedTrainer(SFTTrainer):
    """`SFTTrainer` that logs every optimizer step to a file as it happens.

    Evaluation is token-weighted over the labelled tokens: the Trainer's own
    `eval_loss` is a mean of batch means, whose exponential is not the perplexity.

    Args:
        log_path: JSON-lines file; a new run begins it anew.
        evaluation_rows: encoded rows (`utils.prompts.encode_rows`).
        **kwargs: as `SFTTrainer` takes them.
    """

    def __init__(self, *, log_path: Path, evaluation_rows: list[dict], **kwargs):
        # The trainer wants a data set to agree to evaluate; `evaluate` uses the rows.
        super().__init__(eval_dataset=to_dataset(evaluation_rows), **kwargs)
        self.args.logging_nan_inf_filter = False  # a NaN would be logged as 0.0
        self.log_path = log_path
        self.evaluation_rows = evaluation_rows
        for callback in (PrinterCallback, ProgressCallback, NotebookProgressCallback):
            self.remove_callback(callback)
        self.add_callback(StepLog(log_path))

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Token-weighted NLL (nats) and perplexity on the evaluation rows."""
        losses = answer_nll(
            self.model,
            self.evaluation_rows,
            batch_size=self.args.per_device_eval_batch_size,
        )
        found = perplexity(losses)
        metrics = {"eval_nll": found["nll"], "eval_perplexity": found["perplexity"]}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    @property
    def summary(self) -> dict[str, float]:
        """After training: steps, seconds, tokens per second, peak memory in GB."""
        log = next(c for c in self.callback_handler.callbacks if isinstance(c, StepLog))
        return log.summary


class StepLog(TrainerCallback):
    """Writes each step and evaluation as a line, and moves the progress bar."""

    def __init__(self, path: Path):
        self.path = path
        self.bar = None
        self.summary: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("", encoding="utf-8")
        self.began = self.last = time.perf_counter()
        self.tokens = 0.0
        self.training_seconds = 0.0
        self.bar = tqdm(total=state.max_steps, desc="fine-tune", unit="step")

    def on_log(self, args, state, control, logs: Mapping, **kwargs):
        time_now = time.perf_counter()
        if "eval_nll" in logs:
            row = {"step": state.global_step, "epoch": round(state.epoch or 0, 4)}
            append_line(
                self.path,
                row | {k: logs[k] for k in ("eval_nll", "eval_perplexity")},
            )
            self.last = time_now  # an evaluation is not training time
            return
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError(
                f"step {state.global_step}: the loss is {logs['loss']}. Lower the "
                "learning rate, or look for a broken row; the log up to here is kept."
            )
        tokens = logs.get("num_tokens", 0.0) - self.tokens
        seconds = time_now - self.last
        self.tokens += tokens
        self.training_seconds += seconds
        self.last = time_now
        row = {
            "step": state.global_step,
            "epoch": round(state.epoch, 4),
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "tokens_per_second": round(tokens / seconds, 1),
            "memory_gb": round(peak_memory_gb(), 3),
            "elapsed_s": round(time_now - self.began, 3),
        }
        append_line(self.path, row)
        self.bar.update(state.global_step - self.bar.n)
        self.bar.set_postfix(
            loss=f"{row['loss']:.3f}",
            tokens_s=f"{row['tokens_per_second']:.0f}",
            memory=f"{row['memory_gb']:.1f} GB",
        )

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
        self.summary = {
            "steps": state.global_step,
            "seconds": round(time.perf_counter() - self.began, 3),
            "training_seconds": round(self.training_seconds, 3),
            "tokens_per_second": round(
                self.tokens / max(self.training_seconds, 1e-9), 1
            ),
            "peak_memory_gb": round(peak_memory_gb(), 3),
        }


def peak_memory_gb() -> float:
    """Peak memory so far in GB (1e9 bytes): reserved on the GPU, or resident here."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 1e9
    if sys.platform == "win32":
        return float("nan")  # the standard library has no such figure there
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def save_adapter(
    trainer: SFTTrainer, folder: Path, settings: Settings, info: Mapping
) -> None:
    """Save the tuned adapter as safetensors, with what made it beside it.

    The base's name is written as the run knows it: PEFT would write the absolute
    path of a local base, which means nothing on another machine.

    Args:
        trainer: after training.
        folder: to write to; an older adapter there is replaced.
        settings: of the run.
        info: data fingerprint, hyperparameters, scores; kept in `adapter_info.json`.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    run = describe_run(settings)
    for config in model.peft_config.values():
        config.base_model_name_or_path = run["base_model"]
    # "auto" would ask the Hub for the base's config to see whether embeddings changed.
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    readme = folder / "README.md"
    readme.unlink(missing_ok=True)  # PEFT's template: empty headings, absolute paths
    write_json(folder / ADAPTER_INFO, {**run, **info, "when": now()})
