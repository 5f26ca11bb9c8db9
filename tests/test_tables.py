"""Tables land as CSV to calculate with and as LaTeX that compiles."""

import pandas as pd

from utils import tables

FRAME = pd.DataFrame(
    {
        "arm": ["Base & co_1", "50 % → {x}"],
        "n": [3, 4],
        "ROUGE-L": [0.12345678, None],
        "answer": ["a" * 50, "short"],
    }
).set_index("arm")


def test_csv_keeps_the_numbers_and_latex_escapes(settings, capsys):
    made = settings()
    path = tables.save(FRAME, made, "rouge", "What 50 % is", "profile pocket")
    assert path == made.run_dir / "imgs" / "tables" / "rouge.csv"
    back = pd.read_csv(path, index_col="arm")
    assert back["n"].tolist() == [3, 4] and list(back.index) == list(FRAME.index)
    assert abs(back["ROUGE-L"].iloc[0] - 0.12345678) < 1e-6
    text = path.with_suffix(".tex").read_text("utf-8")
    for expected in (
        r"\begin{tabular}{lrrp{4.5cm}}",
        r"Base \& co\_1 & 3 & 0.123 &",
        r"50 \% $\to$ \{x\} & 4 & -- & short \\",
        r"\caption{What 50 \% is}",
        r"\label{tab:rouge}",
        "% profile pocket\n",
    ):
        assert expected in text, expected
    assert "rouge.csv" in capsys.readouterr().out
