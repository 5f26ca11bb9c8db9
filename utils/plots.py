"""The figure style and one function per figure. Each draws, none computes or saves."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from utils.config import MODELS, Settings, display_path

REFERENCE = "#009E73"  # the published T4 curves: a colour that no model has
SPLIT_COLOURS = {"train": "#56B4E9", "validation": "#E69F00", "test": "#CC79A7"}
PUBLISHED_EVALUATION = {
    "color": "#333333",
    "linestyle": "--",
    "marker": "D",
    "markersize": 4,
    "linewidth": 1,
}
WINDOW = 9  # steps of the moving average


def set_style() -> None:
    """The look of every figure: light grid, no top or right spine, 150 dpi."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind")
    plt.rcParams.update(
        {
            "figure.dpi": 100,
            "savefig.dpi": 150,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 11,
            "axes.labelsize": 10,
            "grid.alpha": 0.5,
            "legend.frameon": False,
            "legend.fontsize": 9,
        }
    )


def save(figure: Figure, settings: Settings, name: str, stamp: str) -> Path:
    """Save `figure` with its stamp below it; prints and returns the path."""
    figure.text(0.01, -0.02, stamp, fontsize=7, color="#555555", ha="left", va="top")
    path = settings.figures_dir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
    print(f"wrote {display_path(path)}")
    return path


def moving_average(values: Sequence[float], window: int = WINDOW) -> np.ndarray:
    """Centred mean over `window` values, over fewer at the ends."""
    values = np.asarray(values, dtype=float)
    half = window // 2
    return np.array(
        [values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))]
    )


def training_curves(
    steps: Sequence[Mapping],
    evaluations: Sequence[Mapping],
    model: str,
    title: str,
    published: Mapping | None = None,
) -> Figure:
    """Loss and perplexity of one run, as two panels that share the x axis.

    Args:
        steps: rows with `step`, `epoch`, `loss` (nats per answer token).
        evaluations: rows with `step`, `eval_nll`, `eval_perplexity`.
        model: key of `utils.config.MODELS`; it gives colour and marker.
        title: the finding.
        published: a run of `data/published/t4_runs.json`; if given, a second column
            shows it on axes of its own, because it measures something else.
    """
    look = MODELS[model]
    columns = 2 if published else 1
    figure, axes = plt.subplots(
        2, columns, figsize=(5.6 * columns, 6.2), sharex="col", squeeze=False
    )
    top, bottom = axes[:, 0]
    x = [row["step"] for row in steps]
    loss = np.array([row["loss"] for row in steps])
    for axis, values in ((top, loss), (bottom, np.exp(loss))):
        axis.plot(x, values, color=look.colour, alpha=0.25, linewidth=1)
        axis.plot(
            x,
            moving_average(values),
            color=look.colour,
            linestyle=look.linestyle,
            linewidth=2,
            label=f"training batch, mean over {WINDOW} steps",
        )
    at = [row["step"] for row in evaluations]
    validation = {
        "color": "black",
        "marker": look.marker,
        "markersize": 5,
        "linewidth": 1.2,
    }
    top.plot(at, [r["eval_nll"] for r in evaluations], label="validation", **validation)
    bottom.plot(
        at,
        [r["eval_perplexity"] for r in evaluations],
        label="validation",
        **validation,
    )
    top.set_title(f"{look.label}: this run")
    top.set_ylabel("loss (nats per answer token)")
    bottom.set_ylabel("perplexity")
    bottom.set_xlabel("optimizer step")
    top.legend(loc="upper right")
    for axis in (top, bottom):
        axis.set_ylim(bottom=0)
        _mark_epochs(axis, steps)
    if published:
        _published_column(axes[:, 1], published)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.tight_layout()
    return figure


def _mark_epochs(axis, steps: Sequence[Mapping]) -> None:
    """A thin line where each epoch ends, labelled at the top."""
    last = 0
    for _before, after in zip(steps, steps[1:]):
        if int(after["epoch"] + 1e-6) > last:
            last = int(after["epoch"] + 1e-6)
            axis.axvline(after["step"], color="#999999", linewidth=0.8, linestyle=":")
            axis.annotate(
                f"epoch {last}",
                (after["step"], 0.02),
                xycoords=("data", "axes fraction"),
                fontsize=7,
                color="#777777",
                rotation=90,
                ha="right",
                va="bottom",
            )


def _published_column(axes, published: Mapping) -> None:
    """The original's curves on a T4: evaluation of all text, training of answers."""
    top, bottom = axes
    _published_loss(top, published)
    training = published.get("train", {}).get("step_loss")
    if training:
        x, loss = np.array(training).T
        smooth = moving_average(np.exp(loss))
        bottom.plot(x, smooth, color=REFERENCE, linewidth=2)
    at, loss = published["eval"]["steps"], np.array(published["eval"]["loss"])
    bottom.plot(at, np.exp(loss), **PUBLISHED_EVALUATION)
    top.set_title("Published: Llama 3.2 1B Instruct, Tesla T4")
    top.set_ylabel("loss (nats per token)")
    bottom.set_ylabel("perplexity")
    bottom.set_xlabel("optimizer step")
    top.legend(loc="upper right")
    for axis in axes:
        axis.set_ylim(bottom=0)


def topic_bars(topics: Mapping[str, Mapping], title: str) -> Figure:
    """Rows per topic; the safety-critical ones among them in colour and hatched.

    Args:
        topics: `topics[topic]` holds `rows` and `safety_critical`, both counts.
        title: the finding.
    """
    names = list(topics)[::-1]
    labels = [name.replace("_", " ") for name in names]
    critical = [topics[name]["safety_critical"] for name in names]
    other = [topics[name]["rows"] - n for name, n in zip(names, critical)]
    figure, axis = plt.subplots(figsize=(8, 0.26 * len(names) + 1.4))
    look = dict(color=MODELS["first_aid"].colour, hatch="//", edgecolor="white")
    axis.barh(labels, critical, label="safety-critical", **look)
    bars = axis.barh(labels, other, left=critical, color="#BBBBBB", label="other")
    totals = [topics[name]["rows"] for name in names]
    axis.bar_label(bars, totals, padding=3, fontsize=8)
    axis.set_xlabel("rows")
    axis.set_title(title, fontweight="bold")
    axis.set_xlim(0, max(totals) * 1.4)
    axis.legend(loc="upper right")
    axis.grid(axis="y", visible=False)
    figure.tight_layout()
    return figure


def count_bars(counts: Mapping[str, int], title: str, label: str) -> Figure:
    """One bar per entry of `counts`, in its order from the top.

    Args:
        counts: rows by name.
        title: the finding.
        label: what is counted, for the axis.
    """
    names = list(counts)[::-1]
    figure, axis = plt.subplots(figsize=(8, 0.26 * len(names) + 1.2))
    look = MODELS["finetome"]
    bars = axis.barh(
        names,
        [counts[name] for name in names],
        color=look.colour,
        hatch=look.hatch,
        edgecolor="white",
    )
    axis.bar_label(bars, padding=3, fontsize=8)
    axis.set_xlabel(label)
    axis.set_title(title, fontweight="bold")
    axis.grid(axis="y", visible=False)
    figure.tight_layout()
    return figure


def length_histograms(
    lengths: Mapping[str, Sequence[int]], title: str, unit: str = "tokens"
) -> Figure:
    """One histogram of lengths per entry of `lengths`, on axes of their own."""
    figure, axes = plt.subplots(1, len(lengths), figsize=(4.6 * len(lengths), 3.2))
    for axis, (name, values) in zip(np.atleast_1d(axes), lengths.items()):
        axis.hist(values, bins=30, color="#0072B2", edgecolor="white")
        median = float(np.median(values))
        axis.axvline(median, color="black", linestyle="--", linewidth=1)
        axis.annotate(
            f" median {median:.0f}",
            (median, 0.95),
            xycoords=("data", "axes fraction"),
            fontsize=9,
        )
        axis.set_xlabel(f"{name} ({unit}), n = {len(values):,}")
        axis.set_ylabel("rows")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12)
    figure.tight_layout()
    return figure


def nearest_similarity(
    random_split: Sequence[float], grouped_split: Sequence[float], threshold: float
) -> Figure:
    """How alike each test question and its nearest training question are, both ways."""
    figure, axis = plt.subplots(figsize=(8, 3.6))
    bins = np.linspace(0, 1, 41)
    axis.hist(
        random_split,
        bins=bins,
        histtype="step",
        linewidth=2,
        linestyle="--",
        color="#666666",
        label=f"random split (n = {len(random_split)})",
    )
    axis.hist(
        grouped_split,
        bins=bins,
        alpha=0.5,
        color="#0072B2",
        label=f"near-duplicates kept together\n(n = {len(grouped_split)})",
    )
    axis.axvline(threshold, color="black", linewidth=1)
    axis.annotate(f" {threshold}: near-twins", (threshold, axis.get_ylim()[1] * 0.9))
    axis.set_xlabel(
        "TF-IDF cosine of a test question and its nearest training question"
    )
    axis.set_ylabel("test questions")
    axis.legend(loc=(0.64, 0.45))
    figure.tight_layout()
    return figure


def baseline_bars(baselines: Mapping[str, Mapping], title: str) -> Figure:
    """ROUGE-L of answers that need no model, with 95 % intervals."""
    figure, axis = plt.subplots(figsize=(8, 0.5 * len(baselines) + 1.3))
    names = list(baselines)[::-1]
    values = [baselines[name]["mean"] for name in names]
    errors = [
        [v - baselines[n]["low"] for v, n in zip(values, names)],
        [baselines[n]["high"] - v for v, n in zip(values, names)],
    ]
    bars = axis.barh(names, values, xerr=errors, color="#999999", capsize=4)
    axis.bar_label(bars, [f"  {v:.3f}" for v in values], padding=8, fontsize=9)
    n = next(iter(baselines.values()))["n"]
    axis.set_xlabel(
        f"ROUGE-L F1 against the reference, stemmed; n = {n}, 95 % interval"
    )
    axis.set_xlim(0, max(0.35, max(values) * 1.25))
    axis.set_title(title, fontweight="bold")
    axis.grid(axis="y", visible=False)
    figure.tight_layout()
    return figure


def whole_text_curves(
    evaluations: Sequence[Mapping], published: Mapping, model: str, title: str
) -> Figure:
    """The original's measure of a run beside the answers-only one, and the original's.

    Args:
        evaluations: rows with `step`, `eval_nll` and `eval_whole_text` (nats).
        published: a run of `data/published/t4_runs.json`.
        model: key of `utils.config.MODELS`.
        title: the finding.
    """
    look = MODELS[model]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.2, 3.8))
    at = [row["step"] for row in evaluations]
    for key, label, style in (
        ("eval_whole_text", "the whole chat text, mean of rows' means", "--"),
        ("eval_nll", "answer tokens only", "-"),
    ):
        left.plot(
            at,
            [row[key] for row in evaluations],
            color=look.colour,
            linestyle=style,
            marker="D" if style == "--" else look.marker,
            markersize=4,
            label=label,
        )
    left.set_title(f"{look.label}: this run, held-out rows")
    _published_loss(right, published)
    right.set_title("Published: Llama 3.2 1B Instruct, Tesla T4")
    for axis in (left, right):
        axis.set_xlabel("optimizer step")
        axis.set_ylabel("loss (nats per token)")
        axis.set_ylim(bottom=0)
        axis.legend(loc="lower left")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.tight_layout()
    return figure


def _published_loss(axis, published: Mapping) -> None:
    """The original's loss on a T4: training on answers, evaluation on all text."""
    training = published.get("train", {}).get("step_loss")
    if training:
        x, loss = np.array(training).T
        axis.plot(x, loss, color=REFERENCE, alpha=0.25, linewidth=1)
        axis.plot(
            x,
            moving_average(loss),
            color=REFERENCE,
            linewidth=2,
            label="training: answer tokens",
        )
    at, loss = published["eval"]["steps"], published["eval"]["loss"]
    axis.plot(at, loss, label="evaluation: the whole chat text", **PUBLISHED_EVALUATION)
