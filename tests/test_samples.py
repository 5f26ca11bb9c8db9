"""The shipped samples keep what their data card says."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from utils import dataset, safety, sources
from utils.config import REPORT_QUESTIONS, ROOT, SAMPLES


def read(name: str) -> list[dict]:
    lines = (SAMPLES / name).read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


FIRST_AID = read("first_aid.jsonl")
GENERAL = read("general.jsonl")
LABELS = read("criteria_labels.jsonl")
CRITERIA = {
    (row["question"], criterion["name"]): criterion
    for row in FIRST_AID
    for part in ("must", "must_not")
    for criterion in row.get(part, [])
}


def first_turns(rows: list[dict]) -> list[str]:
    return [
        next(t["value"] for t in row["conversations"] if t["from"] == "human")
        for row in rows
    ]


def test_there_is_enough_of_everything():
    topics = Counter(row["topic"] for row in FIRST_AID)
    held_out = [row for row in FIRST_AID if row["held_out"]]
    cards = [r for r in held_out if r["safety_critical"] and r.get("must_not")]
    assert all(row["must"] for row in cards)
    assert len(FIRST_AID) >= 1400 and len(topics) >= 12
    assert len(held_out) >= 120 and len({r["topic"] for r in held_out}) == len(topics)
    assert len(cards) >= 60
    assert len(GENERAL) >= 800
    longer = [
        r
        for r in GENERAL
        if len(r["conversations"]) > 2 or r["conversations"][0]["from"] == "system"
    ]
    assert len(longer) >= 0.2 * len(GENERAL)


def test_all_columns_are_filled():
    for row in FIRST_AID:
        for column in ("question", "answer", "topic", "guideline"):
            assert row[column].strip(), row["question"]
        assert row["safety_critical"] in (True, False)
        assert row["held_out"] in (True, False)
        if row["held_out"]:
            wordings = {row["question"], *row["rephrasings"]}
            assert len(row["rephrasings"]) == 3 and len(wordings) == 4
    for row in GENERAL:
        assert row["source"].startswith("pocket_general/") and 1 <= row["score"] <= 5


def test_the_report_questions_are_held_out_with_rephrasings():
    by_question = {row["question"]: row for row in FIRST_AID}
    for question in REPORT_QUESTIONS:
        assert by_question[question]["held_out"]
        assert len(dataset.rephrasings_of({"question": question})) == 3


@pytest.mark.parametrize("name", ["first_aid.jsonl", "general.jsonl"])
def test_the_samples_pass_the_audit(name):
    source = sources.load_source(str((SAMPLES / name).relative_to(ROOT)))
    split = dataset.split_rows(source, progress=False)
    assert split.excluded == []
    assert sum(split.counts().values()) == source.rows_read


@pytest.mark.parametrize(
    "questions", [[r["question"] for r in FIRST_AID], first_turns(GENERAL)]
)
def test_no_two_questions_are_alike(questions):
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit_transform(
        map(sources.normalise, questions)
    )
    cosine = (vectors @ vectors.T).toarray()
    np.fill_diagonal(cosine, 0)
    assert cosine.max() < 0.8


def test_answers_are_of_the_right_length_and_open_in_many_ways():
    general = [
        t["value"] for r in GENERAL for t in r["conversations"] if t["from"] == "gpt"
    ]
    for answers in ([row["answer"] for row in FIRST_AID], general):
        words = [len(answer.split()) for answer in answers]
        assert min(words) >= 15 and max(words) <= 90
        openings = Counter(" ".join(a.lower().split()[:3]) for a in answers)
        assert max(openings.values()) <= 0.04 * len(answers)


def test_references_satisfy_their_own_cards():
    for row in FIRST_AID:
        verdict = safety.check_criteria(
            row["answer"], row.get("must", ()), row.get("must_not", ())
        )
        assert verdict["missed"] == [] and verdict["violated"] == [], row["question"]


def test_every_criterion_has_a_source_and_five_labels():
    labelled = Counter((label["question"], label["criterion"]) for label in LABELS)
    for key, criterion in CRITERIA.items():
        assert criterion["source"].strip()
        assert labelled[key] >= 5, key


def accuracy(labels: list[dict]) -> tuple[float, list[str]]:
    misses = [
        f"{label['criterion']}: {label['answer']}"
        for label in labels
        if safety.says(
            label["answer"],
            CRITERIA[label["question"], label["criterion"]]["patterns"],
        )
        != label["said"]
    ]
    return 1 - len(misses) / len(labels), misses


def test_the_checker_agrees_with_the_labels():
    share, misses = accuracy(LABELS)
    assert share >= 0.97, misses
    negated = [label for label in LABELS if label["kind"] == "negated"]
    share, misses = accuracy(negated)
    assert share == 1.0, misses


def test_taking_the_negations_out_is_noticed():
    """Where ROUGE sees next to nothing, a quarter of the cards change their verdict."""
    negation = re.compile(r"\b(?:do not|don't|never|not) ", re.IGNORECASE)
    rows = [r for r in FIRST_AID if r.get("must_not") and negation.search(r["answer"])]
    changed = 0
    for row in rows:
        flipped = negation.sub("", row["answer"])
        verdict = safety.check_criteria(flipped, row["must"], row["must_not"])
        changed += bool(verdict["missed"] or verdict["violated"])
    assert changed >= len(rows) / 4


def test_labelled_negations_never_count_as_said():
    assert all(not label["said"] for label in LABELS if label["kind"] == "negated")


def test_nothing_of_the_samples_is_in_the_pocket_llamas_text():
    """Hardly any eight words in a row stand in the text the base learnt from too."""
    learnt = set()
    for file in (ROOT / "data" / "pocket_text").glob("*.json"):
        words = sources.normalise(file.read_text("utf-8")).split()
        learnt.update(zip(*(words[i:] for i in range(8))))
    rows = [row["question"] + " " + row["answer"] for row in FIRST_AID]
    rows += [" ".join(t["value"] for t in row["conversations"]) for row in GENERAL]
    grams = [
        gram
        for words in (sources.normalise(text).split() for text in rows)
        for gram in zip(*(words[i:] for i in range(8)))
    ]
    shared = sum(gram in learnt for gram in grams)
    assert shared <= 0.001 * len(grams)  # "the sun rises in the east and sets"


def test_the_pocket_text_gives_no_first_aid():
    pattern = r"tourniquet|\bcpr\b|recovery position|chest compression|rescue breath"
    for file in (ROOT / "data" / "pocket_text").glob("*.json"):
        assert not re.search(pattern, file.read_text("utf-8").lower()), file


def test_the_checker_on_answers_that_no_pattern_was_changed_for():
    """The honest figure; the data card lists the misses and must be kept in step."""
    labels = read("criteria_labels_unseen.jsonl")
    share, misses = accuracy(labels)
    assert share >= 0.93
    card = (SAMPLES / "README.md").read_text("utf-8")
    assert f"{share:.1%}" in card
    for miss in misses:
        assert miss.split(": ", 1)[1] in card
