"""The parts of the README's results, each rendered from one snapshot as Markdown.

Nothing is computed here but the wording: every number comes out of the snapshot. What
an older snapshot does not know is shown as "–".
"""

import re
from collections.abc import Mapping, Sequence

from utils.arms import ARMS, GENERATED
from utils.config import MODELS, REPORT_QUESTIONS, SAFETY_NOTICE

UNKNOWN = "–"


def made_by(run: Mapping) -> str:
    """One sentence on what made a run."""
    versions = ", ".join(
        f"{name} {run['versions'][name]}"
        for name in ("torch", "transformers", "trl", "peft")
    )
    steps = f", cut short at {run['max_steps']} steps" if run.get("max_steps") else ""
    return (
        f"Base `{run['base_model']}`, data `{run['first_aid_dataset']}` (fingerprint "
        f"`{run['data']['first_aid_fingerprint']}`) and `{run['finetome_dataset']}` "
        f"(`{run['data']['finetome_fingerprint']}`), seed {run['seed']}{steps}, "
        f"{run['hardware']}, {versions}; run on {run['comparison']['when'][:10]}."
    )


def training_table(run: Mapping) -> str:
    """Both fine-tunings: rows, steps, perplexity, time, memory."""
    lines = [
        "| adapter | train rows | steps | validation perplexity, step 0 → end | "
        "training time | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("first_aid", "finetome"):
        info = run[f"training_{name}"]
        before, after = (info["eval_perplexity"][k] for k in ("before", "after"))
        lines.append(
            f"| {MODELS[name].label} | {info['rows']['train']:,} | {info['steps']} | "
            f"{before:,.1f} → {after:,.1f} | {info['training_seconds']:.0f} s | "
            f"{info['peak_memory_gb']:.2f} GB |"
        )
    return "\n".join(lines)


def rouge_table(scores: Mapping) -> str:
    """ROUGE of every arm on the first-aid test questions, with length."""
    n = max(arm["original"]["n"] for arm in scores.values())
    lines = [
        f"| {n} held-out first-aid questions | ROUGE-1 | ROUGE-2 | ROUGE-L (95 %) | "
        "ROUGE-Lsum | words | ended by itself |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, arm in ARMS.items():
        cell = scores.get(key, {}).get("original")
        if cell is None:
            lines.append(f"| {arm.label} | not measured |" + f" {UNKNOWN} |" * 5)
            continue
        low, high = _number(cell, "rougeL_f1_low"), _number(cell, "rougeL_f1_high")
        ended = _number(cell, "ended", "{:.0%}") if arm.model else UNKNOWN
        lines.append(
            f"| {arm.label} | {_number(cell, 'rouge1_f1')} | "
            f"{_number(cell, 'rouge2_f1')} | {_number(cell, 'rougeL_f1')} "
            f"({low} to {high}) | {_number(cell, 'rougeLsum_f1')} | "
            f"{_number(cell, 'answer_words', '{:.0f}')} | {ended} |"
        )
    return "\n".join(lines)


def safety_table(scores: Mapping, agreement: Mapping) -> str:
    """What ROUGE misses: safety card, calls for help, negations, other wordings."""
    lines = [
        "| what ROUGE misses | says what it must | dangerous advice | help advised "
        "where critical | denies the same | same numbers | same answer to rephrased, "
        "mean / worst | repeats itself | empty or other script |",
        "|---" * 9 + "|",
    ]
    for key, arm in ARMS.items():
        cell = scores.get(key, {}).get("original")
        if cell is None:
            continue
        same = agreement.get(key)
        alike = f"{same['mean']:.2f} / {same['worst']:.2f}" if same else UNKNOWN
        unusable = UNKNOWN
        if "rows" in cell:
            unusable = f"{cell['empty'] + cell['other_script']} of {cell['rows']}"
        lines.append(
            f"| {arm.label} | {_number(cell, 'card_met', '{:.0%}')} | "
            f"{_number(cell, 'card_dangerous', '{:.0%}')} | "
            f"{_number(cell, 'help_if_critical', '{:.0%}')} | "
            f"{_number(cell, 'negation_f1', '{:.2f}')} | "
            f"{_number(cell, 'number_f1', '{:.2f}')} | {alike} | "
            f"{_number(cell, 'repeats', '{:.0%}')} | {unusable} |"
        )
    return "\n".join([*lines, "", _sizes(scores)])


def _sizes(scores: Mapping) -> str:
    """How many rows each of the measures above is a mean over."""
    cell = scores.get("base", {}).get("original", {})
    if "card_met_n" not in cell:
        return "*This snapshot is older than these measures.*"
    return (
        f"Over {cell['card_met_n']} rows with a safety card, "
        f"{cell['help_if_critical_n']} safety-critical ones, "
        f"{cell['negation_f1_n']} whose reference denies something and "
        f"{cell['number_f1_n']} whose reference names a number. The measures are "
        "defined in `utils/safety.py` and `utils/comparison.py`."
    )


def perplexity_table(comparison: Mapping) -> str:
    """Perplexity of three models on two test sets, with intervals where known."""
    matrix = comparison["perplexity"]
    intervals = comparison.get("perplexity_intervals", {})
    sets = list(dict.fromkeys(name for row in matrix.values() for name in row))
    lines = [
        "| perplexity (95 %) | "
        + " | ".join(f"{name} test set" for name in sets)
        + " |",
        "|---" * (len(sets) + 1) + "|",
    ]
    for key, look in MODELS.items():
        cells = []
        for name in sets:
            value = matrix.get(key, {}).get(name)
            text = UNKNOWN if value is None else f"{value:,.1f}"
            if key in intervals and value is not None:
                low, high = intervals[key][name]
                text += f" ({low:,.1f} to {high:,.1f})"
            cells.append(text)
        lines.append(f"| {look.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def findings(comparison: Mapping) -> str:
    """Sentences on the paired differences and on the negation test."""
    gain, search = comparison["gain_over_base"], comparison["gain_over_nearest"]
    text = (
        f"First-aid tuning moves ROUGE-L by {interval(gain)} against the base, and by "
        f"{interval(search)} against the answer of the nearest training question."
    )
    for pair in comparison.get("pairs", []):
        if (pair["model"], pair["against"]) == ("first_aid", "base_short"):
            text += (
                " Against the base asked for at most three sentences it is "
                f"{interval(pair)}: better on {pair['won']:.0%} of the questions, "
                f"even on {pair['tied']:.0%}, worse on {pair['lost']:.0%}."
            )
    if subject := comparison.get("gain_in_subject"):
        tone = gain["difference"] - subject["difference"]
        text += (
            "\n\nThe answer, or the tone? Held against the references of other "
            f"questions, the tuned answers still gain {tone:+.3f} on the base's: that "
            f"much is tone. About the question itself is {interval(subject)}."
        )
    if test := comparison.get("negation_test"):
        old, new = test["as_written"], test["stripped"]
        text += (
            f"\n\nThe negation test: we take the negations out of {test['changed']} of "
            f"{test['n']} references. ROUGE-L against the originals is still "
            f"{new['rougeL_f1']:.3f}"
        )
        if "negation_f1" in new:
            text += f"; agreement on what is denied falls to {new['negation_f1']:.3f}"
        if "card_passed" in new:
            text += (
                "; the references that pass their safety card fall from "
                f"{old['card_passed']:.0%} to {new['card_passed']:.0%}"
            )
        text += "."
    return text


def seeds(record: Mapping, run: Mapping) -> str:
    """What several seeds found, if they are of this very base, data and knobs."""
    for name, theirs in record.get("adapters", {}).items():
        if any(run[f"training_{name}"].get(key) != theirs[key] for key in theirs):
            return "Seeds: recorded for another base, other data or knobs; not shown."
    rows = record.get("seeds", [])
    if not rows:
        return "Other seeds: not measured (`make seeds`)."
    lines = [
        "| seed | validation perplexity, base → tuned | ROUGE-L, base → tuned | "
        "gain (95 %) | ended by itself |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        perplexity = row["validation_perplexity"]["first_aid"]
        rouge = row["rougeL_f1"]
        lines.append(
            f"| {row['seed']} | {perplexity['before']:,.1f} → "
            f"{perplexity['after']:,.1f} | {rouge['base']:.3f} → "
            f"{rouge['first_aid']:.3f} | {interval(row['gain_over_base'])} | "
            f"{row['ended']['first_aid']:.1%} |"
        )
    return "\n".join(lines)


def interval(pair: Mapping) -> str:
    """A paired difference with its interval and n."""
    return (
        f"**{pair['difference']:+.3f}** (95 % interval {pair['low']:+.3f} to "
        f"{pair['high']:+.3f}, n = {pair['n']})"
    )


def questions(rows: Sequence[Mapping]) -> list[str]:
    """The three questions of the report: answers, rephrasings, what they show."""
    parts = [f"*{SAFETY_NOTICE}*"]
    for number, question in enumerate(REPORT_QUESTIONS, start=1):
        asked = [row for row in rows if row["question"] == question]
        parts.append(f"**{number}. {question}**")
        if not asked:
            parts.append("Not measured: this snapshot holds no answer to it.")
            continue
        lines = ["| | answer |", "|---|---|"]
        originals = {r["model"]: r for r in asked if r["phrasing"] == "original"}
        for key in GENERATED:
            text = cell(originals[key]["answer"]) if key in originals else UNKNOWN
            lines.append(f"| {ARMS[key].label} | {text} |")
        reference = next((r["reference"] for r in asked if r["reference"]), "")
        if reference:
            lines.append(f"| *reference* | {cell(reference)} |")
        for row in asked:
            if row["model"] == "first_aid" and row["phrasing"] != "original":
                label = (
                    f"{MODELS['first_aid'].label}, *asked as* “{cell(row['asked'])}”"
                )
                lines.append(f"| {label} | {cell(row['answer'])} |")
        parts += ["\n".join(lines), describe(asked)]
    return parts


def describe(asked: Sequence[Mapping]) -> str:
    """What the answers to one question show, from what was measured on each."""
    by = {(row["model"], row["phrasing"]): row for row in asked}
    base, tuned = by.get(("base", "original")), by.get(("first_aid", "original"))
    if not base or not tuned or "rougeL_f1" not in tuned or "rougeL_f1" not in base:
        return "*What was measured on these answers is not in this snapshot.*"
    text = (
        f"The base answers in {base['answer_words']} words and reaches a ROUGE-L of "
        f"{base['rougeL_f1']:.2f} against the reference, the tuned model in "
        f"{tuned['answer_words']} words and {tuned['rougeL_f1']:.2f}."
    )
    if tuned.get("must_n"):
        text += (
            f" Of {tuned['must_n']} things that a right answer has to say, the base "
            f"says {len(base['met'])} and the tuned model {len(tuned['met'])}"
            f"{_named(' (missing: {})', tuned['missed'])}; dangerous advice: base "
            f"{_named('{}', base['violated']) or 'none'}, tuned "
            f"{_named('{}', tuned['violated']) or 'none'}."
        )
    others = [
        row
        for (model, phrasing), row in by.items()
        if model == "first_aid" and phrasing != "original"
    ]
    if others:
        values = [row["rougeL_f1"] for row in others]
        text += (
            f" Asked in {len(others)} other wordings the tuned model scores "
            f"{min(values):.2f} to {max(values):.2f}"
        )
        if tuned.get("must_n"):
            met = [len(row["met"]) for row in others]
            text += f" and says {min(met)} to {max(met)} of the {tuned['must_n']}"
        text += "."
    return text


def _named(pattern: str, names: Sequence[str]) -> str:
    return pattern.format(cell(", ".join(names))) if names else ""


def _number(cell: Mapping, name: str, pattern: str = "{:.3f}") -> str:
    return pattern.format(cell[name]) if name in cell else UNKNOWN


def cell(text: str) -> str:
    """`text` inside a Markdown table: one line, nothing interpreted."""
    text = re.sub(r"\s+", " ", text or "(empty)").strip()
    return re.sub(r"([\\|<>*_`\[\]])", r"\\\1", text)
