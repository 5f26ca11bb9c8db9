"""Perplexity, ROUGE, intervals, and what ROUGE cannot see: numbers from plain rows."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from utils import safety


def perplexity(losses: Sequence[tuple[float, int]]) -> dict[str, float]:
    """Token-weighted perplexity: exp(sum of token losses / number of tokens).

    Args:
        losses: per row the sum of its token losses in nats and how many they are
            (`utils.generation.answer_nll`).

    Returns:
        `nll` (nats per token), `perplexity`, `tokens`, `rows`.

    Raises:
        ValueError: no tokens, or a loss that is not finite.
    """
    total = sum(loss for loss, _ in losses)
    tokens = sum(count for _, count in losses)
    if not tokens:
        raise ValueError("perplexity needs at least one labelled token")
    if not math.isfinite(total):
        raise ValueError(f"the summed loss is {total}; the model has diverged")
    nll = total / tokens
    return {
        "nll": nll,
        "perplexity": math.exp(nll),
        "tokens": tokens,
        "rows": len(losses),
    }


def rouge_rows(
    predictions: Sequence[str], references: Sequence[str]
) -> dict[str, list[float]]:
    """Stemmed ROUGE per row: `rouge1_f1`, `rougeL_recall` … each a list of floats.

    Raises:
        ValueError: the two lists differ in length or are empty.
    """
    import evaluate  # brings in datasets: slow, and not needed by the chat

    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} references; "
            "there must be as many of both, and at least one"
        )
    metric = evaluate.load(str(Path(__file__).with_name("rouge_metric.py")))
    return metric.compute(predictions=list(predictions), references=list(references))


def bootstrap_interval(
    values: Sequence[float], *, draws: int = 10_000, seed: int = 42
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a mean (Efron 1979), seeded.

    For a paired difference pass the differences.

    Raises:
        ValueError: no values.
    """
    values = np.asarray(values, dtype=float)
    if not len(values):
        raise ValueError("an interval needs at least one value")
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    step = max(1, 4_000_000 // len(values))  # some 32 MB at a time
    for start in range(0, draws, step):
        n = min(step, draws - start)
        means[start : start + n] = values[
            rng.integers(0, len(values), (n, len(values)))
        ].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def score_answers(answers: Sequence[Mapping]) -> tuple[list[dict], dict]:
    """Score answers row by row and by dataset, model and phrasing.

    Args:
        answers: rows of `answers.jsonl`: `dataset`, `question`, `phrasing`,
            `reference`, `model`, `answer`, and if known `tokens`, `hit_cap`. A row
            with an empty `reference` is answered but not scored.

    Returns:
        The scored rows with their measures, and the nested means
        `scores[dataset][model][phrasing]`, each over exactly those rows, with `n`.
    """
    rows = [dict(row) for row in answers if row["reference"]]
    if not rows:
        raise ValueError("none of the answers has a reference to be scored against")
    columns = rouge_rows([r["answer"] for r in rows], [r["reference"] for r in rows])
    for i, row in enumerate(rows):
        row.update({name: values[i] for name, values in columns.items()})
        row["answer_words"] = len(row["answer"].split())
        row["advises_help"] = float(safety.advises_help(row["answer"]))
        row["repeats"] = float(repeats_ngram(row["answer"]))
        row["ended"] = float(not row.get("hit_cap", False))
    cells = defaultdict(list)
    for row in rows:
        cells[row["dataset"], row["model"], row["phrasing"]].append(row)
    measures = [*columns, "answer_words", "advises_help", "repeats", "ended"]
    scores: dict = {}
    for (dataset, model, phrasing), group in sorted(cells.items()):
        low, high = bootstrap_interval([row["rougeL_f1"] for row in group])
        scores.setdefault(dataset, {}).setdefault(model, {})[phrasing] = {
            "n": len(group),
            **{name: float(np.mean([row[name] for row in group])) for name in measures},
            "rougeL_f1_low": low,
            "rougeL_f1_high": high,
        }
    return rows, scores


def paired_difference(
    rows: Sequence[Mapping],
    dataset: str,
    model: str,
    against: str,
    *,
    measure: str = "rougeL_f1",
    phrasing: str = "original",
) -> dict[str, float]:
    """`model` minus `against` on the questions that both answered.

    Returns:
        `n`, the mean `difference`, its 95 % bootstrap interval `low` and `high`, and
        the share of questions `won` and `lost`.

    Raises:
        ValueError: they have no question in common.
    """
    by_model: dict = {model: {}, against: {}}
    for row in rows:
        same = row["dataset"] == dataset and row["phrasing"] == phrasing
        if same and row["model"] in by_model:
            by_model[row["model"]][row["question"]] = row[measure]
    shared = sorted(by_model[model].keys() & by_model[against].keys())
    if not shared:
        raise ValueError(f"{model} and {against} share no question in {dataset}")
    gaps = np.array([by_model[model][q] - by_model[against][q] for q in shared])
    low, high = bootstrap_interval(gaps)
    return {
        "n": len(shared),
        "difference": float(gaps.mean()),
        "low": low,
        "high": high,
        "won": float((gaps > 0).mean()),
        "lost": float((gaps < 0).mean()),
    }


def repeats_ngram(text: str, n: int = 4, times: int = 3) -> bool:
    """Whether some run of `n` words occurs at least `times` times in `text`."""
    words = text.lower().split()
    counts: dict = defaultdict(int)
    for i in range(len(words) - n + 1):
        counts[tuple(words[i : i + n])] += 1
    return max(counts.values(), default=0) >= times
