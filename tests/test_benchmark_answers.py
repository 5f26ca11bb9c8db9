"""Batched against one by one: what is counted as the same, a near-tie, a difference."""

import pytest
import torch
from test_models import lively

from utils import benchmark, benchmark_answers, prompts

QUESTIONS = ("Burn?", "How do I stop a nosebleed that goes on?", "Is he safe to move?")


@pytest.fixture
def asked(tiny_model, tiny_tokenizer):
    model = lively(tiny_model, tiny_tokenizer)
    texts = [
        prompts.prompt_text(tiny_tokenizer, prompts.first_aid_messages(question))
        for question in QUESTIONS
    ]
    return model, tiny_tokenizer, texts


def test_both_sides_answer_the_same_questions(asked):
    found = benchmark_answers.compare(*asked, max_new_tokens=6, batch_size=2)
    assert found["questions"] == 3
    assert found["identical"] + found["near_ties"] == 3
    assert found["other_differences"] == 0
    assert found["tokens_one_by_one"] == 18
    speeds = [found[f"tokens_per_second_{s}"] for s in ("batched", "one_by_one")]
    assert found["ratio"] == pytest.approx(speeds[0] / speeds[1], rel=0.05)


def test_the_gap_is_that_of_the_two_best_logits_where_answers_part(asked):
    model, tokenizer, texts = asked
    ids = tokenizer(texts[0], add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*ids, 40]])).logits[0, -1]
    best, second = logits.sort(descending=True).values[:2].tolist()
    gap = benchmark_answers.first_gap(model, tokenizer, texts[0], [40, 41], [40, 42])
    assert gap == pytest.approx(best - second, abs=1e-5)
    # One answer ends where the other goes on: they part at its end.
    shorter = benchmark_answers.first_gap(model, tokenizer, texts[0], [40], [40, 42])
    assert shorter == pytest.approx(gap)


def test_a_difference_that_is_no_near_tie_is_counted(asked, monkeypatch):
    def alter(model, tokenizer, texts, *, max_new_tokens):
        return [[40 + len(texts)] for _ in texts]

    monkeypatch.setattr(benchmark_answers.generation, "generate_tokens", alter)
    found = benchmark_answers.compare(*asked, max_new_tokens=6, batch_size=3)
    assert found["identical"] == 0
    assert found["near_ties"] + found["other_differences"] == 3
    monkeypatch.setattr(benchmark_answers, "NEAR_TIE", 0.0)
    found = benchmark_answers.compare(*asked, max_new_tokens=6, batch_size=3)
    assert found["other_differences"] == 3


def test_the_benchmark_has_the_section(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--help"])
    assert "answers" in capsys.readouterr().out
