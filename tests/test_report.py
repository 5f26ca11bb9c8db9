"""The README's results are rendered from snapshots, and only from them."""

import dataclasses
import json
import re
import shutil
import zipfile

import pytest

from utils import report, report_parts, results, snapshot
from utils.arms import ARMS, GENERATED
from utils.config import REPORT_QUESTIONS, load_settings

CELL = {
    "rows": 4,
    "n": 3,
    "empty": 1,
    "other_script": 0,
    "rouge1_f1": 0.5,
    "rouge2_f1": 0.25,
    "rougeL_f1": 0.375,
    "rougeL_f1_low": 0.3,
    "rougeL_f1_high": 0.45,
    "rougeLsum_f1": 0.4,
    "answer_words": 42.0,
    "advises_help": 2 / 3,
    "repeats": 0.0,
    "ended": 1.0,
    "card_met": 0.61,
    "card_met_n": 2,
    "card_dangerous": 0.07,
    "card_dangerous_n": 2,
    "help_if_critical": 0.83,
    "help_if_critical_n": 2,
    "negation_f1": 0.19,
    "negation_f1_n": 2,
    "number_f1_n": 0,
}
PAIR = {
    "n": 3,
    "difference": 0.125,
    "low": 0.01,
    "high": 0.2,
    "won": 1.0,
    "tied": 0.0,
    "lost": 0.0,
}
TRAINING = {
    "rows": {"train": 4321},
    "steps": 417,
    "eval_perplexity": {"before": 20.0, "after": 5.0},
    "training_seconds": 600.0,
    "peak_memory_gb": 4.5,
}
RUN = {
    "profile": "llama_1b",
    "base_model": "unsloth/Llama-3.2-1B-Instruct",
    "first_aid_dataset": "i-am-mushfiq/FirstAidQA",
    "finetome_dataset": "mlabonne/FineTome-100k",
    "seed": 42,
    "max_steps": None,
    "hardware": "made-up T4",
    "versions": dict.fromkeys(("torch", "transformers", "trl", "peft"), "1.0"),
    "data": {"first_aid_fingerprint": "aaaa", "finetome_fingerprint": "bbbb"},
    "training_first_aid": {**TRAINING, "data_fingerprint": "aaaa"},
    "training_finetome": {**TRAINING, "data_fingerprint": "bbbb"},
    "comparison": {
        "when": "2026-01-02T03:04:05+00:00",
        "first_aid_fingerprint": "aaaa",
        "finetome_fingerprint": "bbbb",
        "perplexity": {"base": {"first aid": 20.0, "general": 8.0}},
        "perplexity_intervals": {"base": {"first aid": [18, 22], "general": [7, 9]}},
        "gain_over_base": PAIR,
        "gain_over_nearest": PAIR,
        "gain_in_subject": PAIR | {"difference": 0.0125},
        "pairs": [{"model": "first_aid", "against": "base_short", **PAIR}],
        "agreement": {"base": {"n": 3, "mean": 0.44, "worst": 0.33}},
        "negation_test": {
            "n": 9,
            "changed": 7,
            "as_written": {"rougeL_f1": 1.0, "negation_f1": 1.0, "card_passed": 1.0},
            "stripped": {"rougeL_f1": 0.98, "negation_f1": 0.31, "card_passed": 0.88},
        },
    },
}


def made_up_answers() -> list[dict]:
    """All answers to the report's questions, in three wordings, and a row more."""
    rows = [
        {
            "dataset": "first_aid",
            "id": str(number),
            "question": question,
            "asked": question if phrasing == "original" else f"{phrasing} of {number}",
            "phrasing": phrasing,
            "reference": "a row of a data set that is not ours",
            "model": model,
            "answer": f"answer of {model} | <b>bold</b> to {number}, {phrasing}",
            "tokens": 9,
            "seconds": 1.5,
            "hit_cap": False,
        }
        for number, question in enumerate(REPORT_QUESTIONS)
        for model in (*GENERATED, "nearest")
        for phrasing in ("original", "rephrased_1", "rephrased_2")
        if phrasing == "original" or model != "base_short"
    ]
    return [*rows, {**rows[0], "question": "a question that is not ours"}]


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
    scores = {"first_aid": {arm: {"original": CELL} for arm in ARMS}}
    results.write_json(settings.run_dir / "run.json", RUN)
    results.write_json(settings.run_dir / "scores.json", scores)
    results.write_lines(settings.run_dir / "answers.jsonl", made_up_answers())
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
        "still gain +0.113 on the base's: that much is tone",
        "0.375 (0.300 to 0.450)",
        r"answer of first\_aid \| \<b\>bold\</b\>",
        "| Base, asked for three sentences | 0.500",
        "even on 0%, worse on 0%",
        "| 61% | 7% | 83% | 0.19 | – | 0.44 / 0.33 | 0% | 1 of 4 |",
        "20.0 (18.0 to 22.0) | 8.0 (7.0 to 9.0)",
        "still 0.980; agreement on what is denied falls to 0.310",
        "fall from 100% to 88%",
        "*asked as* “rephrased\\_1 of 2”",
        "Asked in 2 other wordings the tuned model scores",
    ):
        assert expected in text, expected
    assert text.count("Not measured") == 1  # the pocket profile's


def test_rows_that_are_not_ours_stay_out(house):
    settings, readme = house
    folder = report.take_snapshot(settings)
    report.write_readme(report.render_results())
    assert "not ours" not in readme.read_text("utf-8")
    assert "not ours" not in (folder / "answers.jsonl").read_text("utf-8")


def test_all_three_questions_stand_there_with_a_description(house):
    settings, readme = house
    report.take_snapshot(settings)
    report.write_readme(report.render_results())
    text = readme.read_text("utf-8")
    for number, question in enumerate(REPORT_QUESTIONS, start=1):
        assert f"**{number}. {question}**" in text
    assert text.count("reaches a ROUGE-L of") == 3
    assert text.count("things that a right answer has to say") == 3
    assert "Not medical advice" in text and "nearest, original" not in text


def test_a_missing_arm_is_named_and_an_older_snapshot_says_so(house):
    settings, readme = house
    folder = report.take_snapshot(settings)
    scores = results.read_json(folder / "scores.json")
    del scores["first_aid"]["base_short"]
    results.write_json(folder / "scores.json", scores)
    assert "three sentences | not measured" in report.render_results()
    (folder / snapshot.MANIFEST).unlink()
    assert "has format 1" in report.render_results()


def broken(run: dict, *path, value) -> dict:
    """A copy of `run` with one value changed, or taken out where it is None."""
    copy = json.loads(json.dumps(run))
    inner = copy
    for name in path[:-1]:
        inner = inner[name]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return copy


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("profile",), "pocket", "profile is 'pocket', and profile llama_1b has"),
        (("first_aid_dataset",), "mine.json", "results of other data"),
        (("base_model",), "another/Llama", "base_model is 'another/Llama'"),
        (("data",), None, "lacks data; run notebooks 01 to 05"),
        (("training_finetome",), None, "lacks training_finetome"),
        (
            ("training_first_aid", "data_fingerprint"),
            "cccc",
            "trained on the split cccc, the data were split as aaaa",
        ),
        (("comparison", "first_aid_fingerprint"), "cccc", "compared as cccc"),
    ],
)
def test_results_of_other_data_are_named_and_refused(house, path, value, message):
    settings, _ = house
    run = broken(RUN, *path, value=value)
    results.write_json(settings.run_dir / "run.json", run)
    with pytest.raises(ValueError, match=message):
        report.take_snapshot(settings)
    assert not report.SNAPSHOTS.exists()


def test_a_quick_look_is_no_report(house):
    settings, _ = house
    with pytest.raises(ValueError, match="quick look"):
        report.take_snapshot(dataclasses.replace(settings, quick=True))


# --- the zip -----------------------------------------------------------------------


@pytest.fixture
def zipped(house, tmp_path):
    """The zip that the last cell of notebook 05 makes, elsewhere."""
    settings, _ = house
    folder = snapshot.take(settings, tmp_path / "elsewhere" / "llama_1b")
    return snapshot.pack(folder, tmp_path / "results-llama_1b.zip")


def test_a_zip_fills_in_what_was_not_measured(house, zipped, capsys):
    _, readme = house
    report.main(["--zip", str(zipped)])
    text = readme.read_text("utf-8")
    assert "made-up T4" in text and text.count("Not measured") == 1
    assert "rendered anew" in capsys.readouterr().out
    report.main(["--zip", str(zipped)])
    assert "up to date already" in capsys.readouterr().out
    assert readme.read_text("utf-8") == text


def test_a_zip_that_was_unpacked_by_hand_does_so_too(house, zipped, monkeypatch):
    _, readme = house
    with zipfile.ZipFile(zipped) as archive:
        archive.extractall(report.SNAPSHOTS / "llama_1b")
    monkeypatch.setenv("PROFILE", "pocket")
    monkeypatch.setenv("RUN_DIR", str(readme.parent / "no run"))
    report.main([])
    assert "made-up T4" in readme.read_text("utf-8")


def test_a_zip_holds_no_row_that_is_not_ours(zipped):
    with zipfile.ZipFile(zipped) as archive:
        assert sorted(archive.namelist()) == sorted(snapshot.FILES)
        for name in archive.namelist():
            assert "not ours" not in archive.read(name).decode("utf-8")


def test_the_same_snapshot_gives_the_same_bytes(zipped, tmp_path):
    folder = tmp_path / "elsewhere" / "llama_1b"
    again = snapshot.pack(folder, tmp_path / "again.zip")
    assert again.read_bytes() == zipped.read_bytes()


def changed(zipped, name: str, change):
    """The zip with the text of one of its files changed."""
    with zipfile.ZipFile(zipped) as archive:
        texts = {n: archive.read(n).decode("utf-8") for n in archive.namelist()}
    texts[name] = change(texts.get(name, ""))
    with zipfile.ZipFile(zipped, "w") as archive:
        for key, text in texts.items():
            archive.writestr(key, text)
    return zipped


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (snapshot.MANIFEST, '"format": 2', '"format": 3', "has format 3.*reads 2"),
        (snapshot.MANIFEST, '"format": 2', '"form": 2', "has format None"),
        (snapshot.MANIFEST, "llama_1b", "pocket", "profile is 'llama_1b'"),
        (snapshot.MANIFEST, "llama_1b", "../up", "is no profile"),
        ("run.json", "i-am-mushfiq/FirstAidQA", "mine", "results of other data"),
        ("run.json", '"aaaa"', '"cccc"', None),
        ("run.json", "{", "", "the file is broken"),
        ("answers.jsonl", REPORT_QUESTIONS[0], "Their row?", "not of the report"),
        ("answers.jsonl", '"reference": ""', '"reference": "x"', "not ours to show"),
        ("extra.txt", "", "x", "holds .*extra.txt"),
    ],
)
def test_another_zip_is_named_and_refused(house, zipped, name, old, new, message):
    changed(zipped, name, lambda text: text.replace(old, new) if old else new)
    if message is None:  # every fingerprint changed alike: they still belong together
        assert snapshot.unpack(zipped, report.SNAPSHOTS)
        return
    with pytest.raises(ValueError, match=message):
        snapshot.unpack(zipped, report.SNAPSHOTS)
    assert not report.SNAPSHOTS.exists()


def test_what_is_no_zip_ends_with_a_sentence(house, zipped, tmp_path):
    whole = zipped.read_bytes()
    zipped.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit, match="results-llama_1b.zip is no zip"):
        report.main(["--zip", str(zipped)])
    with pytest.raises(SystemExit, match="No such file"):
        report.main(["--zip", str(tmp_path / "nothing.zip")])


def test_a_snapshot_in_another_profiles_folder_is_refused(house):
    settings, _ = house
    folder = report.take_snapshot(settings)
    shutil.copytree(folder, folder.with_name("pocket"))
    with pytest.raises(ValueError, match="lies in the folder of 'pocket'"):
        report.render_results()


def test_a_snapshot_of_another_version_is_refused(house):
    settings, _ = house
    folder = report.take_snapshot(settings)
    results.write_json(folder / snapshot.MANIFEST, {"format": 9})
    with pytest.raises(ValueError, match="has format 9"):
        report.render_results()


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


def test_the_readmes_images_exist_and_say_what_they_show():
    text = report.README.read_text("utf-8")
    found = re.findall(r"!\[([^\]]*)\]\((?!https)([^)]+)\)", text)
    assert found
    for alt, place in found:
        assert len(alt) >= 10, place
        assert (report.ROOT / place).is_file(), place


def test_seeds_are_shown_only_for_the_very_run_they_belong_to():
    training = {"base_fingerprint": "a", "data_fingerprint": "b", "steps": 3}
    run = {"training_first_aid": training}
    row = {
        "seed": 43,
        "validation_perplexity": {"first_aid": {"before": 900.0, "after": 120.0}},
        "rougeL_f1": {"base": 0.1, "first_aid": 0.15},
        "gain_over_base": {"n": 9, "difference": 0.05, "low": 0.01, "high": 0.09},
        "ended": {"first_aid": 0.984},
    }
    record = {"adapters": {"first_aid": training}, "seeds": [row]}
    shown = report_parts.seeds(record, run)
    assert "| 43 | 900.0 → 120.0 | 0.100 → 0.150 |" in shown and "98.4%" in shown
    other = {"training_first_aid": {**training, "steps": 4}}
    assert "not shown" in report_parts.seeds(record, other)
    assert "not measured" in report_parts.seeds({}, run)
