"""Answers in batches, streamed answers, and the loss of an answer."""

import copy
import threading
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_models import lively

from utils import prompts
from utils.generation import answer_nll, generate_answers, stream_answer

QUESTIONS = (
    "Burn?",
    "How do I stop a nosebleed that has gone on for more than ten minutes?",
    "What should I do when a child has swallowed a button battery at home?",
    "Is it safe to move her?",
    "A man has collapsed in the street and he does not breathe. What now, please?",
)
CAP = 12


@pytest.fixture
def conversations():
    return [prompts.first_aid_messages(question) for question in QUESTIONS]


@pytest.fixture
def tiny_model(tiny_model, tiny_tokenizer):
    """The tiny model, made to say different things."""
    return lively(tiny_model, tiny_tokenizer)


@pytest.fixture
def adapted(tiny_model):
    """The tiny model with a random adapter that says something else."""
    torch.manual_seed(3)
    lora = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(copy.deepcopy(tiny_model), lora).eval()


def solo(model, tokenizer, messages, cap=CAP):
    """Greedy decoding of one prompt with nothing but the forward pass."""
    text = prompts.prompt_text(tokenizer, messages)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    begun = ids.shape[1]
    with torch.no_grad():
        for _ in range(cap):
            best = model(input_ids=ids).logits[:, -1].argmax(-1)
            ids = torch.cat([ids, best[:, None]], dim=1)
            if best.item() == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[0, begun:], skip_special_tokens=True).strip()


def test_batched_answers_are_the_solo_answers_in_order(
    tiny_model, tiny_tokenizer, conversations
):
    alone = [solo(tiny_model, tiny_tokenizer, messages) for messages in conversations]
    assert len(set(alone)) > 1  # else an order mixed up would not show
    for batch_size in (2, 5):
        found = generate_answers(
            tiny_model,
            tiny_tokenizer,
            conversations,
            max_new_tokens=CAP,
            batch_size=batch_size,
            progress=None,
        )
        assert [row["answer"] for row in found] == alone


def test_the_cap_is_flagged(tiny_model, tiny_tokenizer, conversations):
    rows = generate_answers(
        tiny_model, tiny_tokenizer, conversations, max_new_tokens=CAP, progress=None
    )
    for row in rows:
        assert row["hit_cap"] is True
        assert row["tokens"] == CAP
        assert row["seconds"] >= 0


def test_an_ended_answer_is_not_flagged(tiny_model, tiny_tokenizer, conversations):
    """One row of a batch ends early; the others go on to the cap."""
    model = copy.deepcopy(tiny_model)
    text = prompts.prompt_text(tiny_tokenizer, conversations[0])
    ids = tiny_tokenizer(text, add_special_tokens=False, return_tensors="pt")
    free = model.generate(**ids, do_sample=False, max_new_tokens=4, eos_token_id=None)
    third = free[0, -2].item()  # let the third new token be one that ends a turn
    earlier = free[0, ids["input_ids"].shape[1] : -2].tolist()
    assert third not in earlier, "another seed: the token came before"
    model.generation_config.eos_token_id = [third]
    rows = generate_answers(
        model, tiny_tokenizer, conversations, max_new_tokens=CAP, progress=None
    )
    assert rows[0]["hit_cap"] is False
    assert rows[0]["tokens"] == 3
    assert rows[0]["answer"] == tiny_tokenizer.decode(earlier).strip()


def test_no_conversations_give_no_answers(tiny_model, tiny_tokenizer):
    assert (
        generate_answers(
            tiny_model, tiny_tokenizer, [], max_new_tokens=CAP, progress=None
        )
        == []
    )


def encoded_rows(tokenizer):
    answers = (
        "Yes.",
        "Press on it and call 112 at once.",
        "Sit down and rest a while.",
    )
    rows = [
        prompts.encode(tokenizer, prompts.first_aid_messages(question, answer))
        for question, answer in zip(QUESTIONS, answers)
    ]
    twice = [
        *prompts.first_aid_messages(QUESTIONS[0], answers[0]),
        {"role": "user", "content": QUESTIONS[3]},
        {"role": "assistant", "content": answers[1]},
    ]
    return [*rows, prompts.encode(tokenizer, twice)]


def full_logits_nll(model, row):
    """The same figure the plain way: all logits, one row, PyTorch's cross-entropy."""
    ids = torch.tensor([row["input_ids"]])
    labels = torch.tensor([row["labels"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(
        logits, labels[0, 1:], ignore_index=-100, reduction="sum"
    )
    return loss.item(), int((labels[0, 1:] != -100).sum())


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_answer_nll_is_cross_entropy(tiny_model, tiny_tokenizer, batch_size):
    rows = encoded_rows(tiny_tokenizer)
    found = answer_nll(tiny_model, rows, batch_size=batch_size)
    for (loss, count), row in zip(found, rows, strict=True):
        expected, tokens = full_logits_nll(tiny_model, row)
        assert count == tokens
        assert loss == pytest.approx(expected, rel=1e-5)


def test_answer_nll_with_the_adapter_on_and_off(tiny_model, adapted, tiny_tokenizer):
    rows = encoded_rows(tiny_tokenizer)
    with_adapter = answer_nll(adapted, rows)
    for (loss, _), row in zip(with_adapter, rows):
        assert loss == pytest.approx(full_logits_nll(adapted, row)[0], rel=1e-5)
    plain = answer_nll(tiny_model, rows)
    assert abs(with_adapter[0][0] - plain[0][0]) > 0.01
    with adapted.disable_adapter():
        off = answer_nll(adapted, rows)
    assert [loss for loss, _ in off] == pytest.approx(
        [loss for loss, _ in plain], rel=1e-5
    )


def test_answer_nll_of_many_positions(tiny_model, tiny_tokenizer, monkeypatch):
    """Cut into blocks of seven positions, nothing is lost between the blocks."""
    rows = encoded_rows(tiny_tokenizer)
    whole = answer_nll(tiny_model, rows)
    monkeypatch.setattr("utils.generation.POSITIONS_AT_ONCE", 7)
    cut = answer_nll(tiny_model, rows)
    assert [count for _, count in cut] == [count for _, count in whole]
    for (one, _), (other, _) in zip(cut, whole):
        assert one == pytest.approx(other, rel=1e-6)


def test_answer_nll_leaves_the_training_mode_alone(tiny_model, tiny_tokenizer):
    model = copy.deepcopy(tiny_model)
    rows = encoded_rows(tiny_tokenizer)[:1]
    for training in (True, False):
        model.train(training)
        answer_nll(model, rows)
        assert model.training is training


def test_the_stream_ends_with_the_batched_answer(
    tiny_model, adapted, tiny_tokenizer, conversations
):
    for model in (tiny_model, adapted):
        rows = generate_answers(
            model, tiny_tokenizer, conversations[:2], max_new_tokens=CAP, progress=None
        )
        for row, messages in zip(rows, conversations):
            texts = list(
                stream_answer(model, tiny_tokenizer, messages, max_new_tokens=CAP)
            )
            assert texts[-1] == row["answer"]
            for shorter, longer in zip(texts, texts[1:]):
                assert longer.startswith(shorter)  # it only grows


def test_a_seed_makes_sampling_repeatable(tiny_model, tiny_tokenizer, conversations):
    def sample(seed):
        *_, last = stream_answer(
            tiny_model,
            tiny_tokenizer,
            conversations[0],
            max_new_tokens=CAP,
            temperature=1.0,
            top_p=0.95,
            seed=seed,
        )
        return last

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_closing_the_stream_stops_the_computation(
    tiny_model, tiny_tokenizer, conversations
):
    model = copy.deepcopy(tiny_model)
    calls = []

    def count(*_):
        calls.append(1)
        time.sleep(0.005)

    model.register_forward_pre_hook(count)
    stream = stream_answer(model, tiny_tokenizer, conversations[0], max_new_tokens=400)
    next(stream)
    threads = threading.active_count()
    stream.close()
    stopped_at = len(calls)
    assert stopped_at < 350
    assert threading.active_count() < threads  # the generating thread has ended
    time.sleep(0.1)
    assert len(calls) == stopped_at


def test_an_error_while_generating_reaches_the_reader(
    tiny_model, tiny_tokenizer, conversations
):
    model = copy.deepcopy(tiny_model)
    calls = []

    def fail_at_the_fourth(*_):
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError("no memory left")

    hook = model.register_forward_pre_hook(fail_at_the_fourth)
    stream = stream_answer(model, tiny_tokenizer, conversations[0], max_new_tokens=CAP)
    with pytest.raises(RuntimeError, match="broke off: no memory left") as caught:
        list(stream)
    assert isinstance(caught.value.__cause__, MemoryError)
    hook.remove()  # and the next answer is whole again
    texts = list(
        stream_answer(model, tiny_tokenizer, conversations[0], max_new_tokens=CAP)
    )
    assert texts[-1] == solo(model, tiny_tokenizer, conversations[0])
