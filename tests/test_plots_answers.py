"""The figures of the comparison show every arm, its n and its interval."""

import matplotlib.pyplot as plt
import pytest

from utils import plots, plots_answers
from utils.arms import ARMS


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def texts(figure) -> str:
    found = [text.get_text() for text in figure.findobj(plt.Text)]
    return "\n".join(found)


def cell(value: float) -> dict:
    keys = ("rouge1_f1", "rouge2_f1", "rougeL_f1")
    low, high = value - 0.01, value + 0.01
    return dict.fromkeys(keys, value) | {
        "n": 7,
        "rougeL_f1_low": low,
        "rougeL_f1_high": high,
    }


def test_rouge_bars_show_every_arm_with_its_n():
    scores = {arm: {"original": cell(0.1 + n / 100)} for n, arm in enumerate(ARMS)}
    del scores["echo"]
    figure = plots_answers.rouge_bars(scores, "a finding", "questions")
    said = texts(figure)
    for arm, look in ARMS.items():
        assert (f"{look.label} (n = 7)" in said) == (arm != "echo")
    assert "0.100" in said and "a finding" in said
    assert all(axis.get_xlim()[0] == 0 for axis in figure.axes)


def test_an_arm_without_a_usable_answer_has_an_empty_bar():
    scores = {"base": {"original": {"n": 0}}, "first_aid": {"original": cell(0.2)}}
    assert "Base (n = 0)" in texts(plots_answers.rouge_bars(scores, "t", "d"))


def test_pairs_whose_interval_holds_zero_are_hollow():
    pair = {"model": "first_aid", "against": "base", "n": 5, "difference": 0.1}
    pairs = [pair | {"low": 0.05, "high": 0.2}, pair | {"low": -0.05, "high": 0.2}]
    axis = plots_answers.pair_intervals(pairs, "t").axes[0]
    points = [line for line in axis.lines if line.get_marker() in ("o", "D")]
    faces = {line.get_marker(): line.get_markerfacecolor() for line in points}
    assert faces == {"o": "black", "D": "white"}
    assert "FirstAidQA − Base (n = 5)" in texts(axis.figure)


def test_tone_and_subject_stand_on_top_of_each_other():
    means = {"base": (0.11, 0.004), "first_aid": (0.15, 0.02), "echo": (0.1, -0.01)}
    means = {k: {"tone_f1": t, "subject_f1": s} for k, (t, s) in means.items()}
    figure = plots_answers.tone_bars(means, "a finding")
    said = texts(figure)
    assert "0.150 +0.020" in said and "0.100 -0.010" in said and "a finding" in said
    bars = figure.axes[0].patches
    assert len(bars) == 6
    tone, subject = (bar for bar in bars if bar.get_y() == bars[2].get_y())
    assert tone.get_width() == 0.15 and subject.get_x() == 0.15


def test_the_heat_map_writes_the_intervals():
    matrix = {m: {"first aid": 20.0, "general": 8.0} for m in ("base", "first_aid")}
    intervals = {m: {"first aid": (18, 22), "general": (7, 9)} for m in matrix}
    figure = plots_answers.perplexity_heatmap(matrix, "t", intervals)
    assert "20.0\n(18.0 to 22.0)" in texts(figure)


def test_the_negation_test_shows_only_what_was_measured():
    old = {"rougeL_f1": 1.0, "negation_f1": 1.0}
    new = {"rougeL_f1": 0.98, "negation_f1": 0.3, "n": 9, "negation_f1_n": 4}
    said = texts(plots_answers.negation_bars({"as_written": old, "stripped": new}, "t"))
    assert "n = 9" in said and "n = 4" in said and "0.980" in said
    assert "safety card" not in said


def test_the_whole_text_stands_beside_the_answers():
    rows = [
        {"step": 0, "eval_nll": 2.0, "eval_whole_text": 3.5},
        {"step": 30, "eval_nll": 1.9, "eval_whole_text": 2.5},
    ]
    published = {"eval": {"steps": [0, 30], "loss": [3.6, 2.8]}}
    left, right = plots.whole_text_curves(rows, published, "first_aid", "t").axes
    assert [list(line.get_ydata()) for line in left.lines] == [[3.5, 2.5], [2.0, 1.9]]
    assert list(right.lines[0].get_ydata()) == [3.6, 2.8]
    assert left.get_ylim()[0] == right.get_ylim()[0] == 0
