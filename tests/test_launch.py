"""One run in two processes learns what it learns in one."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
from test_training import assert_same_log, assert_same_weights, make_job

from utils import launch, models, training
from utils.config import ROOT
from utils.results import read_lines, training_log


@pytest.fixture
def house(settings, tiny_folder):
    return settings(BASE_MODEL=tiny_folder)


def test_two_processes_learn_what_one_does(
    house, settings, tmp_path, tiny_folder, tiny_tokenizer, monkeypatch, capfd
):
    alone = settings(BASE_MODEL=tiny_folder, RUN_DIR=tmp_path / "alone")
    job = make_job(alone, tiny_tokenizer, max_steps=4)
    assert len(job.validation) % 2  # the two cannot share them evenly
    base = models.load_base(house)
    tuned = training.fine_tune(alone, job, base, tiny_tokenizer)

    job = make_job(house, tiny_tokenizer, max_steps=4)
    monkeypatch.setenv("BASE_MODEL", str(tiny_folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch.on_every_gpu(house, job, processes=2)
    said = capfd.readouterr().out
    assert "2 processes share each step's 4 rows." in said
    rows = read_lines(training_log(house, job.name))
    assert_same_log(rows, read_lines(training_log(alone, job.name)), 1e-4)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]

    # The notebook reads what they have left.
    shared = training.fine_tune(house, job, models.load_base(house), tiny_tokenizer)
    assert "This run is finished: step 4" in capfd.readouterr().out
    assert_same_weights(shared, tuned, 1e-4)


@pytest.mark.slow
def test_one_process_that_is_short_of_memory_ends_all_with_advice(
    house, tmp_path, tiny_folder, tiny_tokenizer
):
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import os, sys, torch\n"
        "from utils import launch, training\n"
        "def too_much(*_):\n"
        "    raise torch.OutOfMemoryError('CUDA out of memory')\n"
        "if os.environ['RANK'] == '1':\n"
        "    training.LoggedTrainer.training_step = too_much\n"
        "launch.main(sys.argv[1:])\n"
    )
    job = launch.write_job(house, make_job(house, tiny_tokenizer))
    names = {"PROFILE": "pocket", "BASE_MODEL": tiny_folder, "RUN_DIR": house.run_dir}
    names |= {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc_per_node", "2", driver, job],
        env=os.environ | {name: str(value) for name, value in names.items()},
        capture_output=True,
        text=True,
        timeout=120,  # it would wait for half an hour
    )
    assert done.returncode
    assert (
        "Out of memory in one of 2 processes. Set per_device_train_batch_size=1 and "
        "gradient_accumulation_steps=4, or gradient_checkpointing=True" in done.stdout
    )


def test_a_process_that_is_missing_is_noticed(house, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LAUNCHED", "3")
    with pytest.raises(RuntimeError, match="3 processes were asked for and 2 started"):
        launch.main([str(tmp_path)])


def test_a_job_is_read_as_it_was_written(house, tiny_tokenizer):
    job = make_job(house, tiny_tokenizer, dropout=0.1, lr_scheduler_type="cosine")
    read = launch.read_job(launch.write_job(house, job))
    assert read.lora == job.lora
    assert training.arguments_of(read.sft) == training.arguments_of(job.sft)
    assert replace(read, lora=None, sft=None) == replace(job, lora=None, sft=None)
    ours, theirs = (training.identity_of(house, j, "base") for j in (job, read))
    assert ours == theirs


def test_secrets_are_not_written(house, tiny_tokenizer):
    job = make_job(house, tiny_tokenizer, hub_token="hf_secret")
    folder = launch.write_job(house, job)
    assert "hf_secret" not in (folder / "job.json").read_text("utf-8")


def test_a_missing_job_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="…/job.json is not there; notebook 02"):
        launch.read_job(tmp_path)
