"""The figures of the comparison: ROUGE, pairs of arms, perplexity, what ROUGE misses.

The style is that of `utils.plots`; each function draws, none computes or saves.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from utils.arms import ARMS
from utils.config import MODELS

WITHOUT_MODEL = "#BBBBBB"


def _look(arm: str) -> dict:
    """Colour and hatch of an arm: its model's, paler where it is asked to be short."""
    if ARMS[arm].model is None:
        return {"color": WITHOUT_MODEL, "edgecolor": "white", "hatch": "xx"}
    look = MODELS[ARMS[arm].model]
    style = {"color": look.colour, "hatch": look.hatch, "edgecolor": "white"}
    return style | ({"alpha": 0.55} if ARMS[arm].short else {})


def rouge_bars(scores: Mapping[str, Mapping], title: str, dataset: str) -> Figure:
    """ROUGE-1, 2 and L of every arm on one data set: three panels, one bar an arm.

    Args:
        scores: `scores[arm]["original"]` as `utils.metrics.score_answers` gives it.
        title: the finding.
        dataset: what the questions are, for the axis.
    """
    measures = {"ROUGE-1": "rouge1_f1", "ROUGE-2": "rouge2_f1", "ROUGE-L": "rougeL_f1"}
    arms = [arm for arm in ARMS if arm in scores][::-1]
    cells = [scores[arm]["original"] for arm in arms]
    figure, axes = plt.subplots(
        1, 3, figsize=(11.5, 0.42 * len(arms) + 1.6), sharey=True, sharex=True
    )
    for axis, (label, measure) in zip(axes, measures.items()):
        values = [cell.get(measure, 0.0) for cell in cells]
        for place, (arm, value) in enumerate(zip(arms, values)):
            axis.barh(place, value, **_look(arm))
        axis.set_xlabel(f"{label} F1, stemmed (0 to 1)")
        axis.grid(axis="y", visible=False)
        ends = values
        if measure == "rougeL_f1":
            ends = [cell.get("rougeL_f1_high", 0.0) for cell in cells]
            lows = [v - cell.get("rougeL_f1_low", v) for cell, v in zip(cells, values)]
            highs = [max(end - v, 0) for end, v in zip(ends, values)]
            whiskers = {"fmt": "none", "color": "black", "capsize": 3}
            axis.errorbar(values, range(len(arms)), xerr=[lows, highs], **whiskers)
        for place, (value, end) in enumerate(zip(values, ends)):
            axis.text(end + 0.004, place, f"{value:.3f}", va="center", fontsize=8)
    names = [f"{ARMS[arm].label} (n = {c['n']})" for arm, c in zip(arms, cells)]
    axes[0].set_yticks(range(len(arms)), names)
    axes[0].set_xlim(0, axes[0].get_xlim()[1] * 1.12)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12)
    figure.text(
        0.99,
        0.0,
        f"{dataset}; whiskers on ROUGE-L: 95 % bootstrap interval",
        fontsize=8,
        ha="right",
    )
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure


def pair_intervals(pairs: Sequence[Mapping], title: str) -> Figure:
    """Paired differences in ROUGE-L with their intervals, one line a pair of arms.

    Args:
        pairs: as `utils.comparison.pairs_of_arms` gives them.
        title: the finding.
    """
    pairs = list(pairs)[::-1]
    figure, axis = plt.subplots(figsize=(9, 0.28 * len(pairs) + 1.5))
    for place, pair in enumerate(pairs):
        clear = pair["low"] > 0 or pair["high"] < 0
        axis.errorbar(
            pair["difference"],
            place,
            xerr=[
                [pair["difference"] - pair["low"]],
                [pair["high"] - pair["difference"]],
            ],
            fmt="o" if clear else "D",
            color="black",
            markerfacecolor="black" if clear else "white",
            markersize=5,
            capsize=3,
        )
    names = [
        f"{ARMS[p['model']].label} − {ARMS[p['against']].label} (n = {p['n']})"
        for p in pairs
    ]
    axis.set_yticks(range(len(pairs)), names, fontsize=8)
    axis.axvline(0, color="black", linewidth=1)
    axis.set_xlabel(
        "difference in ROUGE-L F1, 95 % interval; hollow: the interval holds 0"
    )
    axis.locator_params(axis="x", nbins=5)
    axis.set_title(title, fontweight="bold")
    axis.grid(axis="y", visible=False)
    figure.tight_layout()
    return figure


def tone_bars(means: Mapping[str, Mapping[str, float]], title: str) -> Figure:
    """ROUGE-L of every arm in two parts: tone, and on top what is about the question.

    Args:
        means: by arm `tone_f1` and `subject_f1`, as `utils.comparison.tone_apart`
            gives them, averaged.
        title: the finding.
    """
    arms = [arm for arm in ARMS if arm in means][::-1]
    figure, axis = plt.subplots(figsize=(9, 0.42 * len(arms) + 1.7))
    for place, arm in enumerate(arms):
        tone, subject = means[arm]["tone_f1"], means[arm]["subject_f1"]
        look = _look(arm)
        axis.barh(place, tone, **look | {"alpha": 0.35})
        axis.barh(place, subject, left=tone, **look)
        end = max(tone, tone + subject) + 0.003
        label = f"{tone:.3f} {subject:+.3f}"
        axis.text(end, place, label, va="center", fontsize=8)
    axis.set_yticks(range(len(arms)), [ARMS[arm].label for arm in arms])
    axis.set_xlim(0, axis.get_xlim()[1] * 1.15)
    axis.set_xlabel(
        "ROUGE-L F1 (0 to 1): pale with other questions' references, "
        "full what the own one adds"
    )
    axis.set_title(title, fontweight="bold")
    axis.grid(axis="y", visible=False)
    figure.tight_layout()
    return figure


def perplexity_heatmap(
    matrix: Mapping[str, Mapping[str, float]],
    title: str,
    intervals: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
) -> Figure:
    """Perplexity of each model (rows) on each test set (columns); lower is better.

    Args:
        matrix: perplexity by model and test set.
        title: the finding.
        intervals: if known, the 95 % interval of each, as (low, high).
    """
    models = [key for key in MODELS if key in matrix]
    sets = list(matrix[models[0]])
    values = np.array([[matrix[m][s] for s in sets] for m in models])

    def text(model: str, name: str) -> str:
        value = f"{matrix[model][name]:,.1f}"
        if not intervals:
            return value
        low, high = intervals[model][name]
        return f"{value}\n({low:,.1f} to {high:,.1f})"

    figure, axis = plt.subplots(figsize=(7, 3.6))
    sns.heatmap(
        values / values[0],
        annot=np.array([[text(m, s) for s in sets] for m in models]),
        fmt="",
        cmap="vlag",
        center=1.0,
        vmin=0,
        vmax=2,
        xticklabels=sets,
        yticklabels=[MODELS[m].label for m in models],
        cbar_kws={"label": "relative to the base"},
        linewidths=2,
        ax=axis,
    )
    axis.set_title(title, fontweight="bold")
    axis.tick_params(axis="y", rotation=0)
    figure.tight_layout()
    return figure


def negation_bars(test: Mapping, title: str) -> Figure:
    """References as written and with their negations taken out, by four measures.

    Args:
        test: as `utils.comparison.negation_test` gives it.
        title: the finding.
    """
    measures = {
        "ROUGE-L F1": ("rougeL_f1", "n"),
        "denies the same": ("negation_f1", "negation_f1_n"),
        "says what it must": ("card_met", "card_met_n"),
        "passes the safety card": ("card_passed", "card_passed_n"),
    }
    shown = {k: v for k, v in measures.items() if v[0] in test["stripped"]}
    figure, axis = plt.subplots(figsize=(8, 3.4))
    looks = {
        "as_written": ("as written", {"color": WITHOUT_MODEL, "hatch": ""}),
        "stripped": ('without "not", "never" …', {"color": "#CC79A7", "hatch": "//"}),
    }
    for shift, (key, (label, look)) in zip((-0.2, 0.2), looks.items()):
        values = [test[key][measure] for measure, _ in shown.values()]
        places = np.arange(len(shown)) + shift
        bars = axis.bar(places, values, 0.38, label=label, edgecolor="white", **look)
        axis.bar_label(bars, [f"{v:.3f}" for v in values], padding=2, fontsize=8)
    names = [f"{k}\nn = {test['stripped'][n]}" for k, (_, n) in shown.items()]
    axis.set_xticks(range(len(shown)), names)
    axis.set_ylim(0, 1.3)
    axis.set_ylabel("mean (0 to 1)")
    axis.set_title(title, fontweight="bold")
    axis.legend(loc="upper right", ncols=2)
    axis.grid(axis="x", visible=False)
    figure.tight_layout()
    return figure
