"""Reading, checking, grouping and splitting, and what bad input gets."""

import hashlib
import json
import os
import random
import subprocess
import sys

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from sklearn.feature_extraction.text import TfidfVectorizer

from utils import dataset, similarity, sources
from utils.config import REPORT_QUESTIONS, ROOT
from utils.dataset import main, split_rows
from utils.sources import load_source, normalise

HELP = "Call 112 at once."


def qa(number: int, **extra) -> dict:
    """A row whose question shares no telling word with any other's."""
    words = " ".join(f"{letter}{number}x" for letter in "abcde")
    return {"question": f"What about {words}?", "answer": f"Take f{number}x."} | extra


def rows_of(count: int) -> list[dict]:
    return [qa(number) for number in range(count)]


def write_jsonl(path, rows):
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), "utf-8")
    return path


def split_of(path, **options):
    return split_rows(load_source(str(path), **options), progress=False)


def all_rows(split) -> list[dict]:
    return split.train + split.validation + split.test


def place_of(split) -> dict[str, str]:
    """Normalised question → the split it is in."""
    return {
        normalise(sources.question_of(row)): name
        for name in ("train", "validation", "test")
        for row in getattr(split, name)
    }


def expected_place(question: str) -> str:
    """Where the hash of a lone question puts it: 80 / 10 / 10 of [0, 1)."""
    digest = hashlib.sha256(normalise(question).encode()).hexdigest()
    place = int(digest[:13], 16) / 16**13
    return "train" if place < 0.8 else "validation" if place < 0.9 else "test"


def cosines(texts: list[str]) -> np.ndarray:
    """TF-IDF cosines of all pairs, by scikit-learn alone."""
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit_transform(
        texts
    )
    return (vectors @ vectors.T).toarray()


# --- what bad input gets ---------------------------------------------------------


def parquet_bytes(rows) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


LINE = b'{"question": "Why so %d?", "answer": "Because."}\n'
BROKEN = {
    "wrong columns": (
        "rows.csv",
        b"prompt,reply\nWhy?,Because.\n",
        "columns 'question' and 'answer' (or 'conversations', or 'messages') are "
        "needed; found: prompt, reply. Rename the columns.",
    ),
    "half of the columns": (
        "rows.json",
        b'[{"question": "Why?", "reply": "Because."}]',
        "needed; found: question, reply. Rename the columns.",
    ),
    "a row that is no object": (
        "rows.json",
        b'[{"question": "Why?", "answer": "Because."}, "Why?"]',
        "rows.json, row 2: expected an object with named columns, found str 'Why?'.",
    ),
    "non-text cells only": (
        "rows.json",
        b'[{"question": 5, "answer": "x"}, {"question": "Why?", "answer": ["x"]}]',
        "not one of 2 rows can be used: 1 × question is int, not text; "
        "1 × answer is list, not text.",
    ),
    "empty answers only": (
        "rows.jsonl",
        b'{"question": "Why?", "answer": " "}\n{"question": "How?", "answer": ""}\n',
        "not one of 2 rows can be used: 2 × empty answer.",
    ),
    "latin-1": (
        "rows.csv",
        "question,answer\nWhy?,Because.\nVerbrühung?,Kühlen.\n".encode("latin-1"),
        "rows.csv, line 3: byte 0xfc is not UTF-8. Save the file as UTF-8",
    ),
    "mixed encodings": (
        "rows.jsonl",
        (LINE % 1)
        + '{"question": "Brühe?", "answer": "Ja."}\n'.encode()
        + (LINE % 2)
        + '{"question": "Brühe?", "answer": "Nein."}\n'.encode("latin-1"),
        "rows.jsonl, line 4: byte 0xfc is not UTF-8. Save the file as UTF-8",
    ),
    "UTF-16": (
        "rows.json",
        '[{"question": "Why?", "answer": "Because."}]'.encode("utf-16-le"),
        "rows.json",
    ),
    "a truncated Parquet file": (
        "rows.parquet",
        parquet_bytes(rows_of(50))[:-100],
        "rows.parquet: not a whole Parquet file (",
    ),
    "an empty Parquet file": ("rows.parquet", b"", "not a whole Parquet file ("),
    "a JSON array cut in row 3": (
        "rows.json",
        b'[\n {"question": "Why?",\n  "answer": "Because."},\n'
        b' {"question": "How?",\n  "answer": "So."},\n {"question": "Who?",\n  "ans',
        "rows.json, line 7 (row 3): broken JSON, ",
    ),
    "a JSON array cut between rows": (
        "rows.json",
        b'[{"question": "Why?", "answer": "Because."}\n',
        "rows.json, line 2 (row 1): broken JSON, ",
    ),
    "a comma missing in a JSON array": (
        "rows.json",
        b'[{"question": "Why?", "answer": "So."}\n{"question": "How?"}]',
        "rows.json, line 2 (row 1): broken JSON, Expecting ',' or ']' at column 1.",
    ),
    "two JSON arrays in one file": (
        "rows.json",
        b'[{"question": "Why?", "answer": "So."}]\n[{"question": "How?"}]',
        'rows.json, line 2: the JSON array of 1 rows ends before \'[{"question": ',
    ),
    "an object instead of an array": (
        "rows.json",
        b'{"question": "Why?", "answer": "Because."}\n',
        "expected a JSON array of rows. Name it .jsonl if each line is an object.",
    ),
    "a broken JSON line": (
        "rows.jsonl",
        (LINE % 1) + (LINE % 2) + b'{"question": "Why?", "answer": "Bec\n' + (LINE % 3),
        "rows.jsonl, line 3: broken JSON, ",
    ),
    "a CSV row with a cell too many": (
        "rows.csv",
        b"question,answer\nWhy?,Because.\nHow?,So, and so.\n",
        "rows.csv, line 3: expected 2 cells as in the first line. Quote cells",
    ),
    "a CSV row with a cell too few": (
        "rows.csv",
        b"question,answer\nWhy?\n",
        "rows.csv, line 2: expected 2 cells as in the first line.",
    ),
    "a CSV quote that never closes": (
        "rows.csv",
        b'question,answer\nWhy?,"Because.\nHow?,So.\n',
        "broken CSV, ",
    ),
    "an empty .json": ("rows.json", b"", "rows.json: the file is empty."),
    "an empty array": ("rows.json", b" []\n", "rows.json: there are no rows in it."),
    "an empty .jsonl": ("rows.jsonl", b"\n\n", "rows.jsonl: there are no rows in it."),
    "an empty .csv": ("rows.csv", b"", "rows.csv: there are no rows in it."),
    "a CSV with a header only": (
        "rows.csv",
        b"question,answer\n",
        "rows.csv: there are no rows in it.",
    ),
    "an unknown type of file": (
        "rows.xlsx",
        b"PK",
        "files of type '.xlsx' are unknown (.json, .jsonl, .csv, .parquet).",
    ),
    "one row": (
        "rows.jsonl",
        LINE % 1,
        "too few groups of alike questions (1) to split (",
    ),
    "two rows": (
        "rows.jsonl",
        b'{"question": "Why me?", "answer": "So."}\n'
        b'{"question": "How so?", "answer": "Thus."}\n',
        "too few groups of alike questions (2) to split (",
    ),
    "all rows the same": (
        "rows.jsonl",
        (LINE % 1) * 40,
        "too few groups of alike questions (1) to split (",
    ),
}


def refused(capsys, tmp_path, *arguments: str) -> str:
    """The one line that the command ends with; the folder it wrote to is as before."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "train.jsonl").write_text("mine\n", "utf-8")
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--out", str(out)])
    message = caught.value.code
    assert isinstance(message, str), "the exit code would not tell of an error"
    assert [p.name for p in out.iterdir()] == ["train.jsonl"]
    assert (out / "train.jsonl").read_text("utf-8") == "mine\n"
    assert capsys.readouterr().out == ""
    assert message.startswith("utils.dataset: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named_and_nothing_is_written(
    capsys, tmp_path, tiny_folder, kind
):
    name, content, expected = BROKEN[kind]
    path = tmp_path / name
    path.write_bytes(content)
    arguments = ["--source", str(path), "--tokenizer", str(tiny_folder)]
    message = refused(capsys, tmp_path, *arguments)
    assert str(path) in message
    assert expected in message


def test_a_missing_path_is_named(capsys, tmp_path):
    message = refused(capsys, tmp_path, "--source", "no/such/rows.json")
    assert message == (
        "utils.dataset: no/such/rows.json: there is no such file or folder. Paths are "
        "relative to the project root; check the spelling."
    )


def test_a_folder_that_datasets_did_not_save(capsys, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "rows.json").write_text("[]", "utf-8")
    message = refused(capsys, tmp_path, "--source", str(folder))
    assert f"{folder}: not a folder that datasets' save_to_disk made" in message
    assert "or name a file in it." in message


def test_a_saved_folder_that_lost_its_data(capsys, tmp_path):
    folder = tmp_path / "saved"
    Dataset.from_list(rows_of(20)).save_to_disk(folder)
    for file in folder.glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:200])
    message = refused(capsys, tmp_path, "--source", str(folder))
    assert f"{folder}: not a folder that datasets' save_to_disk made" in message


def test_a_dataset_dict_without_train(capsys, tmp_path):
    folder = tmp_path / "saved"
    rows = Dataset.from_list(rows_of(3))
    DatasetDict({"dev": rows, "exam": rows}).save_to_disk(folder)
    message = refused(capsys, tmp_path, "--source", str(folder))
    assert f"{folder}: has no split 'train' (it has: dev, exam)." in message


@pytest.mark.parametrize("rows", ["0", "-5"])
def test_a_selection_of_no_rows_is_refused(capsys, tmp_path, rows):
    path = write_jsonl(tmp_path / "rows.jsonl", rows_of(20))
    message = refused(capsys, tmp_path, "--source", str(path), "--rows", rows)
    assert message == f"utils.dataset: {path}: rows={rows} must be at least 1."


HUB = {
    "no network": (
        ConnectionError("Couldn't reach 'some/set' on the Hub (ConnectTimeout)"),
        "The Hugging Face Hub is out of reach, so 'some/set' cannot be read. Check the "
        "network, or name a local copy in FIRST_AID_DATASET or FINETOME_DATASET, or "
        "use PROFILE=pocket.",
    ),
    "no such data set or revision": (
        DatasetNotFoundError("Revision 'v9' doesn't exist for dataset 'some/set'"),
        "The Hub has no data set 'some/set' at revision 'v9'. Check the spelling and "
        "the revision, and set HF_TOKEN if it is private.",
    ),
    "no split of that name": (
        ValueError("Unknown split \"train\". Should be one of ['test'].\nMore."),
        "some/set, revision 'v9': Unknown split \"train\". Should be one of ['test'].",
    ),
    "files that do not fit together": (
        DatasetGenerationError("An error occurred while generating the dataset"),
        "some/set, revision 'v9': An error occurred while generating the dataset",
    ),
}


@pytest.mark.parametrize("kind", HUB)
def test_the_hub_says_no(capsys, tmp_path, monkeypatch, kind):
    error, expected = HUB[kind]

    def fail(name, *, revision, split):
        assert (name, revision, split) == ("some/set", "v9", "train")
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = refused(capsys, tmp_path, "--source", "some/set", "--revision", "v9")
    assert message == f"utils.dataset: {expected}"


def test_rows_from_the_hub_carry_their_commit(monkeypatch):
    commit = "0123456789abcdef" * 2 + "01234567"
    found = Dataset.from_list(rows_of(30))
    found.info.download_checksums = {f"hf://datasets/some/set@{commit}/a.parquet": {}}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)
    source = load_source("some/set", revision="main")
    assert source.revision == commit
    assert source.rows == rows_of(30)


def run_command(*arguments: str, hash_seed: str = "0"):
    environ = {**os.environ, "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-m", "utils.dataset", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True
    )


def test_the_command_itself_ends_with_one_line_and_an_error_code(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes((LINE % 1) + b'{"question"\n')
    out = tmp_path / "out"
    done = run_command("--source", str(path), "--out", str(out))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        f"utils.dataset: {path}, line 2: broken JSON, Expecting ':' delimiter at "
        "column 12. Each line holds one object; mend that line.\n"
    )
    assert not out.exists()


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for option in (
        "--source",
        "--out",
        "--revision",
        "--rows",
        "--seed",
        "--tokenizer",
    ):
        assert option in shown


# --- reading ---------------------------------------------------------------------


def write_as(kind: str, rows: list[dict], folder):
    if kind == "dict":
        other = Dataset.from_list([{"question": "Else?", "answer": "No."}])
        saved = DatasetDict({"train": Dataset.from_list(rows), "test": other})
        saved.save_to_disk(folder / "dict")
        return folder / "dict"
    if kind == "folder":
        Dataset.from_list(rows).save_to_disk(folder / "folder")
        return folder / "folder"
    path = folder / f"rows.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows, indent=1), "utf-8")
    elif kind == "jsonl":
        write_jsonl(path, rows)
    elif kind == "csv":
        quoted = ['"{question}","{answer}"\r\n'.format(**row) for row in rows]
        text = "\ufeffquestion,answer\r\n" + "".join(quoted)
        path.write_bytes(text.encode("utf-8"))
    else:
        path.write_bytes(parquet_bytes(rows))
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "folder", "dict"])
def test_every_format_gives_the_same_rows(tmp_path, kind):
    rows = rows_of(40)
    rows[3]["answer"] = "First, this.\nThen – that: ü, 水."
    path = write_as(kind, rows, tmp_path)
    source = load_source(str(path))
    assert source.rows == rows
    assert (source.kind, source.rows_read, source.excluded) == (sources.QA, 40, [])
    assert source.revision.startswith("sha256:")


def test_odd_line_ends_inside_a_csv_cell_do_not_cut_it(tmp_path):
    path = tmp_path / "rows.csv"
    text = "question,answer\nWhy\u2028so?,Be\x0ccause\x85it is.\n"
    path.write_text(text, "utf-8")
    (row,) = load_source(str(path)).rows
    assert row == {"question": "Why\u2028so?", "answer": "Be\x0ccause\x85it is."}


def test_text_is_tidied_and_its_words_normalised():
    assert sources.tidy("  Cafe\u0301\r\nnoir \n") == "Café\nnoir"
    assert (
        normalise("Don’t  PANIC — it's 2.5 ﬁne_ly!") == "don't panic it's 2 5 fine ly"
    )


def test_unusable_rows_are_counted_and_named(tmp_path):
    rows = [
        qa(0),
        {"question": "Why?", "answer": None},
        {"question": "Why two?", "answer": 7},
        {"question": "Why three?", "answer": "  "},
        {"question": None, "answer": "Because."},
        {"question": ["Why?"], "answer": "Because."},
        {"question": "?!", "answer": "Because."},
        {"question": "Br\ufffdhe?", "answer": "Because."},
        {"question": "Why four?"},
        qa(1),
    ]
    source = load_source(str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    assert source.rows == [qa(0), qa(1)]
    assert [(item.row, item.reason) for item in source.excluded] == [
        (2, "no answer"),
        (3, "answer is int, not text"),
        (4, "empty answer"),
        (5, "no question"),
        (6, "question is list, not text"),
        (7, "question without words"),
        (8, "question holds undecodable characters"),
        (9, "no answer"),
    ]
    assert source.excluded[1].text == "Why two?"
    assert source.rows_read == 10 == len(source.rows) + len(source.excluded)
    assert sources.reasons_of(source.excluded)["no answer"] == 2


# --- conversations ---------------------------------------------------------------


def turns(*texts: str, style: str = "sharegpt", system: str | None = None):
    """Alternating turns, the user's first."""
    names = ("human", "gpt") if style == "sharegpt" else ("user", "assistant")
    who, what = ("from", "value") if style == "sharegpt" else ("role", "content")
    found = [{who: names[n % 2], what: text} for n, text in enumerate(texts)]
    return [{who: "system", what: system}] * (system is not None) + found


def test_both_styles_of_conversations_become_the_same_messages(tmp_path):
    texts = ("Hi there?", "Hello.", "And now?", "Goodbye.")
    expected = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi there?"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Goodbye."},
    ]
    rows = [
        {"conversations": turns(*texts, system="Be kind."), "source": "a"},
        {"conversations": turns(*texts[:2]), "source": "b"},
        {"conversations": turns(*texts, style="chat", system="Be kind.")},
        {"messages": turns(*texts, style="chat", system="Be kind."), "score": 5},
    ]
    table = [dict.fromkeys(("conversations", "messages", "source")) | r for r in rows]
    for path in (
        write_jsonl(tmp_path / "rows.jsonl", rows),
        write_as("folder", table, tmp_path),  # where absent keys are None
    ):
        source = load_source(str(path))
        assert source.kind == sources.CONVERSATION
        assert [row["messages"] for row in source.rows] == [
            expected,
            expected[1:3],
            expected,
            expected,
        ]
        assert [row["source"] for row in source.rows] == ["a", "b", "", ""]


def turn(role, text):
    return {"from": role, "value": text}


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        (None, "no turns"),
        ([], "no turns"),
        ("Hi?", "no turns"),
        (["Hi?", "Hello."], "a turn that is not an object"),
        (
            [turn("human", "Hi?"), turn("tool", "42")],
            "unknown role 'tool'",
        ),
        ([turn("human", "Hi?"), turn(["gpt"], "Hello.")], "unknown role ['gpt']"),
        ([turn("human", "Hi?"), {"value": "Hello."}], "unknown role None"),
        ([turn("human", "Hi?"), turn("gpt", 42)], "a turn that is not text"),
        ([turn("human", "Hi?"), {"from": "gpt"}], "a turn that is not text"),
        ([turn("human", "Hi?"), turn("gpt", " \n")], "an empty turn"),
        (
            [turn("human", "Hi?"), turn("system", "Be kind."), turn("gpt", "Hello.")],
            "a system prompt after the first turn",
        ),
        ([turn("gpt", "Hello."), turn("human", "Hi?")], "does not begin with the user"),
        ([turn("system", "Be kind.")], "does not begin with the user"),
        (
            [turn("human", "Hi?"), turn("human", "Hello?"), turn("gpt", "Yes.")],
            "two turns of the same role in a row",
        ),
        ([turn("human", "Hi?")], "does not end with an answer"),
        (
            [turn("human", "Hi?"), turn("gpt", "Hello."), turn("human", "And?")],
            "does not end with an answer",
        ),
        ([turn("human", "?!"), turn("gpt", "Hello.")], "question without words"),
    ],
)
def test_each_reason_to_leave_a_conversation_out(tmp_path, conversation, reason):
    good = {"conversations": turns("Hi?", "Hello.")}
    rows = [good, {"conversations": conversation}]
    source = load_source(str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    assert len(source.rows) == 1
    assert [(item.row, item.reason) for item in source.excluded] == [(2, reason)]


def test_conversations_are_split_by_their_first_question(tmp_path):
    rows = [
        {"conversations": turns(qa(n)["question"], f"Answer {n}."), "source": f"s{n}"}
        for n in range(60)
    ]
    twin = {"conversations": turns(rows[7]["conversations"][0]["value"], "Else.")}
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, twin])
    split = split_of(path)
    assert split.kind == sources.CONVERSATION
    assert sum(split.counts().values()) == 61  # the same question is no exclusion here
    assert set(split.train[0]) == {"messages", "source", "group"}
    groups = {
        row["group"]
        for row in all_rows(split)
        if sources.first_question(row["messages"]) == qa(7)["question"]
    }
    assert len(groups) == 1
    for question, place in place_of(split).items():
        assert place == expected_place(question)


def test_a_conversation_may_be_held_out(tmp_path):
    rows = [{"conversations": turns(qa(n)["question"], "Yes.")} for n in range(60)]
    lone = next(n for n in range(60) if expected_place(qa(n)["question"]) == "train")
    rows[lone]["held_out"] = True
    split = split_of(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert place_of(split)[normalise(qa(lone)["question"])] == "test"
    assert "held_out" not in split.test[0]


# --- the split -------------------------------------------------------------------


def test_each_lone_question_goes_where_its_hash_says(tmp_path):
    rows = rows_of(300)
    split = split_of(write_jsonl(tmp_path / "rows.jsonl", rows))
    places = place_of(split)
    assert len(places) == 300
    for row in rows:
        assert places[normalise(row["question"])] == expected_place(row["question"])
    assert 0.72 < len(split.train) / 300 < 0.88
    groups = [row["group"] for row in split.train]
    assert groups == sorted(groups)  # hashes: the first rows are as good as drawn


def test_ten_rows_split_where_their_hashes_fill_all_three(tmp_path):
    wanted = {"train": 8, "validation": 1, "test": 1}
    rows = []
    for number in range(1000):
        place = expected_place(qa(number)["question"])
        if wanted[place]:
            wanted[place] -= 1
            rows.append(qa(number))
    path = write_jsonl(tmp_path / "ten.jsonl", rows)
    counts = {"train": 8, "validation": 1, "test": 1}
    assert split_of(path).counts() == counts
    # Without the one of validation it is refused, and the message counts.
    rows = [r for r in rows if expected_place(r["question"]) != "validation"]
    write_jsonl(path, rows)
    with pytest.raises(ValueError, match="few groups") as caught:
        split_of(path)
    assert str(caught.value) == (
        f"{path}: too few groups of alike questions (9) to split (train 8, "
        "validation 0, test 1). Each split needs at least one; add rows."
    )


def messy_rows() -> list[dict]:
    """Usable rows, repeats, conflicts and unusable ones: 120 + 3 + 2 + 4."""
    rows = rows_of(120)
    rows += [dict(rows[0]), dict(rows[0]), rows[1] | {"answer": "take  F1X!"}]
    rows += [rows[2] | {"answer": HELP}, rows[3] | {"answer": "No."}]
    rows += [{"question": "Why?", "answer": bad} for bad in (None, 3, "", "\ufffd")]
    return rows


def test_rows_in_are_rows_out_and_counted_exclusions(tmp_path):
    rows = messy_rows()
    split = split_of(write_jsonl(tmp_path / "rows.jsonl", rows))
    reasons = sources.reasons_of(split.excluded)
    assert reasons == {
        "exact repeat": 3,
        "same question, another answer": 2,
        "no answer": 1,
        "answer is int, not text": 1,
        "empty answer": 1,
        "answer holds undecodable characters": 1,
    }
    assert split.rows_read == 129 == len(all_rows(split)) + len(split.excluded)
    named = {item.text for item in split.excluded if item.reason.startswith("same")}
    assert named == {normalise(qa(2)["question"]), normalise(qa(3)["question"])}


@pytest.mark.parametrize(
    ("answers", "stays"),
    [
        # The one that advises to call for help, though it is shorter and later.
        (["A long answer which says nothing of the kind.", HELP], HELP),
        # Else the longer one.
        (["Rest now.", "Rest for an hour now."], "Rest for an hour now."),
        ([HELP, HELP + " Then wait."], HELP + " Then wait."),
        # Else the alphabetically first.
        (["Rest now b.", "Rest now a."], "Rest now a."),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_of_conflicting_answers_one_stays(tmp_path, answers, stays, turned):
    rivals = [{"question": "Why me now?", "answer": answer} for answer in answers]
    rivals[1]["question"] = "why me, NOW"
    rows = rows_of(60) + (rivals[::-1] if turned else rivals)
    split = split_of(write_jsonl(tmp_path / "rows.jsonl", rows))
    left = [
        row["answer"]
        for row in all_rows(split)
        if normalise(row["question"]) == "why me now"
    ]
    assert left == [stays]


def variants(count: int, seed: int = 0) -> list[dict]:
    """Questions from few words, so that their cosines take all values."""
    rng = random.Random(seed)
    words = [f"w{n}x" for n in range(150)]
    rows = []
    for _ in range(count):
        question = rng.sample(words, 9)
        rows.append(question)
        for _ in range(rng.randrange(3)):
            question = list(question)
            for _ in range(rng.randint(1, 3)):
                question[rng.randrange(9)] = rng.choice(words)
            rows.append(question)
    rng.shuffle(rows)
    return [{"question": " ".join(q), "answer": f"Yes {q[0]}."} for q in rows]


def test_no_near_duplicate_stands_in_two_splits(tmp_path):
    rows = variants(250)
    split = split_of(write_jsonl(tmp_path / "rows.jsonl", rows))
    questions = sorted({row["question"] for row in rows})
    similar = cosines(questions)
    place = place_of(split)
    where = np.array([place[question] for question in questions])
    apart = where[:, None] != where[None, :]
    close = (similar >= 0.55) & ~np.eye(len(questions), dtype=bool)
    assert close.sum() > 200  # the case is not empty
    assert not (close & apart).any()


def test_groups_are_the_single_linkage_ones(tmp_path):
    rows = variants(250, seed=1)
    split = split_of(write_jsonl(tmp_path / "rows.jsonl", rows))
    questions = sorted({row["question"] for row in rows})
    close = cosines(questions) >= 0.55
    group = list(range(len(questions)))  # flood fill, smallest number first
    for start in range(len(questions)):
        waiting = [start] if group[start] == start else []
        while waiting:
            node = waiting.pop()
            for other in np.flatnonzero(close[node]):
                if group[other] != start:
                    group[other] = start
                    waiting.append(other)
    key_of = {q: questions[group[n]] for n, q in enumerate(questions)}
    assert len(set(key_of.values())) < len(questions) - 50
    for row in all_rows(split):
        key = key_of[row["question"]]
        assert row["group"] == hashlib.sha256(key.encode()).hexdigest()[:12]


@pytest.mark.parametrize("value", [True, "true", "True", 1, "1"])
def test_held_out_goes_to_test_with_its_group(tmp_path, value):
    number = next(n for n in range(60) if expected_place(qa(n)["question"]) == "train")
    rows = rows_of(60)
    near = {"question": rows[number]["question"] + " really?", "answer": "Yes."}
    rows.append(near)
    before = place_of(split_of(write_jsonl(tmp_path / "before.jsonl", rows)))
    rows[-1] = near | {"held_out": value}
    after = place_of(split_of(write_jsonl(tmp_path / "after.jsonl", rows)))
    pair = {normalise(near["question"]), normalise(rows[number]["question"])}
    assert {before[question] for question in pair} == {"train"}
    assert {q for q in before if before[q] != after[q]} == pair
    assert {after[question] for question in pair} == {"test"}


@pytest.mark.parametrize("value", [False, "false", "False", 0, "0", "", None])
def test_not_held_out_changes_nothing(tmp_path, value):
    rows = rows_of(60)
    plain = split_of(write_jsonl(tmp_path / "plain.jsonl", rows))
    rows = [row | {"held_out": value} for row in rows]
    said = split_of(write_jsonl(tmp_path / "said.jsonl", rows))
    assert place_of(said) == place_of(plain)
    assert said.fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    "answer", ["Take f{}x.", "No."], ids=["an exact repeat", "a conflicting answer"]
)
def test_a_dropped_repeat_still_holds_its_question_out(tmp_path, answer):
    number = next(n for n in range(60) if expected_place(qa(n)["question"]) == "train")
    repeat = qa(number, held_out=True) | {"answer": answer.format(number)}
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows_of(60), repeat])
    assert place_of(split_of(path))[normalise(repeat["question"])] == "test"


def test_the_questions_of_the_report_are_held_out(tmp_path):
    assert len(REPORT_QUESTIONS) == 3
    # Without the rule the hash would put at least one of them elsewhere.
    assert {expected_place(q) for q in REPORT_QUESTIONS} != {"test"}
    said = [{"question": q.upper(), "answer": "Yes."} for q in REPORT_QUESTIONS]
    path = write_jsonl(tmp_path / "rows.jsonl", rows_of(60) + said)
    places = place_of(split_of(path))
    assert {places[normalise(q)] for q in REPORT_QUESTIONS} == {"test"}


def test_new_rows_do_not_move_old_ones(tmp_path):
    rows = rows_of(440)
    before = place_of(split_of(write_jsonl(tmp_path / "few.jsonl", rows[:400])))
    after = place_of(split_of(write_jsonl(tmp_path / "all.jsonl", rows)))
    assert {question: after[question] for question in before} == before
    assert len(after) == 440


def test_topic_and_criticality_are_columns_of_the_split(tmp_path):
    burn = {"question": "How do I cool a burn?", "answer": "Under water."}
    own = {"question": "Who drew this?", "answer": "She.", "topic": "art"}
    rows = [burn, own | {"safety_critical": "False"}, *rows_of(60)]
    split = split_of(write_jsonl(tmp_path / "rows.jsonl", rows))
    found = {row["question"]: row for row in all_rows(split)}
    row = found[burn["question"]]
    assert set(row) == {"question", "answer", "topic", "safety_critical", "group"}
    assert (row["topic"], row["safety_critical"]) == ("burns", True)
    row = found[own["question"]]
    assert (row["topic"], row["safety_critical"]) == ("art", False)
    row = found[qa(0)["question"]]
    assert (row["topic"], row["safety_critical"]) == ("other", False)


# --- the same again --------------------------------------------------------------

WRITTEN = ("train.jsonl", "validation.jsonl", "test.jsonl")


def test_two_runs_and_a_shuffle_write_the_same_bytes(tmp_path, tiny_folder):
    rows = messy_rows() + variants(60)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    shuffled = list(rows)
    random.Random(3).shuffle(shuffled)
    other = write_jsonl(tmp_path / "shuffled.jsonl", shuffled)
    common = ["--tokenizer", str(tiny_folder)]
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    main(["--source", str(path), "--out", str(one), *common])
    main(["--source", str(other), "--out", str(three), *common])
    # Another process, where sets and dictionaries of text iterate differently.
    arguments = ["--source", str(path), "--out", str(two), *common]
    done = run_command(*arguments, hash_seed="1")
    assert done.returncode == 0, done.stderr
    assert f"{len(rows)} rows in, " in done.stdout
    assert "left out: 3 × exact repeat" in done.stdout
    assert "compare questions: 100%" in done.stderr  # the progress bar
    assert sorted(p.name for p in one.iterdir()) == sorted([*WRITTEN, "audit.json"])
    for name in (*WRITTEN, "audit.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    for name in WRITTEN:
        assert (one / name).read_bytes() == (three / name).read_bytes(), name
    audits = [json.loads((d / "audit.json").read_text()) for d in (one, three)]
    assert audits[0]["fingerprint"] == audits[1]["fingerprint"]


def test_written_files_hold_the_split(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", rows_of(60))
    source = load_source(str(path))
    split = split_rows(source, progress=False)
    dataset.write_split(split, {"rows": 60}, tmp_path / "deep" / "out")
    for name in WRITTEN:
        lines = (tmp_path / "deep" / "out" / name).read_text("utf-8").splitlines()
        assert list(map(json.loads, lines)) == getattr(split, name.split(".")[0])


def test_the_fingerprint_follows_every_row(tmp_path):
    def fingerprint(rows):
        return split_of(write_jsonl(tmp_path / "rows.jsonl", rows)).fingerprint

    twin = {"question": "what ABOUT a0x, b0x c0x d0x e0x", "answer": "take f0x"}
    rows = [twin, *rows_of(60)]  # the same words as row 0, otherwise written
    before = fingerprint(rows)
    assert len(before) == 16
    assert fingerprint(rows[::-1]) == before
    assert fingerprint(rows[:-1]) != before
    changed = [*rows[:-1], rows[-1] | {"answer": rows[-1]["answer"] + "."}]
    assert fingerprint(changed) != before
    # The same rows, one of them in another split.
    number = next(n for n in range(60) if expected_place(qa(n)["question"]) == "train")
    moved = [r | {"held_out": True} if r == qa(number) else r for r in rows]
    assert fingerprint(moved) != before


def test_the_selection_depends_on_content_and_seed_only(tmp_path):
    rows = rows_of(200)
    shuffled = list(rows)
    random.Random(5).shuffle(shuffled)

    def chosen(rows, seed):
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        source = load_source(str(path), rows=50, seed=seed)
        assert source.rows_read == len(source.rows) == 50
        return {row["question"] for row in source.rows}

    first = chosen(rows, seed=1)
    assert len(first) == 50
    assert chosen(shuffled, seed=1) == first
    assert len(chosen(rows, seed=2) & first) < 30
    # Some of the first 50, some of the last: not simply a slice.
    numbers = [n for n, row in enumerate(rows) if row["question"] in first]
    assert min(numbers) < 50 and max(numbers) >= 150


def test_a_selection_larger_than_the_data_takes_all(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", rows_of(20))
    assert load_source(str(path), rows=50).rows_read == 20


# --- near-duplicates -------------------------------------------------------------


def pairs_of(texts, **options) -> dict[tuple[int, int], float]:
    found = {}
    for i, j, cosine in similarity.near_duplicate_pairs(
        texts, progress=False, **options
    ):
        assert (i < j).all()
        found |= dict(zip(zip(i.tolist(), j.tolist()), cosine.tolist()))
    return found


def test_pairs_of_a_handful_by_hand():
    texts = ["cool the burn", "cool the burn", "press the wound", "x", ""]
    assert pairs_of(texts).keys() == {(0, 1)}
    assert pairs_of(["cool the burn"]) == {} == pairs_of(["x", "y"])


def test_every_pair_above_the_threshold_is_found():
    texts = sorted({row["question"] for row in variants(400, seed=2)})
    assert len(texts) > 500  # more than one block
    similar = np.triu(cosines(texts), k=1)
    expected = set(zip(*(axis.tolist() for axis in np.nonzero(similar >= 0.55))))
    found = pairs_of(texts)
    assert found.keys() == expected and len(expected) > 100
    for (i, j), cosine in found.items():
        assert cosine == pytest.approx(similar[i, j], abs=1e-5)


def test_minhash_finds_planted_near_duplicates():
    rng = random.Random(7)
    words = [f"w{n}x" for n in range(3000)]
    texts, planted = [], []
    for number in range(400):
        question = rng.choices(words, k=rng.randint(8, 60))
        texts.append(" ".join(question))
        if number % 2:
            edited = list(question)
            for _ in range(max(1, len(edited) // 8)):
                edited[rng.randrange(len(edited))] = rng.choice(words)
            planted.append((len(texts) - 1, len(texts)))
            texts.append(" ".join(edited))
    similar = cosines(texts)
    expected = {pair for pair in planted if similar[pair] >= 0.55}
    assert len(expected) > 150
    found = pairs_of(texts, exact_up_to=10)
    assert len(expected & found.keys()) >= 0.95 * len(expected)
    for pair, cosine in found.items():  # MinHash proposes, the cosine decides
        assert cosine == pytest.approx(similar[pair], abs=0.01)
        assert cosine >= 0.55


def test_the_nearest_training_row_is_the_most_alike():
    train = [qa(1), qa(2), {"question": "How to cool a burn", "answer": "Water."}]
    asked = [{"question": "How do I cool a burn fast?", "answer": "?"}, qa(2)]
    index, cosine = similarity.nearest_rows(train, asked)
    assert index.tolist() == [2, 1]
    questions = [normalise(row["question"]) for row in train + asked]
    similar = cosines(questions)
    assert cosine == pytest.approx([similar[3, 2], 1.0], abs=1e-6)


# --- the audit -------------------------------------------------------------------


def test_the_audit_counts_what_was_planted(tmp_path, tiny_tokenizer):
    rows = rows_of(60)
    rows += [dict(rows[0]), dict(rows[0])]  # two exact repeats of one question
    rows += [rows[1] | {"answer": HELP}]  # a conflict
    near = rows[2]["question"] + " Now?"
    rows += [{"question": near, "answer": "Do not take 5 of them."}]
    rows += [{"question": "How do I cool a burn?", "answer": "Under water."}]
    rows += [{"question": "Why?", "answer": ""}]
    source = load_source(str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    split = split_rows(source, progress=False)
    found = dataset.audit(source, split, tiny_tokenizer, progress=False)
    assert (found["rows"], found["usable"]) == (66, 65)
    assert found["excluded"] == {
        "exact repeat": 2,
        "same question, another answer": 1,
        "empty answer": 1,
    }
    assert found["repeats"] == {
        "questions_repeated": 2,
        "rows_repeated_exactly": 2,
        "questions_with_different_answers": 1,
    }
    assert found["near_duplicates"] == {
        "pairs_at_.55": 1,
        "questions_with_a_neighbour_at_.7": 2,
        "groups": 61,
        "largest_group": 3,  # question 0 three times
    }
    assert found["question_kinds"] == {"what": 64, "how": 1}
    assert found["advice"]["advises_help"] == 1
    assert found["advice"]["has_negation"] == 1
    # "what about a0x b0x c0x d0x e0x" has 7 words, " now" an eighth, the burn 6.
    mean = (63 * 7 + 8 + 6) / 65
    assert found["lengths"]["question_words"] == {
        "mean": round(mean, 2),
        "median": 7.0,
        "p95": 7.0,
        "max": 8,
    }
    longest = max(len(tiny_tokenizer.encode(row["answer"])) for row in source.rows)
    assert found["lengths"]["answer_tokens"]["max"] == longest
    assert found["topics"]["burns"]["rows"] == 1
    assert found["topics"]["emergency_call"]["rows"] == 1  # by its answer
    assert found["topics"]["other"]["rows"] == 63
    assert found["split"] == split.counts()
    assert found["fingerprint"] == split.fingerprint
    assert found["leakage"]["near_twins"] == 0
    json.dumps(found)  # nothing but what JSON holds


def test_the_audit_of_conversations(tmp_path):
    rows = [
        {"conversations": turns(qa(n)["question"], "Yes."), "source": f"s{n % 2}"}
        for n in range(60)
    ]
    rows[0]["conversations"] = turns("One?", "Two.", "Three?", "Four.", system="Be.")
    source = load_source(str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    split = split_rows(source, progress=False)
    found = dataset.audit(source, split, progress=False)
    assert found["sources"] == {"s0": 30, "s1": 30}
    assert (found["several_turns"], found["system_prompts"]) == (1, 1)
    assert "answer_tokens" not in found["lengths"]


# --- all rows of FirstAidQA (REAL_FIRST_AID) -------------------------------------


@pytest.fixture(scope="module")
def real_source(real_first_aid):
    return load_source(str(real_first_aid))


@pytest.fixture(scope="module")
def real_split(real_source):
    return split_rows(real_source, progress=False)


def test_real_no_test_question_has_a_twin_in_training(real_source, real_split):
    questions = [normalise(row["question"]) for row in real_source.rows]
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit(questions)
    train = [normalise(row["question"]) for row in real_split.train]
    train = vectorizer.transform(train)
    for part in (real_split.validation, real_split.test):
        vectors = vectorizer.transform([normalise(r["question"]) for r in part])
        assert (vectors @ train.T).max() < 0.6


def test_real_shares_and_sums(real_source, real_split):
    counts = real_split.counts()
    assert real_source.rows_read == 5550
    assert sum(counts.values()) + len(real_split.excluded) == 5550
    for name in ("validation", "test"):
        assert 0.08 <= counts[name] / sum(counts.values()) <= 0.12
        assert 0.08 <= counts[name] / 5550 <= 0.12
    test = {row["question"] for row in real_split.test}
    assert set(REPORT_QUESTIONS) <= test


def test_real_shuffling_moves_nothing(real_first_aid, real_split, tmp_path):
    rows = json.loads(real_first_aid.read_text("utf-8"))
    random.Random(11).shuffle(rows)
    split = split_of(write_jsonl(tmp_path / "shuffled.jsonl", rows))
    for name in ("train", "validation", "test"):
        assert getattr(split, name) == getattr(real_split, name)
    assert split.fingerprint == real_split.fingerprint


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_real_500_new_rows_move_at_most_one_in_a_hundred(
    real_first_aid, real_split, tmp_path, seed
):
    rows = json.loads(real_first_aid.read_text("utf-8"))
    random.Random(seed).shuffle(rows)
    few = split_of(write_jsonl(tmp_path / "few.jsonl", rows[500:]))
    before, after = place_of(few), place_of(real_split)
    assert len(before) > 4900 and before.keys() <= after.keys()
    moved = [question for question in before if before[question] != after[question]]
    assert len(moved) <= 0.01 * len(before)
