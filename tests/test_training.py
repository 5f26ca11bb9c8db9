"""A few real steps of the trainer on the tiny model, and what they leave behind."""

import copy
import json
import math
import time

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.utils import save_and_load
from trl import SFTConfig

from utils import models, prompts, training
from utils.results import read_lines, split_log

STEP_FIELDS = [
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "memory_gb",
    "elapsed_s",
]
TRAIN = [
    ("Burn?", "Cool it under running water."),
    ("Nosebleed?", "Lean forward and pinch the nose."),
    ("Choking?", "Give five back blows."),
    ("Sprain?", "Rest it."),
]
# Unequal lengths in batches of two: a mean of batch means would be another number.
HELD_OUT = [
    ("Bee sting?", "Scrape it out, cool it, and watch how the person breathes."),
    ("Heat?", "Go to the shade, lie down, cool the skin and sip water slowly."),
    ("Splinter?", "Pull it out."),
]


def encode(tokenizer, pairs):
    return [prompts.encode(tokenizer, prompts.first_aid_messages(*p)) for p in pairs]


@pytest.fixture
def build(tmp_path, tiny_model, tiny_tokenizer):
    """Makes a trainer; keyword arguments change its `SFTConfig`."""

    def make(**changes):
        arguments = dict(
            output_dir=str(tmp_path / "checkpoints"),
            max_steps=4,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            learning_rate=2e-2,
            lr_scheduler_type="linear",
            warmup_steps=2,
            max_length=None,
            eval_strategy="steps",
            eval_steps=2,
            eval_on_start=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=1,
            **models.choose_precision((0, 0)).trainer_flags,
        )
        return training.LoggedTrainer(
            model=copy.deepcopy(tiny_model),
            args=SFTConfig(**(arguments | changes)),
            peft_config=LoraConfig(
                r=8, target_modules=["q_proj", "v_proj", "down_proj"]
            ),
            train_dataset=training.to_dataset(encode(tiny_tokenizer, TRAIN)),
            evaluation_rows=encode(tiny_tokenizer, HELD_OUT),
            processing_class=tiny_tokenizer,
            log_path=tmp_path / "run" / "training_first_aid.jsonl",
        )

    return make


def token_weighted_nll(model, rows):
    """Sum of token losses over number of tokens, from full logits, row by row."""
    model.eval()
    total = tokens = 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        kept = labels != -100
        log_p = logits[kept].log_softmax(-1)
        total -= log_p.gather(1, labels[kept][:, None]).sum().item()
        tokens += int(kept.sum())
    return total / tokens


def test_every_step_and_evaluation_is_a_line(build, tiny_model, tiny_tokenizer):
    trainer = build()
    trainer.log_path.parent.mkdir(parents=True)
    trainer.log_path.write_text('{"step": 99, "loss": 1}\n')  # of an earlier run
    trainer.train()
    lines = read_lines(trainer.log_path)
    steps, evaluations = split_log(lines)
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert [row["step"] for row in evaluations] == [0, 2, 4]
    assert len(lines) == 7
    for row in steps:
        assert list(row) == STEP_FIELDS
        assert all(math.isfinite(row[name]) for name in STEP_FIELDS)
        assert row["tokens_per_second"] > 0 and row["memory_gb"] > 0
    for row in evaluations:
        assert set(row) == {"step", "epoch", "eval_nll", "eval_perplexity"}
        assert row["eval_perplexity"] == pytest.approx(math.exp(row["eval_nll"]))
    # Two batches an epoch; warm-up over two steps, then linearly to zero.
    assert [row["epoch"] for row in steps] == [0.5, 1.0, 1.5, 2.0]
    rates = [row["learning_rate"] for row in steps]
    assert rates == pytest.approx([0, 0.01, 0.02, 0.01])
    assert [row["elapsed_s"] for row in steps] == sorted(
        row["elapsed_s"] for row in steps
    )
    assert steps[-1]["loss"] < steps[0]["loss"]

    rows = encode(tiny_tokenizer, HELD_OUT)
    before = token_weighted_nll(tiny_model, rows)
    after = token_weighted_nll(trainer.model, rows)
    assert evaluations[0]["eval_nll"] == pytest.approx(before, rel=1e-4)
    assert evaluations[-1]["eval_nll"] == pytest.approx(after, rel=1e-4)
    assert abs(before - after) > 0.01
    # What the Trainer would have given is measurably something else.
    halves = [token_weighted_nll(trainer.model, rows[i : i + 2]) for i in (0, 2)]
    assert abs(sum(halves) / 2 - after) > 0.001 * after

    summary = trainer.summary
    assert summary["steps"] == 4
    assert 0 < summary["training_seconds"] <= summary["seconds"] + 0.1


def test_tokens_per_second_counts_every_token_once(build, tiny_tokenizer):
    """With accumulation, too: two batches of two rows are one step."""
    trainer = build(eval_strategy="no", eval_on_start=False, max_steps=3)
    trainer.args.gradient_accumulation_steps = 2
    # Slow steps, so that the log's milliseconds do not matter.
    trainer.model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    trainer.train()
    steps, _ = split_log(read_lines(trainer.log_path))
    an_epoch = sum(len(row["input_ids"]) for row in encode(tiny_tokenizer, TRAIN))
    for before, now in zip(steps, steps[1:]):
        seconds = now["elapsed_s"] - before["elapsed_s"]
        assert now["tokens_per_second"] * seconds == pytest.approx(an_epoch, rel=0.1)
    total = trainer.summary["tokens_per_second"] * trainer.summary["training_seconds"]
    assert total == pytest.approx(3 * an_epoch, rel=0.5)  # tenths of a second


def test_the_adapter_is_saved_without_anybodys_folders(
    build, tmp_path, tiny_model, tiny_tokenizer, settings, monkeypatch
):
    def no_hub(name, *_, **__):
        raise AssertionError(f"saving asked the Hub for {name}")

    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", no_hub)
    base = tmp_path / "somewhere" / "my_base"
    tiny_model.save_pretrained(base)
    trainer = build(eval_strategy="no", eval_on_start=False, max_steps=2)
    trainer.model.get_base_model().config._name_or_path = str(base)
    for config in trainer.model.peft_config.values():
        config.base_model_name_or_path = str(base)  # what PEFT would keep
    trainer.train()
    folder = tmp_path / "adapter"
    training.save_adapter(
        trainer, folder, settings(BASE_MODEL=base), {"rows": {"train": 4}}
    )
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.safetensors",
        models.ADAPTER_INFO,
    }
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == "my_base"
    for path in folder.glob("*.json"):
        assert str(tmp_path) not in path.read_text("utf-8")
    info = models.read_adapter_info(folder)
    assert info["rows"] == {"train": 4}
    assert info["base_model"] == "my_base"
    assert info["versions"]["peft"] and info["seed"]

    rows = encode(tiny_tokenizer, HELD_OUT)
    again = PeftModel.from_pretrained(copy.deepcopy(tiny_model), folder)
    assert token_weighted_nll(again, rows) == pytest.approx(
        token_weighted_nll(trainer.model, rows), rel=1e-5
    )


def test_a_loss_that_is_not_finite_stops_the_run(build):
    trainer = build(eval_strategy="no", eval_on_start=False)
    plain, calls = trainer.compute_loss, []

    def spoil_the_third(*args, **kwargs):
        calls.append(1)
        loss = plain(*args, **kwargs)
        return loss * math.nan if len(calls) == 3 else loss

    trainer.compute_loss = spoil_the_third
    with pytest.raises(FloatingPointError, match="step 3: the loss is nan"):
        trainer.train()
    steps, _ = split_log(read_lines(trainer.log_path))
    assert [row["step"] for row in steps] == [1, 2]  # kept, up to there


def test_a_diverged_evaluation_stops_the_run(build):
    trainer = build()
    with torch.no_grad():
        trainer.model.get_base_model().lm_head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="diverged"):
        trainer.train()


def test_peak_memory_is_this_process_in_gigabytes():
    block = torch.ones(60_000_000)  # 0.24 GB
    peak = training.peak_memory_gb()
    assert block.numel() * 4 / 1e9 < peak < 200
