"""ROUGE as an `evaluate` metric that needs no network: load it by its path.

`evaluate.load("rouge")` fetches a script from the Hub and fails without one. This is
the same measure from the same library (rouge_score, Lin 2004), per row, stemmed, with
precision, recall and F1. ROUGE-Lsum wants one sentence a line; they are cut at their
full stops here, where rouge_score would need NLTK's data from the network. `evaluate`
reads the imports below line by line: one each.
"""

import re

import datasets
import evaluate
from rouge_score import rouge_scorer

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def one_sentence_a_line(text):
    """`text` with a line break after each sentence."""
    return re.sub(r"(?<=[.!?])\s+", "\n", text)


class Rouge(evaluate.Metric):
    """Lists of predictions and references in; lists of scores per row out."""

    def _info(self):
        return evaluate.MetricInfo(
            description="ROUGE-1, -2, -L and -Lsum per row, stemmed, with P, R and F1.",
            citation="Lin (2004): ROUGE, automatic evaluation of summaries",
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Value("string"),
                }
            ),
        )

    def _compute(self, predictions, references):
        scorer = rouge_scorer.RougeScorer(KINDS, use_stemmer=True)
        columns = {
            f"{kind}_{part}": []
            for kind in KINDS
            for part in ("precision", "recall", "f1")
        }
        for prediction, reference in zip(predictions, references):
            scores = scorer.score(
                one_sentence_a_line(reference), one_sentence_a_line(prediction)
            )
            for kind in KINDS:
                columns[f"{kind}_precision"].append(scores[kind].precision)
                columns[f"{kind}_recall"].append(scores[kind].recall)
                columns[f"{kind}_f1"].append(scores[kind].fmeasure)
        return columns
