"""Pairs of arms, other wordings and the negation test, by hand and on real rows."""

import json
import os

import pytest
from rouge_score import rouge_scorer

from utils import comparison, metrics, results, safety
from utils.config import REPORT_QUESTIONS, SAMPLES
from utils.rouge_metric import one_sentence_a_line


def answer(model, text, phrasing="original", question="What now?", **other):
    return {
        "dataset": "first_aid",
        "question": question,
        "phrasing": phrasing,
        "asked": f"{question} ({phrasing})",
        "reference": "Call 112 now.",
        "model": model,
        "answer": text,
    } | other


def test_every_pair_of_arms_is_there_once():
    rows = [
        answer(arm, "x", rougeL_f1=n / 10) for n, arm in enumerate(("base", "echo"))
    ]
    rows.append(answer("first_aid", "x", rougeL_f1=0.5))
    pairs = comparison.pairs_of_arms(rows)
    found = {(p["model"], p["against"]): p["difference"] for p in pairs}
    assert found == {
        ("first_aid", "base"): pytest.approx(0.5),
        ("echo", "base"): pytest.approx(0.1),
        ("echo", "first_aid"): pytest.approx(-0.4),
    }
    assert comparison.missing_arms(rows) == [
        *("base_short", "finetome", "nearest", "random")
    ]


def test_tone_is_what_a_stranger_scores_too():
    said = {"A?": "call 112 now", "B?": "cool the burn", "C?": "press the wound"}
    rows = [
        answer(model, texts[question], question=question, reference=reference)
        for model, texts in (
            ("base", dict.fromkeys(said, "call 112 now")),  # the same to everyone
            ("first_aid", said),  # each to its question
        )
        for question, reference in said.items()
    ]
    rows.append(answer("first_aid", "call 112", "rephrased_1", question="A?"))
    rows.append(answer("echo", " ", question="B?"))  # empty: no score to take apart
    scored, _ = metrics.score_answers(rows)
    found = {
        (row["model"], row["question"]): row
        for row in comparison.tone_apart(scored, strangers=2)
    }
    assert len(found) == 6
    # A's stranger references share nothing with it; B's and C's share "the" (1 of 3).
    assert found["first_aid", "A?"]["tone_f1"] == 0
    assert found["first_aid", "A?"]["subject_f1"] == 1
    assert found["first_aid", "B?"]["tone_f1"] == pytest.approx((0 + 1 / 3) / 2)
    # One answer for all is worth as much to a stranger: nothing of it is subject.
    base = [row for key, row in found.items() if key[0] == "base"]
    assert sum(row["subject_f1"] for row in base) == pytest.approx(0)
    assert found["base", "B?"]["tone_f1"] == pytest.approx(1 / 2)
    assert comparison.tone_apart(scored[:1]) == []


def test_agreement_by_hand():
    rows = [
        answer("base", "call 112 now"),
        answer("base", "call 112 now", "rephrased_1"),  # the same: 1
        answer("base", "call", "rephrased_2"),  # 1 of 1 and 1 of 3: F1 is 1 / 2
        answer("base", "wait", question="Alone?"),  # no rephrasing
        answer("first_aid", "sit down"),
        answer("first_aid", " ", "rephrased_1"),  # empty: no pair
    ]
    by_question, by_arm = comparison.agreement(rows)
    assert [row["model"] for row in by_question] == ["base"]
    assert by_question[0]["mean"] == pytest.approx(0.75)
    assert by_question[0]["worst"] == pytest.approx(0.5)
    assert by_arm["base"]["n"] == 1 and set(by_arm) == {"base"}
    assert by_arm["base"]["mean"] == by_arm["base"]["low"] == pytest.approx(0.75)


def test_agreement_without_rephrasings_is_empty():
    assert comparison.agreement([answer("base", "call")]) == ([], {})


def test_side_by_side_has_the_reports_columns():
    question = REPORT_QUESTIONS[0]
    rows = [answer(m, f"by {m}", question=question) for m in ("base", "first_aid")]
    rows.append(answer("first_aid", "again", "rephrased_1", question))
    (row,) = comparison.side_by_side(rows)
    assert list(row.values()) == [
        question,
        "by base",
        "by first_aid",
        "Call 112 now.",
        f"{question} (rephrased_1)",
        "again",
    ]
    assert comparison.side_by_side([answer("base", "x")]) == []


def test_cards_of_the_reports_questions_come_along():
    cards = comparison.cards_of([{"question": "q", "safety_critical": False}])
    assert cards["q"] == {"safety_critical": False}
    assert all(cards[question]["must"] for question in REPORT_QUESTIONS)


def test_a_mean_table_has_the_arms_in_order():
    cell = {"original": {"n": 2, "rougeL_f1": 0.25}}
    rows = comparison.means_table({"echo": cell, "base": cell}, {"rougeL_f1": "RL"})
    assert rows == [
        {"arm": "Base", "n": 2, "RL": 0.25},
        {"arm": "the question itself (no model)", "n": 2, "RL": 0.25},
    ]


# --- the negation test -------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Do not give water.", "give water."),
        ("Don’t move him, and never pull.", "move him, and pull."),
        ("You cannot see it; you can't wait.", "You can see it; you can wait."),
        ("It isn't safe and won't help.", "It is safe and will help."),
        ("No food, no drink.", "food, drink."),
        ("Notice the knot in another noose.", "Notice the knot in another noose."),
        ("Avoid the heat.", "Avoid the heat."),
    ],
)
def test_negations_are_taken_out(text, expected):
    assert safety.strip_negations(text) == expected


def test_denied_words_and_numbers_by_hand():
    denied = safety.denied_words("Do not cut, suck or cool the bite. Call for help.")
    assert denied == {"cut", "suck", "cool", "bite"}
    assert safety.denied_words("Call 112 at once.") == set()
    assert safety.numbers("Two inches (5 cm), 1,000 times, 2.5 m") == {
        *("2", "5", "1000", "2.5")
    }
    assert safety.negation_agreement("Cut it.", "Do not cut it.") == 0
    assert safety.negation_agreement("Never cut.", "Do not cut it.") == 1
    assert safety.negation_agreement("Never cut.", "Cut it.") is None
    assert safety.number_agreement("press 5 cm", "press five cm or two inches") == (
        pytest.approx(2 / 3)
    )


def falls(test: dict, measure: str) -> float:
    return test["as_written"][measure] - test["stripped"][measure]


def test_rouge_hardly_sees_a_dropped_not_and_our_measures_do():
    rows = [json.loads(x) for x in (SAMPLES / "first_aid.jsonl").open(encoding="utf-8")]
    test = comparison.negation_test([row for row in rows if row["held_out"]])
    assert test["changed"] > 70
    assert test["as_written"]["rougeL_f1"] == test["as_written"]["negation_f1"] == 1
    assert test["stripped"]["rougeL_f1"] > 0.95
    assert falls(test, "negation_f1") > 0.5
    assert falls(test, "card_passed") > 0.1
    assert test["stripped"]["card_dangerous"] > test["as_written"]["card_dangerous"]


def test_on_real_references_too(real_first_aid):
    rows = json.loads(real_first_aid.read_text("utf-8"))
    test = comparison.negation_test(rows[:600])
    assert test["changed"] > 100 and test["stripped"]["rougeL_f1"] > 0.95
    assert falls(test, "negation_f1") > 0.3


def test_no_references_are_refused():
    with pytest.raises(ValueError, match="none of the answers has a reference"):
        comparison.negation_test([])


# --- scores.json is what rouge_score says of answers.jsonl --------------------------


def recompute(rows: list[dict]) -> dict:
    """Mean ROUGE by arm with rouge_score alone."""
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=True)
    sums: dict = {}
    for row in rows:
        key = row["dataset"], row["model"], row["phrasing"]
        texts = map(one_sentence_a_line, (row["reference"], row["answer"]))
        for kind, score in scorer.score(*texts).items():
            for part, value in zip(("precision", "recall", "f1"), score):
                sums.setdefault(key, {}).setdefault(f"{kind}_{part}", []).append(value)
    return {
        key: {name: sum(values) / len(values) for name, values in measures.items()}
        for key, measures in sums.items()
    }


def made_up_answers() -> list[dict]:
    texts = ("Call 112. Do not wait!", "Press 5 cm deep. Then rest.", "Sit down now")
    return [
        answer(arm, f"{text} {arm} {n}", phrasing, f"Question {n}?")
        for arm in ("base", "first_aid")
        for n, text in enumerate(texts)
        for phrasing in ("original", "rephrased_1")
    ]


def check_recomputed(rows: list[dict], scores: dict) -> None:
    for (dataset, model, phrasing), means in recompute(rows).items():
        cell = scores[dataset][model][phrasing]
        for name, value in means.items():
            assert cell[name] == pytest.approx(value, abs=1e-6), (model, name)


def test_recomputing_rouge_from_the_answers_gives_the_scores(tmp_path):
    rows = made_up_answers()
    results.write_lines(tmp_path / "answers.jsonl", rows)
    _, scores = metrics.score_answers(rows)
    results.write_json(tmp_path / "scores.json", scores)
    check_recomputed(
        results.read_lines(tmp_path / "answers.jsonl"),
        results.read_json(tmp_path / "scores.json"),
    )


@pytest.mark.slow
def test_recomputing_rouge_of_a_finished_run():
    """`RUN_DIR` names a run whose notebook 05 is done."""
    if not os.environ.get("FINISHED_RUN"):
        pytest.skip("FINISHED_RUN is not set: name a run's folder")
    folder = SAMPLES.parents[1] / os.environ["FINISHED_RUN"]
    rows = results.read_lines(folder / "answers.jsonl")
    check_recomputed(
        [row for row in rows if row["answer"].strip() and row["reference"]],
        results.read_json(folder / "scores.json"),
    )


def test_two_runs_give_identical_bytes(tmp_path):
    rows = made_up_answers()
    for name, order in (("one", rows), ("two", rows[::-1])):
        timed = [{**row, "seconds": len(name) + n} for n, row in enumerate(order)]
        _, scores = metrics.score_answers(timed if name == "one" else timed[::-1])
        results.write_json(tmp_path / name, scores)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
