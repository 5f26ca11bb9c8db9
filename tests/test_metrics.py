"""Every number here is computed by hand or by rouge_score itself."""

import math
from itertools import pairwise

import numpy as np
import pytest
from rouge_score import rouge_scorer

from utils import metrics

PREDICTION = "Cool the burn under water."
REFERENCE = "Cool burns with running water for twenty minutes."
LONG = (
    "Call 112 first. Start chest compressions! Do not stop until help comes.",
    "Begin chest compressions. Call 112 at once; stop when help arrives.",
)


def test_perplexity_weighs_tokens_not_rows():
    # Two rows: 1 token with 3 nats, 3 tokens with 1 nat together. 4 nats on 4 tokens.
    found = metrics.perplexity([(3.0, 1), (1.0, 3)])
    assert found["nll"] == pytest.approx(1.0)
    assert found["perplexity"] == pytest.approx(2.718281828)
    assert (found["tokens"], found["rows"]) == (4, 2)


def test_a_uniform_guess_over_eight_has_perplexity_eight():
    assert metrics.perplexity([(5 * math.log(8), 5)])["perplexity"] == pytest.approx(8)


@pytest.mark.parametrize("losses", [[], [(0.0, 0)]])
def test_perplexity_without_tokens_is_refused(losses):
    with pytest.raises(ValueError, match="at least one labelled token"):
        metrics.perplexity(losses)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_perplexity_of_a_diverged_model_is_refused(loss):
    with pytest.raises(ValueError, match="diverged"):
        metrics.perplexity([(1.0, 2), (loss, 3)])


@pytest.fixture(scope="module")
def rouge():
    """All that the tests below ask of ROUGE, in one call of `evaluate`."""
    predictions = [PREDICTION, LONG[0], "same words", "", "left"]
    references = [REFERENCE, LONG[1], "same words", "something", "right"]
    return predictions, references, metrics.rouge_rows(predictions, references)


def test_rouge_by_hand(rouge):
    # Stemmed: cool the burn under water | cool burn with run water for twenti minut
    # Common words: cool, burn, water (3 of 5 predicted, 3 of 8 expected), and they
    # stand in the same order; no pair of neighbours is common.
    row = {name: values[0] for name, values in rouge[2].items()}
    assert row["rouge1_precision"] == pytest.approx(3 / 5)
    assert row["rouge1_recall"] == pytest.approx(3 / 8)
    assert row["rouge1_f1"] == pytest.approx(2 * 3 / (5 + 8))
    assert row["rougeL_f1"] == pytest.approx(6 / 13)
    assert row["rouge2_f1"] == 0


def test_rouge_stems(rouge):
    # Unstemmed, "burn" and "burns" would differ: 2 of 5 instead of 3 of 5.
    plain = rouge_scorer.RougeScorer(["rouge1"], use_stemmer=False)
    unstemmed = plain.score(REFERENCE, PREDICTION)["rouge1"].precision
    assert unstemmed == pytest.approx(2 / 5)
    assert rouge[2]["rouge1_precision"][0] > unstemmed


def test_rouge_is_rouge_scores_own(rouge):
    predictions, references, columns = rouge
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=True)
    for i, (prediction, reference) in enumerate(zip(predictions, references)):
        for kind, score in scorer.score(reference, prediction).items():
            assert columns[f"{kind}_precision"][i] == pytest.approx(score.precision)
            assert columns[f"{kind}_recall"][i] == pytest.approx(score.recall)
            assert columns[f"{kind}_f1"][i] == pytest.approx(score.fmeasure)
    assert all(len(values) == len(predictions) for values in columns.values())
    assert len(columns) == 4 * 3


def test_rouge_extremes(rouge):
    assert rouge[2]["rougeL_f1"][2:] == [1.0, 0.0, 0.0]


def test_rouge_lsum_sees_sentences(rouge):
    lines = (
        "Call 112 first.\nStart chest compressions!\nDo not stop until help comes.",
        "Begin chest compressions.\nCall 112 at once; stop when help arrives.",
    )
    scorer = rouge_scorer.RougeScorer(["rougeLsum"], use_stemmer=True)
    expected = scorer.score(lines[1], lines[0])["rougeLsum"].fmeasure
    assert rouge[2]["rougeLsum_f1"][1] == pytest.approx(expected)
    # The sentences stand in another order, which costs ROUGE-L but not ROUGE-Lsum.
    assert rouge[2]["rougeLsum_f1"][1] > rouge[2]["rougeL_f1"][1]


def test_rouge_needs_as_many_references_as_predictions():
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        metrics.rouge_rows(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="0 predictions"):
        metrics.rouge_rows([], [])


def test_bootstrap_is_seeded():
    values = [0.1, 0.4, 0.2, 0.9, 0.3]
    one = metrics.bootstrap_interval(values, draws=500, seed=1)
    assert one == metrics.bootstrap_interval(values, draws=500, seed=1)
    assert one != metrics.bootstrap_interval(values, draws=500, seed=2)


def test_bootstrap_matches_theory():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    low, high = metrics.bootstrap_interval(values)
    error = values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    # Scores between 0 and 1 as ROUGE gives them, of which the mean is known: 2 / 9.
    rng = np.random.default_rng(7)
    inside, times = 0, 1000
    for _ in range(times):
        scores = rng.beta(2, 7, size=188)
        low, high = metrics.bootstrap_interval(scores, draws=1000)
        inside += low <= 2 / 9 <= high
    assert 0.93 <= inside / times <= 0.97


def test_perplexity_interval_covers_the_truth_as_often_as_it_says():
    # Rows of 1 to 60 tokens; a token's loss has mean 2 whatever the row's length.
    rng = np.random.default_rng(8)
    inside, times = 0, 600
    for _ in range(times):
        counts = rng.integers(1, 61, size=150)
        losses = list(zip(rng.gamma(2 * counts, 1.0), counts))
        low, high = metrics.perplexity_interval(losses, draws=1000)
        inside += low <= math.exp(2) <= high
    assert 0.93 <= inside / times <= 0.97


def test_perplexity_interval_weighs_tokens():
    # Two rows: all draws are of one, of the other, or of both (half of them).
    found = metrics.perplexity_interval([(3.0, 1), (1.0, 3)], draws=2000)
    assert found == pytest.approx((math.exp(1 / 3), math.exp(3)))
    # 50 rows of one token at 3 nats, 50 of 99 tokens at 1: 5,100 nats on 5,000 tokens.
    low, high = metrics.perplexity_interval([(3.0, 1), (99.0, 99)] * 50, draws=500)
    assert low < math.exp(5100 / 5000) < high < math.exp(1.1)
    one = metrics.perplexity_interval([(2.0, 4)])
    assert one == pytest.approx((math.exp(0.5), math.exp(0.5)))
    with pytest.raises(ValueError, match="diverged"):
        metrics.perplexity_interval([(math.nan, 1)])


def test_bootstrap_in_several_blocks_keeps_every_draw():
    # 600,000 values: six draws a block. None of the means may be left as it was.
    values = np.ones(600_000)
    assert metrics.bootstrap_interval(values, draws=14) == (1.0, 1.0)


def test_bootstrap_of_one_value_and_of_none():
    assert metrics.bootstrap_interval([0.5]) == (0.5, 0.5)
    with pytest.raises(ValueError, match="at least one value"):
        metrics.bootstrap_interval([])


def row(question, model, score, **other):
    return {
        "dataset": "report",
        "phrasing": "original",
        "question": question,
        "model": model,
        "rougeL_f1": score,
    } | other


def test_paired_difference_by_hand():
    rows = [
        row("a", "first_aid", 0.5),
        row("b", "first_aid", 0.4),
        row("c", "first_aid", 0.3),
        row("d", "first_aid", 0.9),  # the base did not answer it
        row("c", "base", 0.3),  # another order
        row("b", "base", 0.6),
        row("a", "base", 0.1),
        row("a", "finetome", 0.0),  # another model
        row("a", "base", 0.0, phrasing="rephrased_1"),
        row("a", "base", 0.0, dataset="held_out"),
    ]
    # Differences: a +0.4, b -0.2, c 0.
    found = metrics.paired_difference(rows, "report", "first_aid", "base")
    assert found["n"] == 3
    assert found["difference"] == pytest.approx(0.2 / 3)
    assert found["won"] == pytest.approx(1 / 3)
    assert found["tied"] == pytest.approx(1 / 3)
    assert found["lost"] == pytest.approx(1 / 3)
    # All 27 draws: the smallest mean is -0.2, the greatest 0.4, each 1 in 27 (3.7 %).
    assert found["low"] == pytest.approx(-0.2)
    assert found["high"] == pytest.approx(0.4)


def test_paired_difference_takes_another_measure_and_phrasing():
    rows = [
        row("a", "first_aid", 0, rouge1_recall=0.7, phrasing="rephrased_1"),
        row("a", "base", 0, rouge1_recall=0.2, phrasing="rephrased_1"),
    ]
    found = metrics.paired_difference(
        rows,
        "report",
        "first_aid",
        "base",
        measure="rouge1_recall",
        phrasing="rephrased_1",
    )
    assert found["difference"] == pytest.approx(0.5)


def test_paired_difference_without_a_shared_question_is_refused():
    rows = [row("a", "first_aid", 0.5), row("b", "base", 0.5)]
    with pytest.raises(ValueError, match="share no question in report"):
        metrics.paired_difference(rows, "report", "first_aid", "base")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("press the wound hard " * 3, True),
        ("press the wound hard " * 2, False),
        ("Press the wound hard. PRESS the wound hard. press the wound hard.", True),
        ("a b c d", False),
        ("one two", False),
        ("", False),
        ("no no no no no no", True),  # "no no no no" at words 1, 2 and 3
    ],
)
def test_repeats_ngram(text, expected):
    assert metrics.repeats_ngram(text) is expected


def test_repeats_ngram_takes_another_length_and_count():
    assert metrics.repeats_ngram("ab cd ab cd", n=2, times=2)
    assert not metrics.repeats_ngram("ab cd ab cd", n=2, times=3)


def answer(dataset, model, phrasing, text, reference, **other):
    return {
        "dataset": dataset,
        "question": "What now?",
        "phrasing": phrasing,
        "reference": reference,
        "model": model,
        "answer": text,
    } | other


ANSWERS = [
    answer("report", "base", "original", "call 112 now", "call 112 now"),
    answer("report", "base", "original", "wait", "call 112 now", hit_cap=True),
    answer("report", "base", "rephrased_1", "wait", "call 112 now"),
    answer("report", "first_aid", "original", "call 112", "call 112 now"),
    answer("held_out", "base", "original", "sit down " * 8, "lie down"),
    answer("general", "finetome", "original", "call 112 now", ""),  # not scored
]


def test_scores_are_means_over_exactly_those_rows():
    rows, scores = metrics.score_answers(ANSWERS)
    assert len(rows) == 5
    assert "general" not in scores
    assert sorted(scores["report"]) == ["base", "first_aid"]
    base = scores["report"]["base"]
    assert set(base) == {"original", "rephrased_1"}
    # "call 112 now" is right to the word, "wait" shares nothing: (1 + 0) / 2.
    assert base["original"]["n"] == 2
    assert base["original"]["rougeL_f1"] == pytest.approx(0.5)
    assert base["original"]["answer_words"] == pytest.approx((3 + 1) / 2)
    assert base["original"]["advises_help"] == pytest.approx(0.5)
    assert base["original"]["ended"] == pytest.approx(0.5)
    assert base["rephrased_1"]["rougeL_f1"] == 0
    # 2 of 2 predicted words, 2 of 3 expected ones: F1 = 2 * 2 / (2 + 3).
    tuned = scores["report"]["first_aid"]["original"]
    assert tuned["rouge1_precision"] == pytest.approx(1)
    assert tuned["rouge1_recall"] == pytest.approx(2 / 3)
    assert tuned["rouge1_f1"] == pytest.approx(0.8)
    assert scores["held_out"]["base"]["original"]["repeats"] == 1
    for cell in base.values():
        assert cell["rougeL_f1_low"] <= cell["rougeL_f1"] <= cell["rougeL_f1_high"]


def test_scored_rows_keep_their_order_and_what_they_were():
    rows, _ = metrics.score_answers(ANSWERS)
    assert [row["answer"] for row in rows] == [row["answer"] for row in ANSWERS[:5]]
    assert "rougeL_f1" not in ANSWERS[0]  # the caller's rows stay as they are
    assert rows[0]["rougeL_f1"] == pytest.approx(1)
    for before, after in pairwise(rows):
        assert before.keys() - {"hit_cap"} == after.keys() - {"hit_cap"}


def test_empty_and_foreign_answers_are_counted_and_not_averaged_in():
    rows = [
        answer("report", "base", "original", "call 112 now", "call 112 now"),
        answer("report", "base", "original", " \n", "call 112 now"),
        answer("report", "base", "original", "Позвоните 112", "call 112 now"),
    ]
    scored, scores = metrics.score_answers(rows)
    cell = scores["report"]["base"]["original"]
    assert (cell["rows"], cell["n"]) == (3, 1)
    assert (cell["empty"], cell["other_script"]) == (1, 1)
    assert cell["rougeL_f1"] == 1 and cell["answer_words"] == 3
    assert cell["rougeL_f1_as_zero"] == pytest.approx(1 / 3)
    assert [metrics.is_usable(row) for row in scored] == [True, False, False]


def test_a_cell_without_a_usable_answer_has_no_mean():
    _, scores = metrics.score_answers([answer("report", "base", "original", "", "Go.")])
    cell = scores["report"]["base"]["original"]
    assert cell["n"] == 0 and cell["empty"] == 1 and "rougeL_f1" not in cell


def test_unusable_answers_are_no_pairs():
    rows = [
        row("a", "first_aid", 0.5),
        row("a", "base", 0.2),
        row("b", "first_aid", 0.9),
        row("b", "base", 0.0, empty=True),
    ]
    found = metrics.paired_difference(rows, "report", "first_aid", "base")
    assert found["n"] == 1 and found["difference"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Call 112 now.", False),
        ("Ça va, appelez à l’aide", False),
        ("Позвоните 112", True),
        ("呼叫救护车", True),
        ("press Снег", False),  # half of the letters are Latin: not more than half
        ("112!", False),
        ("", False),
    ],
)
def test_another_script(text, expected):
    assert metrics.in_another_script(text) is expected


def test_sometimes_measures_are_means_over_the_rows_that_have_them():
    card = {
        "must": [
            {"name": "call", "patterns": ["call 112"]},
            {"name": "press", "patterns": ["press"]},
        ],
        "must_not": [{"name": "cut", "patterns": [r"\bcut"]}],
        "safety_critical": True,
    }
    rows = [
        # Says one of two, gives no dangerous advice, denies the right word.
        answer("d", "base", "original", "Call 112. Do not cut.", "Never cut 2 cm."),
        # Denies nothing; says both and something dangerous; the number is right.
        answer(
            "d", "base", "original", "Call 112, press, cut 2 cm.", "Never cut 2 cm."
        ),
        # No card, and its reference denies nothing and has no number.
        answer("d", "base", "original", "Rest.", "Rest.") | {"question": "Tired?"},
    ]
    scored, scores = metrics.score_answers(rows, {"What now?": card})
    cell = scores["d"]["base"]["original"]
    assert cell["card_met"] == pytest.approx((1 / 2 + 1) / 2)
    assert cell["card_dangerous"] == pytest.approx(1 / 2)
    assert cell["card_passed"] == 0 and cell["card_passed_n"] == 2
    assert cell["help_if_critical"] == 1 and cell["help_if_critical_n"] == 2
    # Denied: {cut, cm}; of the first answer {cut}: 2 * 1 / (1 + 2); of the second {}.
    assert cell["negation_f1"] == pytest.approx((2 / 3 + 0) / 2)
    # Numbers: {2}; of the first answer {112}; of the second {112, 2}: 2 * 1 / (2 + 1).
    assert cell["number_f1"] == pytest.approx((0 + 2 / 3) / 2)
    assert cell["negation_f1_n"] == cell["number_f1_n"] == 2
    assert scored[2]["negation_f1"] is None and scored[2]["card_passed"] is None


def test_answers_without_any_reference_are_refused():
    with pytest.raises(ValueError, match="none of the answers has a reference"):
        metrics.score_answers([ANSWERS[-1]])
