"""Load, check, audit and split: rows in, plain columns out.

Two kinds of data come in: question-answer rows (FirstAidQA) and conversations
(FineTome's ShareGPT columns). Near-duplicate questions are put into groups and whole
groups go to train, validation or test, so that no test question has a twin in the
training set.

    python -m utils.dataset --source PATH_OR_HUB_ID --out DIR
"""

import argparse
import csv
import hashlib
import io
import json
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import (
    HashingVectorizer,
    TfidfTransformer,
    TfidfVectorizer,
)
from tqdm.auto import tqdm

from utils import safety
from utils.config import (
    LOCAL_SUFFIXES,
    REPORT_QUESTIONS,
    SAMPLES,
    is_local,
    resolve,
)

QA = "question-answer"
CONVERSATION = "conversation"
SPLITS = ("train", "validation", "test")

GROUP_COSINE = 0.55  # single linkage at .55 keeps FirstAidQA's groups at 18 at most
TWIN_COSINE = 0.6  # what we count as a near-twin; above .55, as weights move a little
EXACT_UP_TO = 20_000  # above it MinHash proposes the pairs and the cosine decides
LEAKAGE_SAMPLE = 2_000  # so many test questions tell how much leaks
VALIDATION_FROM, TEST_FROM = 0.8, 0.9  # where a group's hash in [0, 1) falls

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}

# Topic → (safety-critical, pattern). The first that matches a question decides, so
# the urgent and the specific stand before the general.
TOPICS = {
    "cpr_aed": (
        True,
        r"\bcpr\b|compression|defib|\baed\b|cardiac arrest|rescue breath",
    ),
    "choking": (True, r"chok|heimlich|abdominal thrust|back blow|airway (?:is )?block"),
    "drowning": (True, r"drown|submer|near-drown|pulled from (?:the )?water"),
    "stroke": (True, r"\bstroke(?! of)\b(?<!heat stroke)|face.{0,12}droop"),
    "heart_attack": (True, r"heart attack|chest pain|angina|cardiac"),
    "seizure": (True, r"seizure|epilep|convuls|fitting\b"),
    "breathing_allergy": (
        True,
        r"asthma|inhaler|allerg|anaphyla|epipen|auto-?injector|hyperventilat|"
        r"wheez|shortness of breath|trouble breathing|difficulty breathing",
    ),
    "diabetes": (True, r"diabet|insulin|blood sugar|hypoglyc|hyperglyc|glucose"),
    "severe_bleeding": (
        True,
        r"tourniquet|severe(?:ly)? bleed|heavy bleed|bleed(?:ing)? (?:heavily|won)|"
        r"spurting|arter|amputat|internal bleed|hemorrhag|haemorrhag|impaled|embedded",
    ),
    "poisoning_eye": (
        True,
        r"poison|overdos|swallow(?:ed|s|ing)?|ingest|toxic|carbon monoxide|naloxone|"
        r"\beyes?\b|contact lens|chemical",
    ),
    "head_spine": (True, r"\bhead\b|concuss|skull|spin(?:e|al)|neck|whiplash|brain"),
    "bites_stings": (
        True,
        r"bite|bitten|sting|stung|snake|spider|tick\b|jellyfish|bee\b|wasp|venom|rabies",
    ),
    "heat_cold": (
        True,
        r"heat ?stroke|heat exhaust|heat|hypotherm|frostbit|frostnip|cold|dehydrat",
    ),
    "burns": (True, r"burn|scald|blister|electric"),
    "shock_fainting": (True, r"\bshock\b|faint|dizz|pass(?:es|ed)? out|lightheaded"),
    "unconsciousness": (
        True,
        r"unconscious|unresponsive|recovery position|not breathing|collaps",
    ),
    "fractures_sprains": (
        False,
        r"fractur|sprain|strain|dislocat|broken|splint|sling|bone|ankle|cramp|muscle|"
        r"joint|bruis",
    ),
    "minor_wounds": (
        False,
        r"\bcuts?\b|wound|scrape|graze|splinter|nose ?bleed|nose|tooth|teeth|infect|"
        r"bandag|dressing|bleed|stitch|scratch",
    ),
    "emergency_call": (
        True,
        r"\b(?:911|112|999)\b|ambulance|dispatch|call for help|emergency (?:services|"
        r"number|call)|paramedic|scene|bystander",
    ),
    "first_aid_kit": (False, r"\bkit\b|suppl(?:y|ies)|gloves|prepar|train(?:ed|ing)"),
}

QUESTION_KINDS = {
    "how": r"^how\b",
    "what": r"^(?:what|which)\b",
    "should or can": r"^(?:should|can|could|may|must|would|will|is it (?:ok|safe))\b",
    "is or does": r"^(?:is|are|do|does|did|has|have)\b",
    "why": r"^why\b",
    "when": r"^when\b",
    "who or where": r"^(?:who|where)\b",
}


@dataclass(frozen=True)
class Exclusion:
    """A row that was left out: where it stands, its first words, and why."""

    row: int
    text: str
    reason: str


@dataclass
class Source:
    """Rows as they were read, checked, with their columns made plain.

    `rows` hold `question`, `answer` and extra columns for question-answer data, or
    `messages` and `source` for conversations. `rows_read` counts what came in.
    """

    name: str
    kind: str
    rows: list[dict]
    rows_read: int
    excluded: list[Exclusion] = field(default_factory=list)
    revision: str = ""


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


# --- reading -------------------------------------------------------------------


def load_source(
    source: str,
    *,
    revision: str | None = None,
    rows: int | None = None,
    seed: int = 42,
) -> Source:
    """Read a dataset from the Hub, a local file or a `save_to_disk` folder.

    Args:
        source: Hub id, or path of a .json, .jsonl, .csv or .parquet file, or a
            folder that `datasets` saved; paths are relative to the project root.
        revision: Hub revision; the newest if none. What was read is recorded.
        rows: take a seeded selection of so many rows. Which rows are taken depends
            on their content and the seed, not on their order.
        seed: of that selection.

    Raises:
        FileNotFoundError: no such path.
        ValueError: not a data set that can be used; the message names the file, the
            line or row, and what to do.
        ConnectionError: the Hub, or the data set on it, is out of reach.
    """
    if is_local(source):
        raw, revision = _read_local(resolve(source), source)
    else:
        raw, revision = _read_hub(source, revision)
    if rows is not None and rows < 1:
        raise ValueError(f"{source}: rows={rows} must be at least 1.")
    if not raw:
        raise ValueError(f"{source}: there are no rows in it. Choose another file.")
    rows_read = len(raw)
    numbered = list(enumerate(raw, start=1))
    if rows is not None and rows < rows_read:
        numbered = sorted(
            numbered,
            key=lambda item: _digest(f"{seed}\n{_canonical(item[1])}"),
        )[:rows]
        numbered.sort()
        rows_read = rows
    kind = _kind_of(numbered, source)
    check = _check_qa if kind == QA else _check_conversation
    kept, excluded = [], []
    for number, row in numbered:
        outcome = check(row)
        if isinstance(outcome, str):
            excluded.append(Exclusion(number, _preview(row), outcome))
        else:
            kept.append(outcome)
    if not kept:
        reasons = "; ".join(f"{n} × {r}" for r, n in reasons_of(excluded).items())
        raise ValueError(
            f"{source}: not one of {rows_read} rows can be used: {reasons}."
        )
    return Source(source, kind, kept, rows_read, excluded, revision)


def reasons_of(excluded: Sequence[Exclusion]) -> dict[str, int]:
    """How many rows were left out, by reason, the most frequent first."""
    return dict(Counter(item.reason for item in excluded).most_common())


def _read_hub(name: str, revision: str | None) -> tuple[list[dict], str]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        data = load_dataset(name, revision=revision, split="train")
    except FileNotFoundError as error:  # datasets' DatasetNotFoundError is one
        raise ConnectionError(
            f"The Hub has no data set {name!r} at revision {revision or 'main'!r}. "
            "Check the spelling and the revision, and set HF_TOKEN if it is private."
        ) from error
    except (ValueError, DatasetsError) as error:
        first = str(error).strip().partition("\n")[0][:160]
        raise ValueError(f"{name}, revision {revision or 'main'!r}: {first}") from error
    except OSError as error:
        raise ConnectionError(
            f"The Hugging Face Hub is out of reach, so {name!r} cannot be read. Check "
            "the network, or name a local copy in FIRST_AID_DATASET or "
            "FINETOME_DATASET, or use PROFILE=pocket."
        ) from error
    # The files' addresses name the commit that they came from.
    files = " ".join(data.info.download_checksums or {})
    found = re.search(r"@([0-9a-f]{40})", files)
    return data.to_list(), found.group(1) if found else revision or "unknown"


def _read_local(path: Path, name: str) -> tuple[list[dict], str]:
    if not path.exists():
        raise FileNotFoundError(
            f"{name}: there is no such file or folder. Paths are relative to the "
            "project root; check the spelling."
        )
    if path.is_dir():
        return _read_folder(path, name)
    readers = {
        ".json": _read_json,
        ".jsonl": _read_jsonl,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    if path.suffix not in readers:
        known = ", ".join(LOCAL_SUFFIXES)
        raise ValueError(
            f"{name}: files of type {path.suffix!r} are unknown ({known})."
        )
    rows = readers[path.suffix](path, name)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return rows, f"sha256:{digest[:16]}"


def _text_of(path: Path, name: str) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{name}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8. Save "
            "the file as UTF-8 (it may be latin-1, or a mix of encodings)."
        ) from error


def _read_json(path: Path, name: str) -> list[dict]:
    text = _text_of(path, name)
    decoder = json.JSONDecoder()
    blank = re.compile(r"\s*")
    position = blank.match(text).end()
    if not text[position:]:
        raise ValueError(f"{name}: the file is empty. Choose another file.")
    if text[position] != "[":
        hint = " Name it .jsonl if each line is an object." if "{" in text[:50] else ""
        raise ValueError(f"{name}, line 1: expected a JSON array of rows.{hint}")
    rows = []
    position = blank.match(text, position + 1).end()
    while text[position : position + 1] != "]":
        try:
            row, position = decoder.raw_decode(text, position)
            position = blank.match(text, position).end()
            if text[position : position + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{name}, line {error.lineno} (row {len(rows) + 1}): broken JSON, "
                f"{error.msg} at column {error.colno}. The file may be cut short; "
                "mend that line or fetch the file again."
            ) from error
        rows.append(row)
        if text[position] == ",":
            position = blank.match(text, position + 1).end()
    rest = blank.match(text, position + 1).end()
    if rest < len(text):
        line = text.count("\n", 0, rest) + 1
        raise ValueError(
            f"{name}, line {line}: the JSON array of {len(rows)} rows ends before "
            f"{text[rest : rest + 20]!r}. Put all rows into one array."
        )
    return rows


def _read_jsonl(path: Path, name: str) -> list[dict]:
    rows = []
    for number, line in enumerate(_text_of(path, name).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{name}, line {number}: broken JSON, {error.msg} at column "
                f"{error.colno}. Each line holds one object; mend that line."
            ) from error
    return rows


def _read_csv(path: Path, name: str) -> list[dict]:
    # Not str.splitlines, which also cuts at form feeds and Unicode's line separators.
    lines = io.StringIO(_text_of(path, name), newline="")
    reader = csv.DictReader(lines, strict=True)
    rows = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{name}, line {reader.line_num}: expected "
                    f"{len(reader.fieldnames)} cells as in the first line. Quote cells "
                    "that hold commas."
                )
            rows.append(row)
    except csv.Error as error:
        raise ValueError(
            f"{name}, line {reader.line_num}: broken CSV, {error}."
        ) from error
    return rows


def _read_parquet(path: Path, name: str) -> list[dict]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{name}: not a whole Parquet file ({str(error).splitlines()[0]}). It may "
            "be cut short; fetch it again."
        ) from error


def _read_folder(path: Path, name: str) -> tuple[list[dict], str]:
    from datasets import DatasetDict, load_from_disk

    try:
        data = load_from_disk(str(path))
    except (FileNotFoundError, ValueError, OSError) as error:
        raise ValueError(
            f"{name}: not a folder that datasets' save_to_disk made "
            f"({type(error).__name__}). Save it again, or name a file in it."
        ) from error
    if isinstance(data, DatasetDict):
        if "train" not in data:
            splits = ", ".join(data)
            raise ValueError(f"{name}: has no split 'train' (it has: {splits}).")
        data = data["train"]
    rows = data.to_list()
    joined = "\n".join(map(_canonical, rows))
    return rows, "sha256:" + hashlib.sha256(joined.encode()).hexdigest()[:16]


# --- checking ------------------------------------------------------------------


def _kind_of(numbered: Sequence[tuple[int, dict]], name: str) -> str:
    columns = Counter()
    for number, row in numbered:
        if not isinstance(row, dict):
            raise ValueError(
                f"{name}, row {number}: expected an object with named columns, found "
                f"{type(row).__name__} {str(row)[:40]!r}."
            )
        columns.update(row.keys())
    if columns["question"] and columns["answer"]:
        return QA
    if columns["conversations"] or columns["messages"]:
        return CONVERSATION
    found = ", ".join(sorted(columns)) or "none"
    raise ValueError(
        f"{name}: columns 'question' and 'answer' (or 'conversations', or 'messages') "
        f"are needed; found: {found}. Rename the columns."
    )


def _check_qa(row: dict) -> dict | str:
    for column in ("question", "answer"):
        value = row.get(column)
        if value is None:
            return f"no {column}"
        if not isinstance(value, str):
            return f"{column} is {type(value).__name__}, not text"
        if "\ufffd" in value:
            return f"{column} holds undecodable characters"
        if not value.strip():
            return f"empty {column}"
    if not normalise(row["question"]):
        return "question without words"
    clean = dict(row)
    clean["question"] = tidy(row["question"])
    clean["answer"] = tidy(row["answer"])
    return clean


def _check_conversation(row: dict) -> dict | str:
    turns = row.get("conversations") or row.get("messages")
    if not isinstance(turns, list) or not turns:
        return "no turns"
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            return "a turn that is not an object"
        # A table of both styles holds None where a turn lacks the other's keys.
        role, text = turn.get("from"), turn.get("value")
        role = turn.get("role") if role is None else role
        text = turn.get("content") if text is None else text
        if not isinstance(role, str) or role not in ROLES:
            return f"unknown role {role!r}"
        if not isinstance(text, str):
            return "a turn that is not text"
        if not text.strip():
            return "an empty turn"
        messages.append({"role": ROLES[role], "content": tidy(text)})
    spoken = [m["role"] for m in messages if m["role"] != "system"]
    if any(m["role"] == "system" for m in messages[1:]):
        return "a system prompt after the first turn"
    if not spoken or spoken[0] != "user":
        return "does not begin with the user"
    if any(a == b for a, b in zip(spoken, spoken[1:])):
        return "two turns of the same role in a row"
    if spoken[-1] != "assistant":
        return "does not end with an answer"
    if not normalise(first_question(messages)):
        return "question without words"
    clean = {"messages": messages, "source": str(row.get("source") or "")}
    if _is_true(row.get("held_out")):
        clean["held_out"] = True
    return clean


def _preview(row: object) -> str:
    text = row.get("question") if isinstance(row, dict) else None
    return str(text if text else row)[:60]


def tidy(text: str) -> str:
    """`text` in Unicode NFC without blanks at its ends or carriage returns."""
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n")).strip()


def normalise(text: str) -> str:
    """Lower-case words of `text` with single blanks: what makes two texts the same."""
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    return " ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)?", text))


def first_question(messages: Sequence[dict]) -> str:
    """The first user turn of a conversation."""
    return next(m["content"] for m in messages if m["role"] == "user")


def question_of(row: dict) -> str:
    """What a row asks, for both kinds of rows."""
    return row["question"] if "question" in row else first_question(row["messages"])


def topic_of(row: dict) -> tuple[str, bool]:
    """A question-answer row's topic and whether it is safety-critical.

    The row's own columns count if it has them; else the first pattern in `TOPICS`
    that its question matches, then its answer; else `("other", False)`.
    """
    if row.get("topic"):
        topic = str(row["topic"])
        critical = row.get("safety_critical")
        if critical is None:
            critical = TOPICS.get(topic, (False, ""))[0]
        return topic, _is_true(critical)
    for text in (row["question"].lower(), row["answer"].lower()):
        for topic, (critical, pattern) in TOPICS.items():
            if re.search(pattern, text):
                return topic, critical
    return "other", False


# --- near-duplicates -------------------------------------------------------------


def near_duplicate_pairs(
    texts: Sequence[str],
    threshold: float = GROUP_COSINE,
    *,
    exact_up_to: int = EXACT_UP_TO,
    progress: bool = True,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pairs of `texts` whose TF-IDF cosine reaches `threshold`, in blocks.

    Word 1–2-grams with sublinear term frequency. Up to `exact_up_to` texts every
    pair is compared; above, MinHash (datasketch) proposes pairs that share word
    1–2-grams and the cosine decides.

    Yields:
        `(i, j, cosine)`: three arrays of equal length, `i < j`.
    """
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    if len(texts) < 2 or not any(map(vectorizer.build_analyzer(), texts)):
        return
    if len(texts) <= exact_up_to:
        vectors = vectorizer.fit_transform(texts).astype(np.float32)
        step = 500
        blocks = range(0, len(texts), step)
        for start in tqdm(blocks, "compare questions", disable=not progress):
            product = (vectors[start : start + step] @ vectors.T).tocoo()
            i, j = product.row + start, product.col
            keep = (product.data >= threshold) & (i < j)
            yield i[keep], j[keep], product.data[keep]
        return
    vectors = _hashed_tfidf(texts, progress)
    pairs = _minhash_candidates(vectors, progress)
    step = 50_000
    for start in range(0, len(pairs), step):
        i, j = pairs[start : start + step].T
        cosine = np.asarray(vectors[i].multiply(vectors[j]).sum(axis=1)).ravel()
        keep = cosine >= threshold
        yield i[keep], j[keep], cosine[keep]


def _hashed_tfidf(texts: Sequence[str], progress: bool):
    """What `TfidfVectorizer` gives, without holding millions of 2-grams as text.

    Each 1–2-gram is known by its hash below 2³⁰; of five million some 0.5 % share
    theirs with another. Returns a sparse matrix of shape (texts, distinct hashes).
    """
    hasher = HashingVectorizer(
        ngram_range=(1, 2),
        n_features=2**30,
        alternate_sign=False,
        norm=None,
        dtype=np.float32,
    )
    counts = hasher.transform(tqdm(texts, "n-grams", disable=not progress))
    # Columns that no text uses would make the weights a vector of gigabytes.
    known, column = np.unique(counts.indices, return_inverse=True)
    counts.indices = column.astype(counts.indices.dtype)
    counts.resize(len(texts), len(known))
    weights = TfidfTransformer(sublinear_tf=True).fit(counts)
    return weights.transform(counts, copy=False)


def _minhash_candidates(vectors, progress: bool) -> np.ndarray:
    """Pairs (n, 2) of rows that share a band of a 96-value MinHash signature.

    The bands are three values wide: a pair with Jaccard similarity s is proposed
    with probability 1 - (1 - s³)³² (Leskovec, Rajaraman, Ullman: Mining of Massive
    Datasets, 3.4), 87 % at .4 and 98 % at .5. Shingles are the columns of the TF-IDF
    matrix, so that texts are cut into words once.
    """
    from datasketch import MinHash

    bands, width = 32, 3
    template = MinHash(num_perm=bands * width, seed=1, hashfunc=int)
    indices, indptr = vectors.indices, vectors.indptr
    size = vectors.shape[0]
    signatures = np.empty((size, bands * width), dtype=np.uint32)
    # Column numbers are small and dense; an odd multiplier spreads them over
    # 32 bits, which is what a hash function is for.
    hashed = indices.astype(np.uint64) * np.uint64(2654435761) % np.uint64(2**32)
    for row in tqdm(range(size), "MinHash", disable=not progress):
        sketch = template.copy()
        sketch.update_batch(hashed[indptr[row] : indptr[row + 1]].tolist())
        signatures[row] = sketch.hashvalues
    found = []
    for band in tqdm(range(bands), "bands", disable=not progress):
        keys = np.ascontiguousarray(signatures[:, band * width : (band + 1) * width])
        keys = keys.view([("", keys.dtype)] * width).ravel()
        order = np.argsort(keys, kind="stable")
        same = keys[order[1:]] == keys[order[:-1]]
        # Neighbours in a bucket and each row with the bucket's first: linear in the
        # bucket, and enough for single linkage of groups that are alike.
        edges = np.stack([order[:-1][same], order[1:][same]], axis=1)
        starts = np.maximum.accumulate(
            np.where(np.r_[True, ~same], np.arange(len(order)), 0)
        )
        firsts = np.stack([order[starts[1:]][same], order[1:][same]], axis=1)
        found += [edges, firsts]
    pairs = np.sort(np.concatenate(found), axis=1)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    return np.unique(pairs, axis=0)


def group_questions(
    questions: Sequence[str], *, progress: bool = True
) -> tuple[list[str], list[tuple[str, str, float]]]:
    """Group near-duplicate questions by single linkage at `GROUP_COSINE`.

    Args:
        questions: normalised; repeats fall into one group.

    Returns:
        The group key of every question, which is the group's smallest normalised
        question: a property of the group's own, so that rows elsewhere do not move
        it. And the pairs that were linked, `(question, question, cosine)`.
    """
    unique = sorted(set(questions))
    parent = list(range(len(unique)))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    linked = []
    for first, second, cosine in near_duplicate_pairs(unique, progress=progress):
        for a, b, value in zip(first.tolist(), second.tolist(), cosine.tolist()):
            linked.append((unique[a], unique[b], value))
            a, b = root(a), root(b)
            parent[max(a, b)] = min(a, b)  # the smallest index is the smallest text
    index = {text: i for i, text in enumerate(unique)}
    return [unique[root(index[text])] for text in questions], linked


def nearest_rows(
    train: Sequence[dict], others: Sequence[dict]
) -> tuple[np.ndarray, np.ndarray]:
    """For each row of `others` the training row with the most similar question.

    Returns:
        Indices into `train` and TF-IDF cosines, each of shape (len(others),). The
        TF-IDF is fitted on the questions of both.
    """
    known = [normalise(question_of(row)) for row in train]
    asked = [normalise(question_of(row)) for row in others]
    if len(known) + len(asked) <= EXACT_UP_TO:
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        both = vectorizer.fit_transform(known + asked)
    else:
        both = _hashed_tfidf(known + asked, progress=False)
    train_vectors, vectors = both[: len(known)], both[len(known) :]
    index, cosine = [], []
    for start in range(0, len(asked), 500):
        block = (vectors[start : start + 500] @ train_vectors.T).toarray()
        index.append(block.argmax(axis=1))
        cosine.append(block.max(axis=1))
    return np.concatenate(index), np.concatenate(cosine)


# --- split -----------------------------------------------------------------------


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
        if _is_true(row.get("held_out"))
    }
    test_keys = {key for key, question in zip(keys, questions) if question in held_out}
    parts = {name: [] for name in SPLITS}
    for key, row in zip(keys, rows):
        clean = _plain_columns(row, source.kind)
        clean["group"] = _digest(key)[:12]
        parts["test" if key in test_keys else _split_of(key)].append(clean)
    if not all(parts.values()):
        counts = ", ".join(f"{name} {len(part)}" for name, part in parts.items())
        raise ValueError(
            f"{source.name}: too few groups of alike questions ({len(set(keys))}) to "
            f"split ({counts}). Each split needs at least one; add rows."
        )
    for part in parts.values():
        part.sort(key=lambda row: (row["group"], _canonical(row)))
    digest, separator = hashlib.sha256(), ""
    for name in SPLITS:
        for row in parts[name]:
            line = f"{separator}{name}\t{_canonical(row)}"
            digest.update(line.encode("utf-8", "surrogatepass"))
            separator = "\n"
    return Split(
        kind=source.kind,
        excluded=source.excluded + excluded,
        fingerprint=digest.hexdigest()[:16],
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
        content = _digest(content)  # a conversation's text is long to keep twice
        same = by_question[question]
        if content in same:
            # Of true twins keep the smallest, so that order plays no part.
            same[content] = min(same[content], row, key=_canonical)
            excluded.append(Exclusion(number, question[:60], "exact repeat"))
        else:
            same[content] = row
    kept = []
    for question in sorted(by_question):
        rows = sorted(by_question[question].values(), key=_canonical)
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
    for extra in ("rephrasings", "must", "must_not", "guideline"):
        if row.get(extra):
            clean[extra] = row[extra]
    return clean


def _split_of(key: str) -> str:
    place = int(_digest(key)[:13], 16) / 16**13
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


def _is_true(value: object) -> bool:
    return value is True or str(value).strip().lower() in ("true", "1")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _canonical(row: object) -> str:
    return json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)


# --- audit -----------------------------------------------------------------------


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


def question_kind(question: str) -> str:
    """How a normalised question begins: how, what, why …, or "other"."""
    for kind, pattern in QUESTION_KINDS.items():
        if re.search(pattern, question):
            return kind
    return "other"


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


# --- the command -----------------------------------------------------------------


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
