"""The README's results are rendered from snapshots, and only from them."""

import dataclasses

import pytest

from utils import report, results
from utils.config import load_settings

CELL = {
    "n": 3,
    "rouge1_f1": 0.5,
    "rouge2_f1": 0.25,
    "rougeL_f1": 0.375,
    "rougeL_f1_low": 0.3,
    "rougeL_f1_high": 0.45,
    "answer_words": 42.0,
    "advises_help": 2 / 3,
}
PAIR = {"n": 3, "difference": 0.125, "low": 0.01, "high": 0.2, "won": 1.0, "lost": 0.0}
TRAINING = {
    "rows": {"train": 4321},
    "steps": 417,
    "eval_perplexity": {"before": 20.0, "after": 5.0},
    "training_seconds": 600.0,
    "peak_memory_gb": 4.5,
}


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A README with markers and a finished made-up run of the 1 B profile."""
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(report, "SNAPSHOTS", tmp_path / "results")
    settings = dataclasses.replace(
        load_settings({"PROFILE": "llama_1b"}), run_dir=tmp_path / "run"
    )
    run = {
        "profile": "llama_1b",
        "base_model": "unsloth/Llama-3.2-1B-Instruct",
        "first_aid_dataset": "i-am-mushfiq/FirstAidQA",
        "finetome_dataset": "mlabonne/FineTome-100k",
        "seed": 42,
        "max_steps": None,
        "hardware": "made-up T4",
        "versions": dict.fromkeys(("torch", "transformers", "trl", "peft"), "1.0"),
        "data": {"first_aid_fingerprint": "aaaa", "finetome_fingerprint": "bbbb"},
        "training_first_aid": TRAINING,
        "training_finetome": TRAINING,
        "comparison": {
            "when": "2026-01-02T03:04:05+00:00",
            "perplexity": {"base": {"first aid": 20.0}},
            "gain_over_base": PAIR,
            "gain_over_nearest": PAIR,
        },
    }
    arms = ("base", "finetome", "first_aid", "nearest", "echo", "random")
    scores = {"first_aid": {arm: {"original": CELL} for arm in arms}}
    answers = [
        {
            "dataset": "first_aid",
            "question": report.REPORT_QUESTIONS[0],
            "asked": report.REPORT_QUESTIONS[0],
            "phrasing": "original",
            "reference": "a row of a data set that is not ours",
            "model": model,
            "answer": f"answer of {model} | <b>bold</b>",
        }
        for model in report.MODELS
    ]
    results.write_json(settings.run_dir / "run.json", run)
    results.write_json(settings.run_dir / "scores.json", scores)
    results.write_lines(settings.run_dir / "answers.jsonl", answers)
    return settings, readme


def test_without_a_snapshot_it_says_not_measured(house):
    _, readme = house
    assert report.write_readme(report.render_results())
    text = readme.read_text("utf-8")
    assert text.count("Not measured") == 2 and "old" not in text
    assert text.startswith("before\n") and text.endswith("after\n")


def test_a_snapshot_fills_in_what_was_not_measured(house):
    settings, readme = house
    report.take_snapshot(settings)
    report.write_readme(report.render_results())
    text = readme.read_text("utf-8")
    for expected in (
        "made-up T4",
        "20.0 → 5.0",
        "4,321",
        "**+0.125** (95 % interval +0.010 to +0.200, n = 3)",
        "0.375 (0.300 to 0.450)",
        r"answer of first\_aid \| \<b\>bold\</b\>",
    ):
        assert expected in text, expected
    assert text.count("Not measured") == 1  # the pocket profile's


def test_rows_that_are_not_ours_stay_out(house):
    settings, readme = house
    folder = report.take_snapshot(settings)
    report.write_readme(report.render_results())
    assert "not ours" not in readme.read_text("utf-8")
    assert "not ours" not in (folder / "answers.jsonl").read_text("utf-8")


def test_twice_changes_nothing(house):
    settings, _ = house
    report.take_snapshot(settings)
    assert report.write_readme(report.render_results())
    report.take_snapshot(settings)
    assert not report.write_readme(report.render_results())


def test_a_run_on_other_data_is_no_report(house):
    settings, _ = house
    other = dataclasses.replace(
        settings, first_aid_dataset="mine.json", overrides={"FIRST_AID_DATASET": "mine"}
    )
    with pytest.raises(ValueError, match="not the profile's own.*FIRST_AID_DATASET"):
        report.take_snapshot(other)


def test_a_lost_marker_is_named(house):
    _, readme = house
    readme.write_text("nothing here")
    with pytest.raises(ValueError, match="lost a marker"):
        report.write_readme("text")


def test_the_committed_readme_says_what_the_snapshots_say():
    text = report.README.read_text("utf-8")
    between = text.split(report.BEGIN)[1].split(report.END)[0]
    assert between.strip() == report.render_results(), "run `make report`"
