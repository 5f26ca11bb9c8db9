"""A checkpoint is complete or absent, and only its own run goes on from it."""

import errno
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_training import assert_same_weights, fine_tune, make_job
from transformers import LlamaForCausalLM, TrainerCallback

from utils import checkpoints, training

IDENTITY = {"data": "abc", "layers": ("q_proj", "v_proj")}


def stage(folder: Path, step: int) -> Path:
    """What the trainer has written before a checkpoint is published."""
    staged = checkpoints.staging_folder(folder) / f"checkpoint-{step}"
    (staged / "state").mkdir(parents=True, exist_ok=True)
    (staged / "weights").write_text(f"of step {step}")
    (staged / "state" / "optimizer").write_text(f"of step {step}")
    return staged


def publish(folder: Path, step: int, **scores) -> Path:
    stage(folder, step)
    return checkpoints.publish(folder, step, {"identity": IDENTITY, **scores})


def contents(folder: Path) -> dict:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


# --- written --------------------------------------------------------------------------


def test_the_marker_is_written_after_everything_else_is_on_the_disk(
    tmp_path, monkeypatch
):
    staged, final = stage(tmp_path, 4), tmp_path / "checkpoint-4"
    seen = []
    monkeypatch.setattr(
        checkpoints,
        "_sync",
        lambda path: seen.append(
            (path.name, (staged / checkpoints.MARKER).exists(), final.exists())
        ),
    )
    assert publish(tmp_path, 4, eval_nll=2.5) == final
    assert sorted(seen[:2]) == [("optimizer", False, False), ("weights", False, False)]
    assert seen[2:] == [
        (checkpoints.MARKER, True, False),
        ("checkpoint-4", True, False),  # the folder's names, before it is renamed
        (tmp_path.name, False, True),
    ]
    assert checkpoints.read_marker(final) == {
        "step": 4,
        "identity": {"data": "abc", "layers": ["q_proj", "v_proj"]},
        "eval_nll": 2.5,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_save_that_breaks_off_leaves_no_checkpoint(tmp_path, monkeypatch):
    publish(tmp_path, 2)
    plain = checkpoints._sync
    for survived in range(4):  # two files, the marker, the staged folder
        calls = []

        def break_off(path, calls=calls, survived=survived):
            calls.append(path)
            if len(calls) > survived:
                raise OSError(errno.EIO, "broken off")

        monkeypatch.setattr(checkpoints, "_sync", break_off)
        with pytest.raises(OSError, match="broken off"):
            publish(tmp_path, 4)
        assert list(checkpoints.complete(tmp_path)) == [2]
    monkeypatch.setattr(checkpoints, "_sync", plain)
    publish(tmp_path, 4)  # over what the others have left
    assert checkpoints.latest(tmp_path, IDENTITY) == (4, tmp_path / "checkpoint-4")


def test_the_last_two_and_the_best_are_kept(tmp_path):
    for step, nll in ((2, 3.0), (4, 1.0), (6, 2.0), (8, 2.0), (10, 1.5)):
        publish(tmp_path, step, eval_nll=nll)
    publish(tmp_path, 12)  # not evaluated
    checkpoints.prune(tmp_path)
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"checkpoint-4", "checkpoint-10", "checkpoint-12"}


def test_without_scores_the_last_two_are_kept(tmp_path):
    for step in (9, 10, 11):
        publish(tmp_path, step)
    checkpoints.prune(tmp_path)
    assert list(checkpoints.complete(tmp_path)) == [10, 11]


def test_a_marker_holds_the_scores_of_its_own_step(settings, tiny_folder):
    house = settings()
    _, log = fine_tune(
        house.run_dir, tiny_folder, save_steps=1, eval_steps=3, max_steps=3
    )
    done = checkpoints.complete(house.run_dir / "checkpoints")
    assert list(done) == [2, 3]
    assert "eval_nll" not in checkpoints.read_marker(done[2])
    assert checkpoints.read_marker(done[3])["eval_nll"] == log[-1]["eval_nll"]


# --- read -----------------------------------------------------------------------------


def test_an_incomplete_checkpoint_is_named_and_not_resumed(
    tmp_path, tiny_folder, capsys
):
    whole, log = fine_tune(tmp_path, tiny_folder)
    (tmp_path / "checkpoints" / "checkpoint-6" / checkpoints.MARKER).unlink()
    capsys.readouterr()
    tuned, rows = fine_tune(tmp_path, tiny_folder)
    said = capsys.readouterr().out
    assert said.count("checkpoint-6 is not complete and left aside.") == 1
    assert "Going on after step 4" in said
    assert_same_weights(tuned, whole)
    assert [row["step"] for row in rows] == [row["step"] for row in log]
    assert list(checkpoints.complete(tmp_path / "checkpoints")) == [4, 6]


def test_a_checkpoint_of_another_run_is_refused_and_nothing_changed(
    settings, tmp_path, tiny_folder, tiny_model, tiny_tokenizer
):
    house = settings(BASE_MODEL=tiny_folder)
    job = make_job(house, tiny_tokenizer, max_steps=2)
    training.fine_tune(house, job, tiny_model, tiny_tokenizer)
    before = contents(house.run_dir)
    shutil.copytree(tiny_folder, tmp_path / "other")
    other = LlamaForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        other.model.norm.weight += 1
    other.save_pretrained(tmp_path / "other")
    slower = training.replace_arguments(job.sft, learning_rate=0.01)
    for what, where, asked in (
        ("data was ", house, {"data_fingerprint": "other"}),
        ("rank was 8 and is 4", house, {"lora": replace(job.lora, r=4)}),
        ("learning_rate was 0.02 and is 0.01", house, {"sft": slower}),
        ("base was '", settings(BASE_MODEL=tmp_path / "other"), {}),
    ):
        with pytest.raises(
            ValueError, match=re.escape(f"another run: {what}")
        ) as error:
            training.fine_tune(where, replace(job, **asked), tiny_model, tiny_tokenizer)
        assert "Nothing was changed. To start over, delete" in str(error.value)
        assert str(error.value).count(" and is ") == 1  # that, and nothing else
        assert contents(house.run_dir) == before


# --- a disk that takes no more --------------------------------------------------------


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(
    tmp_path, tiny_folder, monkeypatch, capsys
):
    folder, plain = tmp_path / "checkpoints", os.fsync
    full_at = 2

    def fsync(file):
        if (checkpoints.staging_folder(folder) / f"checkpoint-{full_at}").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(file)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="step 2 .*…/checkpoints .No sp.* is none yet"):
        fine_tune(tmp_path, tiny_folder)
    full_at = 4
    with pytest.raises(OSError, match="step 4 .*; that of step 2 stays. Make room"):
        fine_tune(tmp_path, tiny_folder)
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]
    full_at = None
    fine_tune(tmp_path, tiny_folder)
    assert "Going on after step 2" in capsys.readouterr().out
    assert list(checkpoints.complete(folder)) == [4, 6]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 3 MB; it takes root to mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(disk)]
    if not shutil.which("mount") or subprocess.run(command, stderr=-3).returncode:
        pytest.skip("no small disk can be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


class Fill(TrainerCallback):
    """Fills the disk after step 3, up to `left` bytes."""

    def __init__(self, disk: Path, left: int):
        self.disk, self.left = disk, left

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            size = shutil.disk_usage(self.disk).free - self.left
            (self.disk / "filler").write_bytes(bytes(size))


def test_whichever_library_meets_the_full_disk_the_message_is_the_same(
    small_disk, tiny_folder, capsys
):
    causes = set()
    for left in (0, 8_192, 61_440, 122_880):  # of 140,000 bytes that it takes
        fill = Fill(small_disk, left)
        with pytest.raises(
            OSError, match="of step 4 .* MB free.; that of step 2 stays"
        ) as error:
            fine_tune(small_disk / "run", tiny_folder, callbacks=[fill])
        causes.add(type(error.value.__cause__))
        (small_disk / "filler").unlink()
    assert len(causes) == 4  # of Python, safetensors, tokenizers and PyTorch
    fine_tune(small_disk / "run", tiny_folder)
    assert "Going on after step 2" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_is_named_before_the_training(
    tmp_path, tiny_folder
):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="cannot write to …/checkpoints .*set RUN_DIR"):
        fine_tune(tmp_path / "file" / "run", tiny_folder)


def test_a_read_only_folder_is_named_before_the_training(
    tmp_path, tiny_folder, monkeypatch
):
    def write(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "write_text", write)
    monkeypatch.delattr(training, "LoggedTrainer")
    with pytest.raises(OSError, match="checkpoints .Read-only file system.; set RUN_D"):
        fine_tune(tmp_path / "run", tiny_folder)
