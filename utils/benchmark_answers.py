"""Measures batched answers against one by one: the same questions, model and machine.

Both sides are greedy, so they should say the same. Padding changes the order of sums in
the last digits, so where the two best logits nearly tie another token may win; every
difference is looked at, and those that are no near-tie are counted apart.
"""

import time
from collections.abc import Sequence

import torch

from utils import answers, dataset, generation, models, prompts, sources
from utils.config import load_settings

NEAR_TIE = 1e-3  # between the two best logits at the first token that differs


def on_cpu(rows: str, count: int, batch_size: int = 128) -> dict:
    """Let the tuned pocket model answer test questions both ways.

    Args:
        rows: a data set, as FIRST_AID_DATASET takes it.
        count: questions; fewer where the test split has no more.
        batch_size: questions at once on the batched side.

    Returns:
        `ratio` of tokens per second (batched / one by one) and what `compare` gives.
    """
    settings = load_settings({"PROFILE": "pocket", "FIRST_AID_DATASET": rows})
    model, tokenizer = models.load_three_models(settings, verbose=False)
    split = dataset.split_rows(sources.load_source(rows), progress=False)
    asked = answers.first_aid_questions(split.test)[:count]
    texts = [prompts.prompt_text(tokenizer, row["messages"]) for row in asked]
    with models.use_model(model, "first_aid") as chosen:
        return compare(chosen, tokenizer, texts, settings.max_new_tokens, batch_size)


def compare(
    model, tokenizer, texts: Sequence[str], max_new_tokens: int, batch_size: int
) -> dict:
    """Answer every prompt in `texts` one by one and in batches.

    Returns:
        `questions`, `tokens_one_by_one`, `tokens_batched`, `seconds_one_by_one`,
        `seconds_batched`, tokens per second of both, their `ratio`, how many answers
        are `identical`, and of the others `near_ties` and `other_differences`.
    """
    for size in (1, min(batch_size, len(texts))):  # the first call of a shape is slow
        generation.generate_tokens(model, tokenizer, texts[:size], max_new_tokens=4)
    alone, seconds_alone = _timed(model, tokenizer, texts, max_new_tokens, 1)
    batched, seconds = _timed(model, tokenizer, texts, max_new_tokens, batch_size)
    gaps = [
        first_gap(model, tokenizer, text, one, other)
        for text, one, other in zip(texts, alone, batched)
        if one != other
    ]
    near = sum(gap < NEAR_TIE for gap in gaps)
    tokens, tokens_alone = (sum(map(len, side)) for side in (batched, alone))
    found = {
        "questions": len(texts),
        "batch_size": batch_size,
        "tokens_one_by_one": tokens_alone,
        "tokens_batched": tokens,
        "seconds_one_by_one": round(seconds_alone, 2),
        "seconds_batched": round(seconds, 2),
        "tokens_per_second_one_by_one": round(tokens_alone / seconds_alone, 1),
        "tokens_per_second_batched": round(tokens / seconds, 1),
    }
    ratio = (tokens / seconds) / (tokens_alone / seconds_alone)
    return found | {
        "ratio": round(ratio, 2),
        "identical": len(texts) - len(gaps),
        "near_ties": near,
        "other_differences": len(gaps) - near,
        "threads": torch.get_num_threads(),
    }


def _timed(model, tokenizer, texts: Sequence[str], cap: int, size: int):
    """Token ids per prompt in the order given, and the seconds they took."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    found: list[list[int]] = [[] for _ in texts]
    began = time.perf_counter()
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        given = generation.generate_tokens(
            model, tokenizer, [texts[i] for i in batch], max_new_tokens=cap
        )
        for i, ids in zip(batch, given):
            found[i] = ids
    return found, time.perf_counter() - began


def first_gap(
    model, tokenizer, text: str, one: Sequence[int], other: Sequence[int]
) -> float:
    """How far apart the two best logits are where two answers first differ.

    Args:
        model: that gave both.
        tokenizer: its tokenizer.
        text: the prompt.
        one: token ids of an answer.
        other: of another one that is not the same.
    """
    shared = next(
        (n for n, (a, b) in enumerate(zip(one, other)) if a != b),
        min(len(one), len(other)),
    )
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([prompt + list(one[:shared])], device=model.device)
    with torch.inference_mode():
        best = model(input_ids=ids).logits[0, -1].float().topk(2).values
    return (best[0] - best[1]).item()
