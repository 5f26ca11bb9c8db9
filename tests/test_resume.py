"""Processes are killed at chosen moments; the run ends as if nothing had happened."""

import os
import shutil
import signal
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training import assert_same_log, fine_tune
from transformers import TrainerCallback

from utils import checkpoints, training
from utils.results import read_lines

# Four epochs of three steps. Checkpoints and evaluations fall into epochs and apart;
# dropout makes the resumed state of the random numbers count.
RUN = dict(num_train_epochs=4, save_steps=2, eval_steps=3, dropout=0.1)
STEPS = 12

# Where a process ends itself: at a function, when it is called with a path of such a
# name, and a file of which the disk then holds only half.
MOMENTS = {
    "between two checkpoints": None,
    "in an evaluation": (training, "token_nll", None, None),
    "before the weights": (training.LoggedTrainer, "save_model", None, None),
    "between two files": (training.LoggedTrainer, "_save_scaler", None, None),
    "within a file": (training.LoggedTrainer, "_save_rng_state", None, "optimizer.pt"),
    "before the marker": (checkpoints, "_sync", "trainer_state.json", None),
    "within the marker": (checkpoints, "_sync", checkpoints.MARKER, checkpoints.MARKER),
    "before the rename": (checkpoints, "_sync", "checkpoint-{}", None),
    "after the rename": (checkpoints, "_sync", "checkpoints", None),
    "while an old one is deleted": (shutil, "rmtree", ".writing", "complete.json"),
}


class Killed(TrainerCallback):
    """Ends its process with SIGKILL at a moment of a step."""

    def __init__(self, moment: str, step: int, folder: Path):
        self.moment, self.step, self.folder = moment, step, folder

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step != self.step:
            return
        if MOMENTS[self.moment] is None:
            os.kill(os.getpid(), signal.SIGKILL)
        where, name, path, torn = MOMENTS[self.moment]
        plain = getattr(where, name)

        def reached(*args, **kwargs):
            files = list(self.folder.rglob(f".writing/*/{torn}"))
            elsewhere = path and args[0].name != path.format(self.step)
            if elsewhere or (torn and not files):
                return plain(*args, **kwargs)
            for file in files:
                os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(where, name, reached)


def start(folder: Path, base: Path, moment: str | None, step: int) -> None:
    """What a process does; without a moment it ends well."""
    callbacks = [Killed(moment, step, folder)] if moment else []
    fine_tune(folder, base, callbacks=callbacks, **RUN)


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have imported everything and done nothing yet."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["utils.training"])  # seconds of imports, once
    return context.Process


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("whole")
    start(folder, tiny_folder, None, 0)
    return folder


def assert_as_if_nothing_had_happened(folder: Path, whole: Path) -> None:
    rows, expected = (
        read_lines(run / "training_first_aid.jsonl") for run in (folder, whole)
    )
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    assert_same_log(rows, expected)
    ours, theirs = (
        load_file(run / f"checkpoints/checkpoint-{STEPS}/adapter_model.safetensors")
        for run in (folder, whole)
    )
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], rtol=0, atol=1e-5), name
    left = {path.name for path in (folder / "checkpoints").iterdir()}
    assert left == {path.name for path in (whole / "checkpoints").iterdir()}


def kill_and_go_on(processes, folder, base, kills):
    for moment, step in [*kills, (None, 0)]:
        process = processes(target=start, args=(folder, base, moment, step))
        process.start()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if moment else 0), (moment, step)


def test_a_run_that_was_killed_twice(processes, tmp_path, tiny_folder, whole):
    kills = [("between two checkpoints", 5), ("within a file", 8)]
    kill_and_go_on(processes, tmp_path, tiny_folder, kills)
    assert_as_if_nothing_had_happened(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_was_killed_once(processes, tmp_path, tiny_folder, whole, moment):
    kill_and_go_on(processes, tmp_path, tiny_folder, [(moment, 6)])
    assert_as_if_nothing_had_happened(tmp_path, whole)


@pytest.mark.slow
def test_a_run_that_was_killed_ten_times(processes, tmp_path, tiny_folder, whole):
    kills = [
        ("between two checkpoints", 1),
        ("before the weights", 2),
        ("after the rename", 2),
        ("in an evaluation", 3),
        ("between two files", 4),
        ("within a file", 4),
        ("before the marker", 6),
        ("within the marker", 6),
        ("while an old one is deleted", 8),
        ("before the rename", 10),
    ]
    assert {moment for moment, _ in kills} == {*MOMENTS}
    kill_and_go_on(processes, tmp_path, tiny_folder, kills)
    assert_as_if_nothing_had_happened(tmp_path, whole)
