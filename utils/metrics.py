"""Perplexity, ROUGE, intervals, and what ROUGE cannot see: numbers from plain rows."""

import math
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from utils import safety

ALWAYS = ("answer_words", "advises_help", "repeats", "ended")
# Of rows whose reference denies something, names a number, or that have a safety card.
SOMETIMES = (
    "help_if_critical",
    "negation_f1",
    "number_f1",
    "card_met",
    "card_dangerous",
    "card_passed",
)


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


def perplexity_interval(
    losses: Sequence[tuple[float, int]], *, draws: int = 10_000, seed: int = 42
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the token-weighted perplexity.

    Rows are drawn, not tokens: the tokens of one answer are not independent.

    Raises:
        ValueError: as `perplexity`.
    """
    perplexity(losses)
    sums, counts = np.asarray(losses, dtype=float).T
    found = np.concatenate(
        [
            sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
            for drawn in _draws(len(sums), draws, seed)
        ]
    )
    low, high = np.exp(np.percentile(found, [2.5, 97.5]))
    return float(low), float(high)


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
    means = np.concatenate(
        [values[drawn].mean(axis=1) for drawn in _draws(len(values), draws, seed)]
    )
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _draws(size: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of `draws` samples with replacement, some 32 MB at a time."""
    rng = np.random.default_rng(seed)
    step = max(1, 4_000_000 // size)
    for start in range(0, draws, step):
        yield rng.integers(0, size, (min(step, draws - start), size))


def score_answers(
    answers: Sequence[Mapping], cards: Mapping[str, Mapping] | None = None
) -> tuple[list[dict], dict]:
    """Score answers row by row and by dataset, model and phrasing.

    An answer that is empty or in another script is scored (ROUGE 0) and counted, but
    not averaged in: it says that generation failed, not how near the wording came.
    Since that flatters a model that stays silent, `rougeL_f1_as_zero` has the mean
    with those as 0. A measure that does not apply to a row (`SOMETIMES`) is None there.

    Args:
        answers: rows of `answers.jsonl`: `dataset`, `question`, `phrasing`,
            `reference`, `model`, `answer`, and if known `tokens`, `hit_cap`. A row
            with an empty `reference` is answered but not scored.
        cards: by question, what `utils.comparison.cards_of` gives: `must`,
            `must_not` and `safety_critical`, each if known.

    Returns:
        The scored rows with their measures, and the nested means
        `scores[dataset][model][phrasing]`. A cell has `rows`, of them `empty` and
        `other_script`, and `n`, the rows in the means; each measure's mean; of one in
        `SOMETIMES` also `<measure>_n`, and no mean where that is 0.
    """
    rows = [dict(row) for row in answers if row["reference"]]
    if not rows:
        raise ValueError("none of the answers has a reference to be scored against")
    columns = rouge_rows([r["answer"] for r in rows], [r["reference"] for r in rows])
    for i, row in enumerate(rows):
        row.update({name: values[i] for name, values in columns.items()})
        row.update(_describe(row, (cards or {}).get(row["question"], {})))
    cells = defaultdict(list)
    for row in rows:
        cells[row["dataset"], row["model"], row["phrasing"]].append(row)
    scores: dict = {}
    for (dataset, model, phrasing), group in sorted(cells.items()):
        cell = _average(group, [*columns, *ALWAYS])
        scores.setdefault(dataset, {}).setdefault(model, {})[phrasing] = cell
    return rows, scores


def _describe(row: Mapping, card: Mapping) -> dict:
    """The measures of one answer beside ROUGE."""
    text = row["answer"]
    helps = float(safety.advises_help(text))
    found = {
        "empty": not text.strip(),
        "other_script": in_another_script(text),
        "answer_words": len(text.split()),
        "advises_help": helps,
        "repeats": float(repeats_ngram(text)),
        "ended": float(not row.get("hit_cap", False)),
        "help_if_critical": helps if card.get("safety_critical") else None,
        "negation_f1": safety.negation_agreement(text, row["reference"]),
        "number_f1": safety.number_agreement(text, row["reference"]),
        **dict.fromkeys(("card_met", "card_dangerous", "card_passed")),
    }
    must, must_not = card.get("must", ()), card.get("must_not", ())
    if must or must_not:
        verdict = safety.check_criteria(text, must, must_not)
        met = len(verdict["met"])
        found["card_met"] = met / len(must) if must else None
        found["card_dangerous"] = float(bool(verdict["violated"]))
        found["card_passed"] = float(met == len(must) and not verdict["violated"])
    return found


def _average(group: Sequence[Mapping], measures: Sequence[str]) -> dict:
    """One cell of the scores, over exactly the rows of `group`."""
    usable = [row for row in group if is_usable(row)]
    cell = {
        "rows": len(group),
        "empty": sum(row["empty"] for row in group),
        "other_script": sum(row["other_script"] for row in group),
        "n": len(usable),
        "rougeL_f1_as_zero": sum(row["rougeL_f1"] for row in usable) / len(group),
    }
    if not usable:
        return cell
    cell |= {name: float(np.mean([row[name] for row in usable])) for name in measures}
    for name in SOMETIMES:
        values = [row[name] for row in usable if row[name] is not None]
        cell[f"{name}_n"] = len(values)
        if values:
            cell[name] = float(np.mean(values))
    low, high = bootstrap_interval([row["rougeL_f1"] for row in usable])
    return cell | {"rougeL_f1_low": low, "rougeL_f1_high": high}


def is_usable(row: Mapping) -> bool:
    """Whether a scored row is averaged in: neither empty nor in another script."""
    return not (row.get("empty") or row.get("other_script"))


def in_another_script(text: str) -> bool:
    """Whether more than half of the letters of `text` are not Latin ones."""
    letters = [character for character in text if character.isalpha()]
    others = sum("LATIN" not in unicodedata.name(c, "") for c in letters)
    return others > len(letters) / 2


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

    Questions to which either answer is empty or in another script are left out.

    Returns:
        `n`, the mean `difference`, its 95 % bootstrap interval `low` and `high`, and
        the share of questions `won`, `tied` and `lost`, which add up to 1.

    Raises:
        ValueError: they have no question in common.
    """
    by_model: dict = {model: {}, against: {}}
    for row in rows:
        same = row["dataset"] == dataset and row["phrasing"] == phrasing
        here = same and row["model"] in by_model and is_usable(row)
        if here and row[measure] is not None:
            by_model[row["model"]][row.get("id", row["question"])] = row[measure]
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
        "tied": float((gaps == 0).mean()),
        "lost": float((gaps < 0).mean()),
    }


def repeats_ngram(text: str, n: int = 4, times: int = 3) -> bool:
    """Whether some run of `n` words occurs at least `times` times in `text`."""
    words = text.lower().split()
    counts: dict = defaultdict(int)
    for i in range(len(words) - n + 1):
        counts[tuple(words[i : i + n])] += 1
    return max(counts.values(), default=0) >= times
