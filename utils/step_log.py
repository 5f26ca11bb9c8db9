"""The log of a fine-tuning run: every optimizer step and evaluation is a line."""

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from utils.config import display_path
from utils.results import append_line, read_lines, split_log, write_lines

EVALUATED = ("eval_nll", "eval_perplexity", "eval_whole_text")


class StepLog(TrainerCallback):
    """Writes each step and evaluation as a line, and moves the progress bar.

    Args:
        path: JSON-lines file; lines are appended to what it holds.
    """

    def __init__(self, path: Path):
        self.path = path
        self.bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        steps, _ = split_log(read_lines(self.path)) if self.path.is_file() else ([], [])
        self.earlier = steps[-1]["elapsed_s"] if steps else 0.0
        self.began = self.last = time.perf_counter()
        self.tokens = 0.0  # the trainer's own count restarts, too
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="fine-tune",
            unit="step",
        )

    def on_log(self, args, state, control, logs: Mapping, **kwargs):
        if not state.is_world_process_zero:
            return
        time_now = time.perf_counter()
        if "eval_nll" in logs:
            row = {"step": state.global_step, "epoch": round(state.epoch or 0, 4)}
            self._append(row | {key: logs[key] for key in EVALUATED})
            self.last = time_now  # an evaluation is not training time
            return
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError(
                f"step {state.global_step}: the loss is {logs['loss']}. Lower the "
                "learning rate, or look for a broken row; the log up to here and the "
                "last checkpoint are kept."
            )
        tokens = logs.get("num_tokens", 0.0) - self.tokens
        seconds = max(time_now - self.last, 1e-9)
        self.tokens += tokens
        self.last = time_now
        row = {
            "step": state.global_step,
            "epoch": round(state.epoch, 4),
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "tokens": int(tokens),
            "tokens_per_second": round(tokens / seconds, 1),
            "memory_gb": round(peak_memory_gb(), 3),
            "elapsed_s": round(self.earlier + time_now - self.began, 3),
        }
        self._append(row)
        self.bar.update(state.global_step - self.bar.n)
        self.bar.set_postfix(
            loss=f"{row['loss']:.3f}",
            tokens_s=f"{row['tokens_per_second']:.0f}",
            memory=f"{row['memory_gb']:.1f} GB",
        )

    def _append(self, row: Mapping) -> None:
        try:
            append_line(self.path, row)
        except OSError as error:
            raise OSError(
                f"step {row['step']} could not be written to "
                f"{display_path(self.path)} ({error.strerror}); the last checkpoint "
                "stays. Make room, and run the cell again: it goes on from there"
            ) from error

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Leave the progress bar as it stands."""
        if self.bar is not None:
            self.bar.close()


def cut_back(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a line that a kill has cut short.

    The steps after a checkpoint are trained again; without this they would be in the
    log twice.
    """
    if not path.is_file():
        return
    text = path.read_text("utf-8")
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        path.write_text(text, encoding="utf-8")
    rows = read_lines(path)
    kept = [row for row in rows if row["step"] <= step]
    if len(kept) < len(rows):
        write_lines(path, kept)


def summarise(path: Path) -> dict[str, float]:
    """Steps, seconds of training, tokens per second and peak memory in GB of a log.

    Raises:
        ValueError: it holds no step.
    """
    steps, _ = split_log(read_lines(path))
    if not steps:
        raise ValueError(f"{path.name} holds no optimizer step yet")
    training = sum(
        row["tokens"] / row["tokens_per_second"] for row in steps if row["tokens"]
    )
    tokens = sum(row["tokens"] for row in steps)
    return {
        "steps": steps[-1]["step"],
        "seconds": steps[-1]["elapsed_s"],
        "training_seconds": round(training, 3),
        "tokens_per_second": round(tokens / max(training, 1e-9), 1),
        "peak_memory_gb": max(row["memory_gb"] for row in steps),
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
