"""The log of a run: cut back to a checkpoint, summed up, and going on."""

import json
import time
from pathlib import Path

import pytest
import torch
from transformers import TrainerControl, TrainerState

from utils import step_log
from utils.results import read_lines, write_lines

ROWS = [
    {"step": 0, "eval_nll": 5.0},
    {"step": 1, "loss": 4.0, "elapsed_s": 3.0},
    {"step": 2, "loss": 3.0, "elapsed_s": 7.5},
    {"step": 2, "eval_nll": 4.0},
    {"step": 3, "loss": 2.0, "elapsed_s": 9.0},
]


def going_on(path, logs, step=3):
    """The row that a run adds to `path` when it is started again before `step`."""
    log = step_log.StepLog(path)
    state = TrainerState(global_step=step - 1, max_steps=9, epoch=0.5)
    log.on_train_begin(None, state, TrainerControl())
    time.sleep(0.01)
    state.global_step = step
    log.on_log(None, state, TrainerControl(), logs)
    log.on_train_end(None, state, TrainerControl())
    return read_lines(path)[-1]


def test_the_steps_after_a_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "training_first_aid.jsonl"
    for step, kept in ((2, 4), (1, 2), (0, 1)):
        write_lines(path, ROWS)
        step_log.cut_back(path, step)
        assert read_lines(path) == ROWS[:kept]


def test_a_line_that_was_cut_short_is_dropped(tmp_path):
    path = tmp_path / "training_first_aid.jsonl"
    write_lines(path, ROWS)
    whole = path.read_bytes()
    for rest in (b'{"step": 4, "lo', b'{"step": 4, "loss": 1.0}'):
        path.write_bytes(whole + rest)
        step_log.cut_back(path, 9)
        assert path.read_bytes() == whole
    path.write_bytes(b'{"step"')
    step_log.cut_back(path, 9)
    assert path.read_bytes() == b""
    step_log.cut_back(tmp_path / "not there yet", 9)


def test_elapsed_time_goes_on_where_the_run_was_interrupted(tmp_path):
    path = tmp_path / "training_first_aid.jsonl"
    write_lines(path, ROWS[:4])
    logs = {"loss": 2.0, "learning_rate": 1e-3, "grad_norm": 1.0, "num_tokens": 50.0}
    row = going_on(path, logs)
    assert row["step"] == 3 and row["tokens"] == 50
    assert 7.5 < row["elapsed_s"] < 9
    assert going_on(tmp_path / "new", logs)["elapsed_s"] < 2


def test_only_the_first_process_writes(tmp_path):
    log = step_log.StepLog(tmp_path / "log")
    state = TrainerState(is_world_process_zero=False)
    log.on_train_begin(None, state, None)
    log.on_log(None, state, None, {"loss": 1.0})
    log.on_train_end(None, state, None)
    assert not log.path.exists()


def test_a_run_is_summed_up(tmp_path):
    path = tmp_path / "training_first_aid.jsonl"
    steps = [
        {"tokens": 100, "tokens_per_second": 50.0, "memory_gb": 1.0, "elapsed_s": 2.5},
        {"tokens": 300, "tokens_per_second": 100.0, "memory_gb": 2.0, "elapsed_s": 6.0},
        {"tokens": 0, "tokens_per_second": 0.0, "memory_gb": 1.5, "elapsed_s": 7.0},
    ]
    rows = [{"step": n, "loss": 1.0} | row for n, row in enumerate(steps, start=1)]
    write_lines(path, [*rows, {"step": 3, "eval_nll": 1.0}])
    assert step_log.summarise(path) == {
        "steps": 3,
        "seconds": 7.0,
        "training_seconds": 5.0,  # 100 / 50 + 300 / 100
        "tokens_per_second": 80.0,  # 400 / 5
        "peak_memory_gb": 2.0,
    }
    write_lines(path, [{"step": 0, "eval_nll": 1.0}])
    with pytest.raises(ValueError, match="training_first_aid.jsonl holds no optimizer"):
        step_log.summarise(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_named():
    log = step_log.StepLog(Path("/dev/full"))
    log.bar = None
    with pytest.raises(OSError, match="step 0 .* …/full .No space.*last checkpoint st"):
        log.on_log(None, TrainerState(), None, dict.fromkeys(step_log.EVALUATED, 1.0))


def test_peak_memory_is_this_process_in_gigabytes():
    block = torch.ones(60_000_000)  # 0.24 GB
    assert block.numel() * 4 / 1e9 < step_log.peak_memory_gb() < 200


def test_rows_are_json_of_one_line_each(tmp_path):
    row = going_on(tmp_path / "log", {"loss": 1.0, "learning_rate": 0.1})
    assert json.loads((tmp_path / "log").read_text("utf-8")) == row
