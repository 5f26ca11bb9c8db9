"""A few real steps of the trainer on the tiny model, and what they leave behind."""

import copy
import gc
import math
import time
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback, TrainingArguments
from trl import SFTConfig

from utils import models, prompts, training
from utils.config import load_settings
from utils.results import read_lines, split_log, training_log

# Every run collects garbage; without what was imported that takes half the time.
gc.freeze()

STEP_FIELDS = [
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
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


def make_job(settings, tokenizer, dropout=0.0, **changes):
    """A job of 13 rows, 3 steps an epoch, 4 rows a step, a checkpoint every 2 steps."""
    arguments = dict(
        output_dir=str(settings.run_dir / "checkpoints"),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=2,
        learning_rate=2e-2,
        warmup_steps=2,
        max_length=None,
        gradient_checkpointing=False,
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        seed=1,
        **models.choose_precision((0, 0)).trainer_flags,
    )
    rows = [(f"Case {i}?", "Cool it under water. " * (i % 7 + 1)) for i in range(13)]
    return training.Job(
        "first_aid",
        LoraConfig(
            r=8,
            lora_dropout=dropout,
            target_modules=["q_proj", "v_proj", "down_proj"],
            task_type="CAUSAL_LM",
        ),
        SFTConfig(**(arguments | changes)),
        encode(tokenizer, rows),
        encode(tokenizer, HELD_OUT),
        "the data's fingerprint",
    )


@pytest.fixture
def build(tmp_path, tiny_model, tiny_tokenizer):
    """Makes a trainer; keyword arguments change its `SFTConfig`."""

    def make(model=None, **changes):
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
            model=model or copy.deepcopy(tiny_model),
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


def fine_tune(folder, base_folder, base=None, callbacks=(), layers=None, **changes):
    """Fine-tune in a run folder; the model and the rows of its log."""
    names = {"PROFILE": "pocket", "BASE_MODEL": base_folder, "RUN_DIR": folder}
    settings = load_settings({name: str(value) for name, value in names.items()})
    tokenizer = models.load_tokenizer(settings.base_model)
    job = make_job(settings, tokenizer, **changes)
    if layers:
        job = replace(job, lora=LoraConfig(r=8, target_modules=layers))
    base = base or models.load_base(settings)
    tuned = training.fine_tune(settings, job, base, tokenizer, callbacks=callbacks)
    return tuned, read_lines(training_log(settings, job.name))


@pytest.fixture
def run(tmp_path, tiny_folder):
    """Fine-tunes in the run folder of the given name."""
    return lambda name, **how: fine_tune(tmp_path / name, tiny_folder, **how)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_folder):
    """A run that nothing has interrupted, and its log's rows."""
    return fine_tune(tmp_path_factory.mktemp("whole"), tiny_folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory, tiny_folder):
    """The same with half the micro-batch, two of them a step."""
    how = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    return fine_tune(tmp_path_factory.mktemp("small"), tiny_folder, **how)


def weights(model):
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def assert_same_weights(model, other, tolerance=1e-6):
    ours, theirs = weights(model), weights(other)
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 3 * 2  # A and B, layers
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], rtol=0, atol=tolerance), name


def assert_same_log(rows, others, tolerance=1e-5):
    for ours, theirs in zip(rows, others, strict=True):
        assert ours.keys() == theirs.keys() and ours["step"] == theirs["step"]
        for key in {"tokens", "learning_rate", "loss", "eval_nll"} & ours.keys():
            assert ours[key] == pytest.approx(theirs[key], abs=tolerance), ours["step"]


def token_losses(model, row, labels):
    """The loss of every position of a row that has a label, from full logits."""
    model.eval()
    labels = torch.tensor(labels)[1:]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
    kept = labels != -100
    log_p = logits[kept].log_softmax(-1)
    return -log_p.gather(1, labels[kept][:, None])[:, 0]


def token_weighted_nll(model, rows):
    losses = [token_losses(model, row, row["labels"]) for row in rows]
    return torch.cat(losses).mean().item()


def whole_text_nll(model, rows):
    means = [token_losses(model, row, row["input_ids"]).mean() for row in rows]
    return torch.stack(means).mean().item()


# --- the log --------------------------------------------------------------------------


def test_every_step_and_evaluation_is_a_line(build, tiny_model, tiny_tokenizer):
    trainer = build()
    trainer.train()
    lines = read_lines(trainer.log_lines.path)
    steps, evaluations = split_log(lines)
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert [row["step"] for row in evaluations] == [0, 2, 4]
    assert len(lines) == 7
    for row in steps:
        assert list(row) == STEP_FIELDS
        assert all(math.isfinite(row[name]) for name in STEP_FIELDS)
        assert row["tokens_per_second"] > 0 and row["memory_gb"] > 0
    for row in evaluations:
        scores = ["eval_nll", "eval_perplexity", "eval_whole_text"]
        assert list(row) == ["step", "epoch", *scores]
        assert row["eval_perplexity"] == pytest.approx(math.exp(row["eval_nll"]))
    # Two batches an epoch; warm-up over two steps, then linearly to zero.
    assert [row["epoch"] for row in steps] == [0.5, 1.0, 1.5, 2.0]
    rates = [row["learning_rate"] for row in steps]
    assert rates == pytest.approx([0, 0.01, 0.02, 0.01])
    elapsed = [row["elapsed_s"] for row in steps]
    assert elapsed == sorted(elapsed)
    assert steps[-1]["loss"] < steps[0]["loss"]

    rows = encode(tiny_tokenizer, HELD_OUT)
    for model, found in ((tiny_model, evaluations[0]), (trainer.model, evaluations[2])):
        nll, whole = token_weighted_nll(model, rows), whole_text_nll(model, rows)
        assert found["eval_nll"] == pytest.approx(nll, rel=1e-4)
        assert found["eval_whole_text"] == pytest.approx(whole, rel=1e-4)
        # What the Trainer would have given is measurably something else.
        halves = [token_weighted_nll(model, rows[i : i + 2]) for i in (0, 2)]
        assert abs(sum(halves) / 2 - nll) > 0.001 * nll
        assert abs(whole - nll) > 0.001 * nll
    assert evaluations[0]["eval_nll"] - evaluations[2]["eval_nll"] > 0.01


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_every_token_weighs_the_same_whatever_the_micro_batch(
    build, tiny_model, tiny_tokenizer, micro
):
    trainer = build(
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=4 // micro,
        max_steps=1,
        eval_strategy="no",
        eval_on_start=False,
    )
    trainer.train()
    steps, _ = split_log(read_lines(trainer.log_lines.path))
    rows = encode(tiny_tokenizer, TRAIN)  # all four of them are the one step
    assert steps[0]["loss"] == pytest.approx(token_weighted_nll(tiny_model, rows))
    assert steps[0]["tokens"] == sum(len(row["input_ids"]) for row in rows)


def test_tokens_per_second_are_tokens_by_seconds(build):
    trainer = build(eval_strategy="no", eval_on_start=False, max_steps=3)
    # Slow steps, so that the log's milliseconds do not matter.
    trainer.model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    trainer.train()
    steps, _ = split_log(read_lines(trainer.log_lines.path))
    for before, now in zip(steps, steps[1:]):
        seconds = now["elapsed_s"] - before["elapsed_s"]
        assert now["tokens"] == pytest.approx(
            now["tokens_per_second"] * seconds, rel=0.05
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
    steps, _ = split_log(read_lines(trainer.log_lines.path))
    assert [row["step"] for row in steps] == [1, 2]  # kept, up to there


def test_a_diverged_evaluation_stops_the_run(build):
    trainer = build()
    with torch.no_grad():
        trainer.model.get_base_model().lm_head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="diverged"):
        trainer.train()


# --- what a step learns from ----------------------------------------------------------


def test_padding_is_what_fills_a_batch_up_to_its_longest_row():
    lengths = [1, 3, 2, 2]
    assert training.padding_share(lengths, [0, 1, 2, 3], 2) == pytest.approx(2 / 10)
    assert training.padding_share(lengths, [0, 2, 3, 1], 2) == pytest.approx(2 / 10)
    assert training.padding_share(lengths, [1, 0, 2, 3], 4) == pytest.approx(4 / 12)


def epoch_of(sampler, epoch, batch):
    sampler.epoch = epoch
    order = list(sampler)
    return [order[at : at + batch] for at in range(0, len(order), batch)]


def test_the_order_depends_on_seed_and_epoch_alone():
    lengths = [(i * 37) % 101 for i in range(100)]
    first = training.LengthGroups(lengths, 8, seed=1)
    again = training.LengthGroups(lengths, 8, seed=1)
    other = training.LengthGroups(lengths, 8, seed=2)
    later = epoch_of(first, 3, 8)
    epochs = [epoch_of(first, epoch, 8) for epoch in range(3)]
    torch.manual_seed(7)  # nor on anybody's generator
    assert epoch_of(again, 3, 8) == later
    assert [epoch_of(again, epoch, 8) for epoch in range(3)] == epochs
    assert epoch_of(other, 0, 8) != epochs[0] != epochs[1]


def test_a_batch_holds_rows_of_like_lengths_and_the_longest_comes_first():
    lengths = [(i * 37) % 160 for i in range(160)]  # 0 to 159, in disorder
    groups = training.LengthGroups(lengths, 8, seed=1)
    batches = epoch_of(groups, 0, 8)
    held = [sorted(lengths[i] for i in batch) for batch in batches]
    assert sorted(held) == [list(range(at, at + 8)) for at in range(0, 160, 8)]
    assert held[0][-1] == 159
    assert held[1:] != sorted(held[1:], reverse=True)  # and the rest is shuffled


def test_each_row_is_seen_once_and_others_are_left_over_in_each_epoch():
    groups = training.LengthGroups([5] * 11, 4, seed=1)
    assert len(groups) == 8
    left_over = set()
    for epoch in range(6):
        order = sum(epoch_of(groups, epoch, 4), [])
        assert len(order) == len(set(order)) == 8
        left_over |= {*range(11)} - {*order}
    assert len(left_over) > 3
    assert len(training.LengthGroups([5] * 3, 4, seed=1)) == 3  # fewer than a batch


def test_a_step_learns_from_the_same_rows_whatever_the_micro_batch(build):
    partitions = []
    for micro in (1, 2, 4):
        accumulated = 4 // micro
        trainer = build(
            per_device_train_batch_size=micro, gradient_accumulation_steps=accumulated
        )
        trainer.train_dataset = training.to_dataset(
            [{"input_ids": [i] * (i % 5 + 2), "labels": [i] * 9} for i in range(14)]
        )
        sampler = trainer.get_train_dataloader().batch_sampler
        batches = list(sampler)
        assert [len(batch) for batch in batches] == [micro] * (12 // micro)
        partitions.append(
            [
                sorted(sum(batches[at : at + accumulated], []))
                for at in range(0, len(batches), accumulated)
            ]
        )
    assert partitions[0] == partitions[1] == partitions[2]


def test_a_micro_batch_divides_its_share():
    assert training.micro_batch(40, 40) == 40
    assert training.micro_batch(40, 20) == 20
    assert training.micro_batch(12, 8) == 6  # eight would leave four rows out
    assert training.micro_batch(15, 7) == 5
    assert training.micro_batch(7, 3) == 1


def test_adapters_are_float32_on_a_4_bit_base(build, settings, tiny_folder):
    house = settings(BASE_MODEL=tiny_folder, LOAD_IN_4BIT=1)
    trainer = build(models.load_base(house, models.choose_precision((0, 0))))
    adapter = weights(trainer.model)
    assert {value.dtype for value in adapter.values()} == {torch.float32}
    trainer.train()
    steps, _ = split_log(read_lines(trainer.log_lines.path))
    assert steps[-1]["loss"] < steps[0]["loss"]


# --- memory ---------------------------------------------------------------------------


@pytest.fixture
def short_of_memory(monkeypatch):
    """Makes training steps fail for which `too_much(trainer, call)` is true."""

    def make(too_much):
        plain, calls = training.LoggedTrainer.training_step, []

        def step(trainer, *args, **kwargs):
            calls.append(1)
            if too_much(trainer, len(calls)):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2")
            return plain(trainer, *args, **kwargs)

        monkeypatch.setattr(training.LoggedTrainer, "training_step", step)

    return make


# In the first step, and in the fourth, after the checkpoint of step 2.
@pytest.mark.parametrize("when", [1, 4])
def test_when_memory_is_short_the_micro_batch_is_halved_and_nothing_else(
    run, small, short_of_memory, capsys, when
):
    capsys.readouterr()
    short_of_memory(lambda trainer, call: call == when)
    tuned, rows = run("short")
    said = capsys.readouterr().out
    assert "Out of memory (CUDA out of memory. Tried to allocate 2)" in said
    assert "Micro-batch 2 now, 2 of them a step; the effective batch stays 4" in said
    assert ("Going on after step 2" in said) == (when == 4)
    assert_same_weights(tuned, small[0])
    assert_same_log(rows, small[1])


def test_when_one_row_is_too_much_activations_are_recomputed(
    run, whole, tiny_model, short_of_memory, capsys
):
    forwards = []
    tiny_model.model.layers[0].mlp.register_forward_pre_hook(
        lambda module, *_: forwards.append(module.training)
    )
    short_of_memory(lambda trainer, call: not trainer.args.gradient_checkpointing)
    tuned, rows = run("short", base=tiny_model)
    said = capsys.readouterr().out
    assert said.count("Out of memory") == 3  # with 4, 2 and 1 rows
    assert "Micro-batch 1 now, 4 of them a step" in said
    assert "Activations are recomputed now." in said
    assert sum(forwards) == 2 * 6 * 4  # in training: 6 steps of 4 rows, twice
    assert_same_weights(tuned, whole[0], 1e-5)
    assert_same_log(rows, whole[1])


def test_when_even_that_is_too_much_the_error_stays(run, short_of_memory):
    short_of_memory(lambda trainer, call: True)
    with pytest.raises(torch.OutOfMemoryError):
        run("hopeless")


# --- what cannot be run ---------------------------------------------------------------


def test_a_large_model_without_a_gpu_is_refused_with_a_way_out(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(training, "CPU_LIMIT", 1000)
    with pytest.raises(RuntimeError, match="no GPU.*T4 GPU.*PROFILE=pocket.*MAX_STEPS"):
        run("days")
    _, rows = run("a look", max_steps=1)
    assert rows[-1]["step"] == 1


def test_an_effective_batch_that_processes_cannot_share_is_refused(
    settings, tiny_model, tiny_tokenizer, monkeypatch
):
    job = make_job(settings(), tiny_tokenizer)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="batch of 4 rows cannot be shared by 3"):
        training.fine_tune(settings(), job, tiny_model, tiny_tokenizer)


# --- stopped, and called again --------------------------------------------------------


class Stop(TrainerCallback):
    """Somebody presses Ctrl-C at the end of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step, where", [(1, "at step 0"), (5, "after step 4")])
def test_a_stopped_run_says_where_it_goes_on_and_ends_as_if_nothing_had_been(
    run, whole, tiny_model, capsys, step, where
):
    with pytest.raises(KeyboardInterrupt):
        run("stopped", base=tiny_model, callbacks=[Stop(step)])
    assert f"Stopped. Run the cell again, and it goes on {where}." in (
        capsys.readouterr().out
    )
    tuned, rows = run("stopped", base=tiny_model)  # the same base: the same kernel
    assert ("Going on after step 4" in capsys.readouterr().out) == (step == 5)
    assert_same_weights(tuned, whole[0])
    assert_same_log(rows, whole[1])
    elapsed = [row["elapsed_s"] for row in rows if "loss" in row]
    assert elapsed == sorted(elapsed)


def test_a_finished_run_is_not_trained_again(run, tiny_model, monkeypatch, capsys):
    tuned, log = run("once")
    # Two GPUs, as in a notebook on Kaggle after torchrun has done the work: TRL's
    # trainer would raise.
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 2))
    with pytest.raises(ValueError, match="nn.DataParallel"):
        run("twice")
    again, rows = run("once", base=tiny_model)
    assert "This run is finished: step 6" in capsys.readouterr().out
    assert rows == log
    assert_same_weights(again, tuned, 0)
    assert all(value.requires_grad for value in weights(again).values())
    assert not again.training


def test_a_run_that_ends_within_an_epoch_is_finished_at_its_last_step(run, capsys):
    _, log = run("once", num_train_epochs=1.5)
    assert log[-1]["step"] == 5  # three steps an epoch, rounded up as the Trainer does
    run("once", num_train_epochs=1.5)
    assert "This run is finished: step 5" in capsys.readouterr().out


def test_an_adapter_of_an_earlier_call_leaves_the_base(run, tiny_model):
    alone, _ = run("alone", layers=["q_proj"], max_steps=1)
    run("first", base=tiny_model, max_steps=1)
    tuned, _ = run("second", base=tiny_model, layers=["q_proj"], max_steps=1)
    ours, theirs = weights(tuned), weights(alone)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name])
