"""Measures what is claimed of speed and memory, both sides of a pair in one run.

    python -m utils.benchmark [training four_bit gpu data answers chat engine]

Writes each section to `data/runs/benchmark.json` as soon as it is measured, with the
hardware and the day; sections measured earlier stay. `FIRST_AID_DATASET` names the rows
to fine-tune on (default: the profile's own).
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from utils import (
    benchmark_answers,
    benchmark_chat,
    benchmark_data,
    benchmark_engine,
    benchmark_training,
    results,
)
from utils.config import RUNS, display_path, load_settings

REPORT = RUNS / "benchmark.json"


def gpu(rows: str, options: argparse.Namespace) -> dict | None:
    """The comparison in the 1 B's shape, where there is a GPU to do it on."""
    if not torch.cuda.is_available():
        print("gpu: not measured, there is no CUDA GPU here")
        return None
    tokenizer = os.environ.get("REAL_TOKENIZER", "").strip()
    if not tokenizer:
        sys.exit(
            "benchmark: set REAL_TOKENIZER to a folder with the tokenizer of Llama 3.2 "
            "1B Instruct, chat template included"
        )
    with tempfile.TemporaryDirectory() as folder:
        shape = benchmark_training.write_1b_shape(Path(folder))
        return benchmark_training.on_gpu(
            rows, tokenizer, options.steps, options.repeats, shape
        )


def sections(options: argparse.Namespace) -> dict[str, Callable[[], dict | None]]:
    """What can be measured, by name."""
    rows = load_settings({**os.environ, "PROFILE": "pocket"}).first_aid_dataset
    steps, repeats = options.steps, options.repeats
    return {
        "training": lambda: benchmark_training.on_cpu(rows, steps, repeats),
        "four_bit": lambda: benchmark_training.four_bit(rows, steps),
        "gpu": lambda: gpu(rows, options),
        "data": lambda: benchmark_data.scaling(),
        "answers": lambda: benchmark_answers.on_cpu(rows, options.questions),
        "chat": lambda: benchmark_chat.memory(),
        "engine": lambda: benchmark_engine.on_cpu(repeats),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the sections that are named, all if none is, and write the report."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.benchmark",
        description="Measure speed and memory; write data/runs/benchmark.json.",
    )
    names = ("training", "four_bit", "gpu", "data", "answers", "chat", "engine")
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"of {', '.join(names)}"
    )
    parser.add_argument(
        "--steps", type=int, default=64, help="optimizer steps of a run (64)"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="pairs to take a median of (3)"
    )
    parser.add_argument(
        "--questions", type=int, default=128, help="to answer both ways (128)"
    )
    options = parser.parse_args(arguments)
    known = sections(options)
    if unknown := set(options.sections) - set(known):
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    for name in options.sections or known:
        print(f"measuring: {name}", flush=True)
        found = known[name]()
        if found is None:
            continue
        report = results.read_json(REPORT) if REPORT.is_file() else {}
        made = {"hardware": results.hardware(), "when": results.now()}
        report[name] = {**found, **made}
        results.write_json(REPORT, report)
        shown = {k: v for k, v in found.items() if not isinstance(v, list | dict)}
        print("\n".join(f"  {key}: {value}" for key, value in shown.items()))
    print(f"written to {display_path(REPORT)}")


if __name__ == "__main__":
    main()
