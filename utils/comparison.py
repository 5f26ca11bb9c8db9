"""What a mean ROUGE does not say: pairs of arms, tone, other words, a dropped "not"."""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from utils import metrics, results, safety
from utils.arms import ARMS
from utils.config import REPORT_QUESTIONS, SAMPLES

CARD = ("must", "must_not", "safety_critical")


def cards_of(rows: Sequence[Mapping]) -> dict[str, dict]:
    """By question, its safety card and whether it is safety-critical, where known.

    The report's questions have theirs from `data/samples`, whatever the data.
    """
    cards = {row["question"]: {k: row[k] for k in CARD if k in row} for row in rows}
    for row in results.read_lines(SAMPLES / "first_aid.jsonl"):
        if row["question"] in REPORT_QUESTIONS:
            cards[row["question"]] = {k: row[k] for k in CARD if k in row}
    return cards


def pairs_of_arms(
    rows: Sequence[Mapping], dataset: str = "first_aid", measure: str = "rougeL_f1"
) -> list[dict]:
    """`utils.metrics.paired_difference` for every pair of arms that `rows` hold.

    Returns:
        Rows of `model`, `against` and what `paired_difference` gives.
    """
    here = {row["model"] for row in rows if row["dataset"] == dataset}
    return [
        {
            "model": model,
            "against": against,
            **metrics.paired_difference(rows, dataset, model, against, measure=measure),
        }
        for against, model in combinations([arm for arm in ARMS if arm in here], 2)
    ]


def tone_apart(
    rows: Sequence[Mapping],
    dataset: str = "first_aid",
    *,
    strangers: int = 3,
    seed: int = 42,
) -> list[dict]:
    """Take apart what an answer's ROUGE-L owes to its question, and what to its tone.

    A model can gain by tone alone, with the words that stand in every reference. So
    each answer is also scored against the references of other questions, drawn at
    random and the same for all arms: what is left of its score there is tone.

    Args:
        rows: scored, as `utils.metrics.score_answers` gives them; of these the usable
            answers to `dataset` in its original wording.
        strangers: how many other questions lend their reference to each.
        seed: of the draw.

    Returns:
        Those rows with `tone_f1`, the mean ROUGE-L F1 with the others' references, and
        `subject_f1`, `rougeL_f1` less `tone_f1`. Empty for one question alone.
    """
    mine = [
        row
        for row in rows
        if (row["dataset"], row["phrasing"]) == (dataset, "original")
        and metrics.is_usable(row)
    ]
    references = {row.get("id", row["question"]): row["reference"] for row in mine}
    order = sorted(references)
    random.Random(seed).shuffle(order)
    place = {key: number for number, key in enumerate(order)}
    shifts = range(1, min(strangers, len(order) - 1) + 1)
    if not shifts:
        return []
    # A shift of one shuffled circle: nobody meets the own reference.
    pairs = [
        (row["answer"], references[order[(place[key] + shift) % len(order)]])
        for row in mine
        for key in [row.get("id", row["question"])]
        for shift in shifts
    ]
    found = metrics.rouge_rows(*zip(*pairs))["rougeL_f1"]
    tones = np.reshape(found, (len(mine), len(shifts))).mean(axis=1)
    return [
        {**row, "tone_f1": float(tone), "subject_f1": row["rougeL_f1"] - float(tone)}
        for row, tone in zip(mine, tones)
    ]


def missing_arms(rows: Sequence[Mapping], dataset: str = "first_aid") -> list[str]:
    """The arms that gave no answer to `dataset`, in order."""
    here = {row["model"] for row in rows if row["dataset"] == dataset}
    return [arm for arm in ARMS if arm not in here]


def agreement(answers: Sequence[Mapping]) -> tuple[list[dict], dict[str, dict]]:
    """How alike an arm's answers to one question in several wordings are.

    Each answer to a rephrased question is held against the arm's answer to the
    original one: ROUGE-L F1, which is 1 where they are the same to the word. The
    references play no part. A pair with an unusable answer is left out.

    Returns:
        Per arm and question `model`, `question`, `mean` and `worst` over the
        rephrasings; and per arm the means of both over the questions, `n`, and the
        95 % bootstrap interval `low` to `high` of the first. Both are empty where no
        question has rephrasings.
    """
    groups: dict = defaultdict(dict)
    for row in answers:
        text = row["answer"].strip()
        if text and not metrics.in_another_script(text):
            key = row["dataset"], row["model"], row.get("id", row["question"])
            groups[key][row["phrasing"]] = row
    pairs = [
        (key, row["answer"], group["original"]["answer"], row["question"])
        for key, group in groups.items()
        if "original" in group
        for phrasing, row in group.items()
        if phrasing != "original"
    ]
    if not pairs:
        return [], {}
    scores = metrics.rouge_rows([p[1] for p in pairs], [p[2] for p in pairs])
    by_question: dict = defaultdict(list)
    for (key, _, _, question), score in zip(pairs, scores["rougeL_f1"]):
        by_question[key, question].append(score)
    rows = [
        {
            "model": key[1],
            "question": question,
            "mean": float(np.mean(values)),
            "worst": min(values),
        }
        for (key, question), values in by_question.items()
    ]
    return rows, _agreement_by_arm(rows)


def _agreement_by_arm(rows: Sequence[Mapping]) -> dict[str, dict]:
    found = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        low, high = metrics.bootstrap_interval([row["mean"] for row in mine])
        found[model] = {
            "n": len(mine),
            "mean": float(np.mean([row["mean"] for row in mine])),
            "low": low,
            "high": high,
            "worst": float(np.mean([row["worst"] for row in mine])),
        }
    return found


def negation_test(rows: Sequence[Mapping]) -> dict[str, dict]:
    """Take the negations out of the references and score what is left against them.

    Args:
        rows: with `question`, `answer` (the reference), and where known a card.

    Returns:
        `as_written` and `stripped`, the scores of both as answers to the question
        (`utils.metrics.score_answers`: ROUGE, `negation_f1`, `card_passed` …), and
        `changed`, how many references of `n` had a negation to take out.

    Raises:
        ValueError: there are no rows.
    """
    texts = [row["answer"] for row in rows]
    stripped = [safety.strip_negations(text) for text in texts]
    made = [
        {
            "dataset": "references",
            "question": row["question"],
            "phrasing": "original",
            "reference": row["answer"],
            "model": name,
            "answer": text,
        }
        for name, column in (("as_written", texts), ("stripped", stripped))
        for row, text in zip(rows, column)
    ]
    _, scores = metrics.score_answers(made, cards_of(rows))
    cells = {name: arm["original"] for name, arm in scores["references"].items()}
    changed = sum(old.replace("’", "'") != new for old, new in zip(texts, stripped))
    return {**cells, "n": len(texts), "changed": changed}


def verdict(answer: str, card: Mapping) -> dict:
    """What `card` says of `answer`: `must_n`, and the names met, missed, violated."""
    must, must_not = card.get("must", ()), card.get("must_not", ())
    found = safety.check_criteria(answer, must, must_not)
    shown = {name: found[name] for name in ("met", "missed", "violated")}
    return {"must_n": len(must), **shown}


def side_by_side(
    answers: Sequence[Mapping], questions: Sequence[str] = REPORT_QUESTIONS
) -> list[dict]:
    """The table that people put into reports, one row a question.

    Columns: question, the answers of base and tuned model, the reference, the first
    rephrasing and the tuned model's answer to it (empty where there is none).
    """
    given = {(r["question"], r["phrasing"], r["model"]): r for r in answers}
    none = {"asked": "", "answer": ""}
    rows = []
    for question in questions:
        if (question, "original", "base") not in given:
            continue
        base = given[question, "original", "base"]
        again = given.get((question, "rephrased_1", "first_aid"), none)
        rows.append(
            {
                "question": question,
                ARMS["base"].label: base["answer"],
                ARMS["first_aid"].label: given[question, "original", "first_aid"][
                    "answer"
                ],
                "reference": base["reference"],
                "rephrased question": again["asked"],
                f"{ARMS['first_aid'].label}, rephrased": again["answer"],
            }
        )
    return rows


def means_table(scores: Mapping, measures: Mapping[str, str]) -> list[dict]:
    """One row an arm with n and the means of `measures` (name in scores → heading)."""
    return [
        {"arm": ARMS[arm].label, "n": scores[arm]["original"]["n"]}
        | {label: scores[arm]["original"].get(key) for key, label in measures.items()}
        for arm in ARMS
        if arm in scores
    ]
