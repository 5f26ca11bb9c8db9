"""All six notebooks run in order, on a small data set of one's own and a few steps."""

import json
import os
import subprocess
import sys

import nbformat
import pytest

from utils.config import IMAGES, MODELS, REPORT_QUESTIONS, ROOT, SAMPLES

STEPS = 3


def some_rows(name: str, wanted: int) -> list[dict]:
    rows = [json.loads(x) for x in (SAMPLES / name).read_text("utf-8").splitlines()]
    first = [row for row in rows if row.get("question") in REPORT_QUESTIONS]
    rest = [row for row in rows if row not in first and not row.get("held_out")]
    return first + rest[:wanted]


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("walk")
    environment = {
        **os.environ,
        "PROFILE": "pocket",
        "MAX_STEPS": str(STEPS),
        "RUN_DIR": str(folder / "run"),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "empty_cache"),
    }
    for variable, name, wanted in (
        ("FIRST_AID_DATASET", "first_aid.jsonl", 60),
        ("FINETOME_DATASET", "general.jsonl", 60),
    ):
        path = folder / name
        lines = [json.dumps(row) + "\n" for row in some_rows(name, wanted)]
        path.write_text("".join(lines), encoding="utf-8")
        environment[variable] = str(path)
    images = {file: file.stat().st_mtime_ns for file in IMAGES.glob("*")}
    done = subprocess.run(
        [sys.executable, "-m", "utils.walk", "--timeout", "600"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    return done, folder / "run", images


def lines_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_it_ends_well_with_a_line_per_notebook(walk):
    done, _, _ = walk
    assert done.returncode == 0, done.stdout + done.stderr
    for number in range(1, 7):
        assert f"\n0{number}_" in done.stdout
    assert "figures:" in done.stdout


def test_every_cell_was_executed_in_order(walk):
    _, run, _ = walk
    copies = sorted((run / "notebooks").glob("*.ipynb"))
    assert len(copies) == 6
    for path in copies:
        cells = nbformat.read(path, as_version=4).cells
        counts = [cell.execution_count for cell in cells if cell.cell_type == "code"]
        assert counts == list(range(1, len(counts) + 1)), path.name


def test_the_logs_hold_every_step_and_step_zero(walk):
    _, run, _ = walk
    for name in ("first_aid", "finetome"):
        rows = lines_of(run / f"training_{name}.jsonl")
        steps = [row for row in rows if "loss" in row]
        evaluations = [row for row in rows if "eval_nll" in row]
        assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
        assert evaluations[0]["step"] == 0 and evaluations[-1]["step"] == STEPS
        expected = "step epoch loss learning_rate grad_norm tokens_per_second memory_gb"
        assert set(steps[0]) == {*expected.split(), "tokens", "elapsed_s"}


def test_answers_and_scores_belong_together(walk):
    _, run, _ = walk
    answers = lines_of(run / "answers.jsonl")
    scores = json.loads((run / "scores.json").read_text("utf-8"))
    assert {row["model"] for row in answers} == {
        *MODELS,
        "base_short",
        "nearest",
        "random",
        "echo",
    }
    phrasings = {r["phrasing"] for r in answers if r["question"] == REPORT_QUESTIONS[0]}
    assert phrasings == {"original", "rephrased_1", "rephrased_2", "rephrased_3"}
    for row in answers:
        assert row["question"] and row["reference"] is not None
    for dataset, models in scores.items():
        for model, cells in models.items():
            for phrasing, cell in cells.items():
                n = sum(
                    (r["dataset"], r["model"], r["phrasing"])
                    == (dataset, model, phrasing)
                    for r in answers
                )
                assert cell["rows"] == n
                unusable = cell["empty"] + cell["other_script"]
                assert cell["n"] >= n - unusable


def test_the_run_says_what_made_it(walk):
    _, run, _ = walk
    record = json.loads((run / "run.json").read_text("utf-8"))
    assert record["profile"] == "pocket" and record["seed"] == 42
    assert record["hardware"] and record["versions"]["trl"]
    assert record["data"]["first_aid_fingerprint"]
    assert str(ROOT) not in json.dumps(record)


def test_data_of_ones_own_leaves_the_committed_figures_alone(walk):
    _, run, images = walk
    assert {file: file.stat().st_mtime_ns for file in IMAGES.glob("*")} == images
    names = {file.name for file in (run / "imgs").glob("*.png")}
    assert {
        "first_aid_fine_tuning_metrics.png",
        "fine_tome_fine_tuning_metrics.png",
        "rouge.png",
    } <= names


def test_data_without_the_reports_questions_or_rephrasings_walks_too(tmp_path):
    """On the shipped adapters: what somebody meets who brings data of their own."""
    rows = [json.loads(x) for x in (SAMPLES / "first_aid.jsonl").open(encoding="utf-8")]
    mine = [r for r in rows if not r["held_out"]][:40]
    columns = ("question", "answer")
    lines = [json.dumps({c: row[c] for c in columns}) + "\n" for row in mine]
    (tmp_path / "mine.jsonl").write_text("".join(lines), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "utils.walk", "--only", "01", "05"],
        cwd=ROOT,
        env={
            **os.environ,
            "PROFILE": "pocket",
            "RUN_DIR": str(tmp_path / "run"),
            "FIRST_AID_DATASET": str(tmp_path / "mine.jsonl"),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
