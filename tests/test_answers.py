"""Answers are collected row by row: none twice, none missing, none of another run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_models import lively

from utils import answers, models
from utils.arms import ARMS, GENERATED, SHORT_REQUEST, is_asked, messages_for
from utils.config import ROOT

CAP = 8
ROWS = [
    {"question": f"What do I do with burn number {n}?", "answer": f"Cool it, {n}."}
    for n in range(7)
]
ROWS[0]["rephrasings"] = ["burn!! what now", "a burn, what is to do"]
MADE_BY = {arm: f"mark of {arm}" for arm in GENERATED}


@pytest.fixture
def questions():
    general = {
        "messages": [
            {"role": "user", "content": "Write a poem."},
            {"role": "assistant", "content": "The sea."},
        ]
    }
    return answers.first_aid_questions(ROWS) + answers.general_questions([general])


@pytest.fixture
def three(tiny_model, tiny_tokenizer):
    """The tiny model with two random adapters that say something else."""
    torch.manual_seed(3)
    lora = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    base = lively(tiny_model, tiny_tokenizer)
    model = get_peft_model(base, lora, adapter_name="first_aid")
    model.add_adapter("finetome", lora)
    return model.eval()


def collect(model, tokenizer, questions, path, **other):
    wanted = {"made_by": MADE_BY, "max_new_tokens": CAP, "batch_size": 3}
    return answers.collect(
        model, tokenizer, questions, path, progress=False, **wanted | other
    )


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_every_arm_answers_and_only_base_short_is_asked_to_be_short(
    three, tiny_tokenizer, questions, tmp_path
):
    rows = collect(three, tiny_tokenizer, questions, tmp_path / "answers.jsonl")
    counts = {arm: sum(row["model"] == arm for row in rows) for arm in GENERATED}
    # Seven questions, two rephrasings and a poem; the short one gets the seven only.
    assert counts == {"base": 10, "base_short": 7, "finetome": 10, "first_aid": 10}
    assert rows == [row for arm in GENERATED for row in rows if row["model"] == arm]
    assert {row["hit_cap"] for row in rows} <= {True, False}
    assert all(row["tokens"] <= CAP and row["made_by"] for row in rows)
    assert not any("messages" in row for row in rows)


def test_the_short_arm_keeps_the_system_prompt(questions):
    short = messages_for(ARMS["base_short"], questions[0]["messages"])
    assert short[0] == questions[0]["messages"][0]
    assert short[-1]["content"] == f"{ROWS[0]['question']} {SHORT_REQUEST}"
    assert messages_for(ARMS["base"], short) is short
    assert not is_asked(ARMS["base_short"], questions[1])  # a rephrasing


def test_a_finished_file_asks_no_model(three, tiny_tokenizer, questions, tmp_path):
    path = tmp_path / "answers.jsonl"
    first = collect(three, tiny_tokenizer, questions, path)
    assert collect(None, tiny_tokenizer, questions, path) == first


@pytest.mark.parametrize("kept", [1, 5, 14, 30])
def test_it_goes_on_where_it_stopped(
    three, tiny_tokenizer, questions, tmp_path, kept, capsys
):
    whole = collect(three, tiny_tokenizer, questions, tmp_path / "whole.jsonl")
    text = (tmp_path / "whole.jsonl").read_text("utf-8").splitlines(keepends=True)
    path = tmp_path / "cut.jsonl"
    path.write_text("".join(text[:kept]) + text[kept][:20], encoding="utf-8")
    again = collect(three, tiny_tokenizer, questions, path)
    assert "was cut short; dropped" in capsys.readouterr().out
    said = [{k: v for k, v in row.items() if k != "seconds"} for row in again]
    before = [{k: v for k, v in row.items() if k != "seconds"} for row in whole]
    assert said == before
    assert lines(path)[:kept] == lines(tmp_path / "whole.jsonl")[:kept]
    assert len(lines(path)) == len(whole)  # none twice


def test_a_letter_cut_in_two_is_dropped_with_its_line(tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    path.write_bytes('{"answer": "5 µ'.encode()[:-1])
    assert answers.restore(path, MADE_BY) == {}
    assert "cut short" in capsys.readouterr().out


def row_of(arm="base", **other) -> dict:
    row = dict.fromkeys(answers.WANTED, "x") | {"answer": "a\u2028b"}
    return row | {"model": arm, "made_by": MADE_BY.get(arm)} | other


def write(path: Path, *rows) -> Path:
    text = [
        r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows
    ]
    path.write_text("".join(line + "\n" for line in text), encoding="utf-8")
    return path


def test_answers_of_another_run_are_set_aside(tmp_path, capsys):
    path = write(tmp_path / "answers.jsonl", row_of(), row_of(made_by="another base"))
    kept = answers.restore(path, MADE_BY)
    assert list(kept.values()) == [row_of()]
    assert "1 answers" in (said := capsys.readouterr().out) and "another base" in said
    aside = (tmp_path / answers.ASIDE).read_text("utf-8")
    assert json.loads(aside)["made_by"] == "another base"
    assert answers.restore(path, MADE_BY) == kept and not capsys.readouterr().out


def test_arms_without_a_model_are_made_anew(tmp_path, capsys):
    path = write(tmp_path / "answers.jsonl", row_of("nearest", made_by="no model"))
    assert answers.restore(path, MADE_BY) == {}
    assert not (tmp_path / answers.ASIDE).exists()


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("{broken", r"answers.jsonl, line 2: cannot be read.*Delete that line"),
        ("[1, 2]", r"line 2: holds .*not an answer"),
        (row_of(), r"line 2: repeats the answer"),
        (
            {k: v for k, v in row_of(id="y").items() if k != "reference"},
            r"line 2: lacks reference",
        ),
    ],
)
def test_a_broken_line_is_named(tmp_path, second, message):
    path = write(tmp_path / "answers.jsonl", row_of(), second, row_of(id="z"))
    with pytest.raises(ValueError, match=message):
        answers.restore(path, MADE_BY)


def test_a_question_that_is_there_twice_is_named(three, tiny_tokenizer, tmp_path):
    twice = answers.first_aid_questions(ROWS[1:2] * 2)
    with pytest.raises(ValueError, match="is there twice"):
        collect(three, tiny_tokenizer, twice, tmp_path / "answers.jsonl")


KILLED = """
import sys, json
sys.path[:0] = [{tests!r}, {root!r}]
import torch
torch.set_num_threads(1)
import test_answers as t
from pathlib import Path
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
tokenizer = PreTrainedTokenizerFast.from_pretrained({tiny!r})
base = t.lively(LlamaForCausalLM.from_pretrained({tiny!r}).eval(), tokenizer)
torch.manual_seed(3)
lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
model = get_peft_model(base, lora, adapter_name="first_aid")
model.add_adapter("finetome", lora)
questions = t.answers.first_aid_questions(t.ROWS)
print("begins", flush=True)
t.collect(model.eval(), tokenizer, questions, Path({path!r}), batch_size=1,
          max_new_tokens=60)
"""


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_killed_halfway_and_started_again_no_row_twice_and_none_missing(
    tiny_folder, tmp_path
):
    path = tmp_path / "answers.jsonl"
    code = KILLED.format(
        tests=str(Path(__file__).parent),
        root=str(ROOT),
        tiny=str(tiny_folder),
        path=str(path),
    )
    command = [sys.executable, "-c", code]
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and first.poll() is None:
        if path.is_file() and path.read_bytes().count(b"\n") >= 5:
            first.send_signal(signal.SIGKILL)
            break
        time.sleep(0.001)
    assert first.wait() == -signal.SIGKILL, "it was done before it could be killed"
    before = path.read_bytes()
    before = [json.loads(x) for x in before[: before.rfind(b"\n") + 1].splitlines()]
    subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    after = lines(path)
    asked = answers.first_aid_questions(ROWS)
    wanted = {
        answers.key_of({**q, "model": arm})
        for arm in GENERATED
        for q in asked
        if is_asked(ARMS[arm], q)
    }
    keys = [answers.key_of(row) for row in after]
    assert len(before) < len(keys) == len(set(keys)) and set(keys) == wanted
    assert after[: len(before)] == before  # timings too: those were not made again


SPLITS = {
    name: SimpleNamespace(fingerprint="of-these-rows", source="mine.json")
    for name in models.ADAPTERS
}


def adapters(settings, fingerprint: str) -> None:
    for name in models.ADAPTERS:
        folder = models.adapter_dir(settings, name)
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(
            b"weights of " + name.encode()
        )
        (folder / models.ADAPTER_INFO).write_text(
            json.dumps({"data_fingerprint": fingerprint})
        )


def test_an_adapter_trained_on_another_split_is_refused(settings):
    made = settings()
    adapters(made, "of-other-rows")
    with pytest.raises(ValueError, match="split of-other-rows.*of-these-rows.*mine"):
        answers.check_adapters(made, SPLITS)


def test_an_adapter_of_the_same_split_is_taken_and_a_shipped_one_noted(settings):
    made = settings()
    notes = answers.check_adapters(made, SPLITS)  # the pocket Llama's own
    assert len(notes) == 2 and all("trained on other data" in note for note in notes)
    adapters(made, "of-these-rows")
    assert answers.check_adapters(made, SPLITS) == []


def test_the_identity_hangs_on_base_adapter_data_and_cap(settings):
    made = settings()
    adapters(made, "of-these-rows")
    data = {"first_aid": "a", "finetome": "b"}
    one = answers.identity(made, "base", data)
    assert len(set(one.values())) == len(GENERATED)
    assert one == answers.identity(made, "base", dict(reversed(data.items())))
    other = answers.identity(made, "another base", data)
    assert not set(one.values()) & set(other.values())
    other = answers.identity(made, "base", data | {"first_aid": "c"})
    assert not set(one.values()) & set(other.values())
    longer = made.__class__(**{**vars(made), "max_new_tokens": 7})
    other = answers.identity(longer, "base", data)
    assert not set(one.values()) & set(other.values())
    weights = models.adapter_dir(made, "first_aid") / "adapter_model.safetensors"
    weights.write_bytes(b"trained again")
    other = answers.identity(made, "base", data)
    changed = [arm for arm in GENERATED if one[arm] != other[arm]]
    assert changed == ["first_aid"]


def test_baselines_lend_the_training_answers():
    train = [
        {"question": "How do I cool a burn?", "answer": "With water."},
        {"question": "Who wrote this book?", "answer": "Nobody knows."},
    ]
    test = [{"question": "How can I cool a burn fast?", "answer": "Tap water."}]
    asked = answers.first_aid_questions(test)[0]
    base = {k: v for k, v in asked.items() if k != "messages"} | {"model": "base"}
    rows = answers.without_model([base], train, test, seed=1)
    said = {row["model"]: row["answer"] for row in rows}
    assert said["nearest"] == "With water." and said["echo"] == test[0]["question"]
    assert said["random"] in ("With water.", "Nobody knows.")
    assert all(row["reference"] == "Tap water." for row in rows)
