"""Split and audit: near-duplicates stay together, and everything is counted.

Whole groups go to train, validation or test, so that no test question has a twin in the
training set.

    python -m utils.dataset --source PATH_OR_HUB_ID --out DIR
"""

import argparse
import hashlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from utils import safety
from utils.config import (
    REPORT_QUESTIONS,
    SAMPLES,
)
from utils.similarity import group_questions, nearest_rows
from utils.sources import (
    CONVERSATION,
    QA,
    Exclusion,
    Source,
    canonical,
    digest,
    is_true,
    load_source,
    normalise,
    question_of,
    reasons_of,
)
from utils.topics import question_kind, topic_of

SPLITS = ("train", "validation", "test")
TWIN_COSINE = 0.6  # what we count as a near-twin; above .55, as weights move a little
LEAKAGE_SAMPLE = 2_000  # so many test questions tell how much leaks
VALIDATION_FROM, TEST_FROM = 0.8, 0.9  # where a group's hash in [0, 1) falls


@dataclass
class Split:
    """Rows by split, what was left out, and the fingerprint of both.

    `key_of` and `linked` are the groups that decided: see `group_questions`.
    """

    kind: str
    train: list[dict]
    validation: list[dict]
    test: list[dict]
    excluded: list[Exclusion]
    fingerprint: str
    source: str
    revision: str
    rows_read: int
    key_of: dict[str, str] = field(default_factory=dict, repr=False)
    linked: list[tuple[str, str, float]] = field(default_factory=list, repr=False)

    def counts(self) -> dict[str, int]:
        """Rows per split."""
        return {name: len(getattr(self, name)) for name in SPLITS}


def split_rows(source: Source, *, progress: bool = True) -> Split:
    """Split into train, validation and test so that no near-duplicates are parted.

    Exact repeats leave one row. Of question-answer rows with the same question and
    different answers one stays: the answer that advises to call for help; if that
    does not decide, the longer one; then the alphabetically first. A group with a
    row that says `held_out: true`, or with a question of the report, goes to test;
    for the others a hash of the group's key decides, 80/10/10.

    The outcome depends on the rows' content only, not on their order.

    Raises:
        ValueError: so few questions differ that a split would be empty.
    """
    rows, excluded = _drop_repeats(source)
    questions = [normalise(question_of(row)) for row in rows]
    keys, linked = group_questions(questions, progress=progress)
    # Asked of all rows: a repeat that was dropped may be the one that says so.
    held_out = {normalise(question) for question in REPORT_QUESTIONS} | {
        normalise(question_of(row))
        for row in source.rows
        if is_true(row.get("held_out"))
    }
    test_keys = {key for key, question in zip(keys, questions) if question in held_out}
    parts = {name: [] for name in SPLITS}
    for key, row in zip(keys, rows):
        clean = _plain_columns(row, source.kind)
        clean["group"] = digest(key)[:12]
        parts["test" if key in test_keys else _split_of(key)].append(clean)
    if not all(parts.values()):
        counts = ", ".join(f"{name} {len(part)}" for name, part in parts.items())
        raise ValueError(
            f"{source.name}: too few groups of alike questions ({len(set(keys))}) to "
            f"split ({counts}). Each split needs at least one; add rows."
        )
    for part in parts.values():
        part.sort(key=lambda row: (row["group"], canonical(row)))
    running, separator = hashlib.sha256(), ""
    for name in SPLITS:
        for row in parts[name]:
            line = f"{separator}{name}\t{canonical(row)}"
            running.update(line.encode("utf-8", "surrogatepass"))
            separator = "\n"
    return Split(
        kind=source.kind,
        excluded=source.excluded + excluded,
        fingerprint=running.hexdigest()[:16],
        source=source.name,
        revision=source.revision,
        rows_read=source.rows_read,
        key_of=dict(zip(questions, keys)),
        linked=linked,
        **parts,
    )


def _drop_repeats(source: Source) -> tuple[list[dict], list[Exclusion]]:
    by_question = defaultdict(dict)
    excluded = []
    for number, row in enumerate(source.rows, start=1):
        question = normalise(question_of(row))
        if source.kind == QA:
            content = normalise(row["answer"])
        else:
            content = normalise(" ".join(m["content"] for m in row["messages"]))
        content = digest(content)  # a conversation's text is long to keep twice
        same = by_question[question]
        if content in same:
            # Of true twins keep the smallest, so that order plays no part.
            same[content] = min(same[content], row, key=canonical)
            excluded.append(Exclusion(number, question[:60], "exact repeat"))
        else:
            same[content] = row
    kept = []
    for question in sorted(by_question):
        rows = sorted(by_question[question].values(), key=canonical)
        if source.kind == CONVERSATION:
            kept += rows
            continue
        rows.sort(
            key=lambda row: (
                not safety.advises_help(row["answer"]),
                -len(row["answer"]),
                row["answer"],
            )
        )
        kept.append(rows[0])
        excluded += [
            Exclusion(0, question[:60], "same question, another answer")
            for _ in rows[1:]
        ]
    return kept, excluded


def _plain_columns(row: dict, kind: str) -> dict:
    if kind == CONVERSATION:
        return {"messages": row["messages"], "source": row["source"]}
    topic, critical = topic_of(row)
    clean = {
        "question": row["question"],
        "answer": row["answer"],
        "topic": topic,
        "safety_critical": critical,
    }
    for extra in ("rephrasings", "must", "must_not"):
        if isinstance(row.get(extra), list) and row[extra]:  # a CSV has none
            clean[extra] = row[extra]
    if row.get("guideline"):
        clean["guideline"] = row["guideline"]
    return clean


def _split_of(key: str) -> str:
    place = int(digest(key)[:13], 16) / 16**13
    if place < VALIDATION_FROM:
        return "train"
    return "validation" if place < TEST_FROM else "test"


def rephrasings_of(row: dict) -> list[str]:
    """A row's rephrasings; for the report's questions those of `data/samples`."""
    if row.get("rephrasings"):
        return list(row["rephrasings"])
    question = normalise(row["question"])
    if question in map(normalise, REPORT_QUESTIONS):
        for line in (SAMPLES / "first_aid.jsonl").read_text("utf-8").splitlines():
            sample = json.loads(line)
            if normalise(sample["question"]) == question:
                return list(sample.get("rephrasings", []))
    return []


def audit(
    source: Source, split: Split, tokenizer=None, *, progress: bool = True
) -> dict:
    """What is in the data and what is wrong with it, as plain counts.

    Args:
        source: as `load_source` gave it.
        split: as `split_rows` gave it.
        tokenizer: a Transformers tokenizer for lengths in tokens; None leaves
            lengths in words only.

    Returns:
        A dictionary that JSON can hold: `rows`, `excluded`, `repeats`,
        `near_duplicates`, `lengths`, `topics`, `question_kinds`, `advice`,
        `split`, `leakage`.
    """
    rows = source.rows
    questions = [normalise(question_of(row)) for row in rows]
    answers = [_answer_of(row) for row in rows]
    pairs = Counter(zip(questions, map(normalise, answers)))
    answers_of = defaultdict(set)
    for question, answer in pairs:
        answers_of[question].add(answer)
    repeated = [q for q, n in Counter(questions).items() if n > 1]
    # Exact repeats are the same question: the split's groups are those of all rows.
    sizes = Counter(split.key_of[question] for question in questions)
    neighbours = {q for a, b, cosine in split.linked if cosine >= 0.7 for q in (a, b)}
    report = {
        "source": source.name,
        "revision": source.revision,
        "kind": source.kind,
        "rows": source.rows_read,
        "usable": len(rows),
        "excluded": reasons_of(split.excluded),
        "repeats": {
            "questions_repeated": len(repeated),
            "rows_repeated_exactly": sum(n - 1 for n in pairs.values()),
            "questions_with_different_answers": sum(
                len(found) > 1 for found in answers_of.values()
            ),
        },
        "near_duplicates": {
            "pairs_at_.55": len(split.linked),
            "questions_with_a_neighbour_at_.7": len(neighbours),
            "groups": len(sizes),
            "largest_group": max(sizes.values()),
        },
        "lengths": {
            "question_words": _summary([len(q.split()) for q in questions]),
            "answer_words": _summary([len(a.split()) for a in answers]),
        },
        "question_kinds": dict(Counter(map(question_kind, questions)).most_common()),
        "advice": {
            "advises_help": sum(map(safety.advises_help, answers)),
            "has_number": sum(map(safety.has_number, answers)),
            "has_negation": sum(map(safety.has_negation, answers)),
        },
        "split": split.counts(),
        "fingerprint": split.fingerprint,
    }
    if split.train and split.test:
        random_cosine, grouped_cosine = nearest_cosines(split)
        report["leakage"] = {
            "test_questions": len(grouped_cosine),
            "near_twins_random_split": int((random_cosine >= TWIN_COSINE).sum()),
            "near_twins": int((grouped_cosine >= TWIN_COSINE).sum()),
        }
    if tokenizer is not None:
        for name, texts in (("question", questions), ("answer", answers)):
            texts = [question_of(r) for r in rows] if name == "question" else texts
            report["lengths"][f"{name}_tokens"] = _summary(
                _token_counts(tokenizer, texts, f"tokens of {name}s", progress)
            )
    if source.kind == QA:
        topics = defaultdict(lambda: {"rows": 0, "safety_critical": 0})
        for row in rows:
            topic, critical = topic_of(row)
            topics[topic]["rows"] += 1
            topics[topic]["safety_critical"] += critical
        report["topics"] = dict(
            sorted(topics.items(), key=lambda item: (-item[1]["rows"], item[0]))
        )
    else:
        report["sources"] = dict(Counter(r["source"] for r in rows).most_common())
        report["several_turns"] = sum(
            sum(m["role"] == "user" for m in r["messages"]) > 1 for r in rows
        )
        report["system_prompts"] = sum(
            r["messages"][0]["role"] == "system" for r in rows
        )
    return report


def nearest_cosines(split: Split, seed: int = 42) -> tuple[np.ndarray, np.ndarray]:
    """How alike each test question is to its nearest training question, two ways.

    Of more than `LEAKAGE_SAMPLE` test questions so many are taken: they stand in the
    order of their groups' hashes, so the first are as good as drawn.

    Returns:
        Cosines of shape (test rows,) for a seeded random split of the same rows, and
        for `split` itself.
    """
    rows = split.train + split.validation + split.test
    order = np.random.default_rng(seed).permutation(len(rows))
    shuffled = [rows[i] for i in order]
    end = len(split.test)
    asked = min(end, LEAKAGE_SAMPLE)
    _, random_cosine = nearest_rows(shuffled[end:], shuffled[:asked])
    _, grouped_cosine = nearest_rows(split.train, split.test[:asked])
    return random_cosine, grouped_cosine


def _answer_of(row: dict) -> str:
    if "answer" in row:
        return row["answer"]
    return " ".join(m["content"] for m in row["messages"] if m["role"] == "assistant")


def _token_counts(tokenizer, texts: list[str], label: str, progress: bool) -> list[int]:
    counts, step = [], 500
    for start in tqdm(range(0, len(texts), step), label, disable=not progress):
        ids = tokenizer(
            texts[start : start + step],
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,  # a text may be longer than the model's context
        )["input_ids"]
        counts += map(len, ids)
    return counts


def _summary(values: Sequence[int]) -> dict[str, float]:
    values = np.asarray(values)
    return {
        "mean": round(float(values.mean()), 2),
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
        "max": int(values.max()),
    }


def write_split(split: Split, report: dict, out: Path) -> None:
    """Write `train.jsonl`, `validation.jsonl`, `test.jsonl` and `audit.json`.

    Each file is written aside and renamed, so that none is ever half there.
    """
    out.mkdir(parents=True, exist_ok=True)
    asides = {}
    for name in (*(f"{split_name}.jsonl" for split_name in SPLITS), "audit.json"):
        asides[name] = out / f".{name}.part"
    for name in SPLITS:
        with asides[f"{name}.jsonl"].open("w", encoding="utf-8") as file:
            for row in getattr(split, name):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    asides["audit.json"].write_text(text, encoding="utf-8")
    for name, aside in asides.items():
        aside.replace(out / name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Audit and split a data set from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.dataset",
        description="Audit a data set and split it so that near-duplicate questions "
        "stay together. Writes train.jsonl, validation.jsonl, test.jsonl, audit.json.",
    )
    parser.add_argument(
        "--source",
        required=True,
        help="Hub id, .json/.jsonl/.csv/.parquet file, or save_to_disk folder",
    )
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    parser.add_argument("--revision", help="Hub revision (default: the newest)")
    parser.add_argument("--rows", type=int, help="seeded selection of so many rows")
    parser.add_argument("--seed", type=int, default=42, help="of that selection (42)")
    parser.add_argument(
        "--tokenizer",
        default="data/pocket_llama",
        help="Hub id or folder, for lengths in tokens (default: the pocket Llama's)",
    )
    options = parser.parse_args(arguments)
    try:
        source = load_source(
            options.source,
            revision=options.revision,
            rows=options.rows,
            seed=options.seed,
        )
        from utils.models import load_tokenizer  # slow: only for rows that can be used

        tokenizer = load_tokenizer(options.tokenizer)
        split = split_rows(source)
        report = audit(source, split, tokenizer)
        write_split(split, report, options.out)
    except (ValueError, OSError) as error:
        sys.exit(f"utils.dataset: {error}")
    for reason, count in report["excluded"].items():
        print(f"left out: {count} × {reason}")
    print(f"{source.rows_read} rows in, {split.counts()}, written to {options.out}")


if __name__ == "__main__":
    main()
