"""Reads and checks rows from the Hub, a local file or a saved folder.

Two kinds of data come in: question-answer rows (FirstAidQA) and conversations
(FineTome's ShareGPT columns). A row that cannot be used is left out, counted by reason
and named; a file that cannot be read is refused with its line.
"""

import csv
import hashlib
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from utils.config import (
    LOCAL_SUFFIXES,
    is_local,
    resolve,
)

QA = "question-answer"
CONVERSATION = "conversation"

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
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
            key=lambda item: digest(f"{seed}\n{canonical(item[1])}"),
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
    joined = "\n".join(map(canonical, rows))
    return rows, "sha256:" + hashlib.sha256(joined.encode()).hexdigest()[:16]


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
    if is_true(row.get("held_out")):
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


def is_true(value: object) -> bool:
    """Whether a cell means yes, from JSON or from a CSV's text."""
    return value is True or str(value).strip().lower() in ("true", "1")


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def canonical(row: object) -> str:
    return json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
