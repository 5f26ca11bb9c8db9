"""Tables as files: CSV to calculate with and LaTeX to put into a report."""

from pathlib import Path

import pandas as pd

from utils.config import Settings, display_path


def folder(settings: Settings) -> Path:
    """Where a run's tables go: beside its figures, so only its own are committed."""
    return settings.figures_dir / "tables"


def save(
    frame: pd.DataFrame, settings: Settings, name: str, caption: str, stamp: str
) -> Path:
    """Save `frame` as `<name>.csv` and `<name>.tex`; prints and returns the first.

    The LaTeX needs the package booktabs; caption and stamp stand in it, and the stamp
    as a last comment line, so that a table says what made it.

    Args:
        frame: numbers are written with three decimals.
        settings: of the run.
        name: of the files, without an ending; also the label, `tab:<name>`.
        caption: the finding.
        stamp: what made it (`utils.results.stamp`).
    """
    place = folder(settings)
    place.mkdir(parents=True, exist_ok=True)
    csv = place / f"{name}.csv"
    frame.to_csv(csv, float_format="%.6g")
    latex = frame.rename(index=_escaped, columns=_escaped).to_latex(
        float_format="%.3f",
        escape=False,
        caption=_escaped(caption),
        label=f"tab:{name}",
        column_format="l" + "".join(_width(frame[column]) for column in frame),
        na_rep="--",
        formatters={
            _escaped(column): _escaped
            for column in frame.columns
            if not pd.api.types.is_numeric_dtype(frame[column])
        },
    )
    csv.with_suffix(".tex").write_text(f"{latex}% {stamp}\n", encoding="utf-8")
    print(f"wrote {display_path(csv)} and {csv.stem}.tex")
    return csv


def _width(column: pd.Series) -> str:
    """Numbers to the right, words to the left, sentences as paragraphs."""
    if pd.api.types.is_numeric_dtype(column):
        return "r"
    longest = max((len(str(value)) for value in column), default=0)
    return "l" if longest <= 40 else "p{4.5cm}"


def _escaped(text: object) -> str:
    """`text` as LaTeX prints it, nothing in it interpreted."""
    replaced = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "→": r"$\to$",
        "−": "--",
        "\n": " ",
    } | {character: "\\" + character for character in "&%$#_{}"}
    return "".join(replaced.get(character, character) for character in str(text))
