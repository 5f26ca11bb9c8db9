"""Profiles and knobs: what the environment says and where a run then lands."""

import re
import sys

import pytest
import torch

from utils import config
from utils.config import DATA, IMAGES, PROFILES, load_settings

ROWS = '{"question": "Why?", "answer": "Because."}\n'


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(ROWS, "utf-8")
    return path


def test_pocket_is_what_is_shipped():
    settings = load_settings({"PROFILE": "pocket"})
    assert settings.base_model == "data/pocket_llama"
    assert settings.first_aid_dataset == "data/samples/first_aid.jsonl"
    assert settings.finetome_dataset == "data/samples/general.jsonl"
    assert settings.finetome_rows is None and settings.max_steps is None
    assert settings.seed == 42 and not settings.load_in_4bit
    assert settings.overrides == {} and settings.is_default
    assert settings.run_dir == DATA / "runs" / "pocket"
    assert settings.figures_dir == IMAGES


def test_llama_1b_is_the_report():
    settings = load_settings({"PROFILE": "llama_1b"})
    assert settings.base_model == "unsloth/Llama-3.2-1B-Instruct"
    assert settings.first_aid_dataset == "i-am-mushfiq/FirstAidQA"
    assert settings.finetome_dataset == "mlabonne/FineTome-100k"
    assert settings.finetome_rows == 10_000 and settings.context_length == 2048
    assert settings.run_dir == DATA / "runs" / "llama_1b"
    assert settings.figures_dir == IMAGES


@pytest.mark.parametrize("value", ["medium", "Pocket", "llama_1b,pocket"])
def test_an_unknown_profile_is_named_with_those_there_are(value):
    with pytest.raises(ValueError) as caught:
        load_settings({"PROFILE": value})
    assert str(caught.value) == (
        f"PROFILE={value!r} is no profile. Set PROFILE=pocket or PROFILE=llama_1b."
    )


@pytest.mark.parametrize(("gpu", "profile"), [(True, "llama_1b"), (False, "pocket")])
@pytest.mark.parametrize("environ", [{}, {"PROFILE": " "}])
def test_without_a_profile_the_hardware_decides(monkeypatch, gpu, profile, environ):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert load_settings(environ).profile == profile


def test_a_named_profile_overrules_the_hardware(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert load_settings({"PROFILE": "pocket"}).profile == "pocket"


@pytest.mark.parametrize("name", ["FIRST_AID_DATASET", "FINETOME_DATASET"])
def test_other_data_lands_apart_and_spares_the_figures(rows_file, name):
    settings = load_settings({"PROFILE": "pocket", name: str(rows_file)})
    assert settings.overrides == {name: str(rows_file)}
    assert not settings.is_default
    assert settings.run_dir.parent == DATA / "runs"
    assert re.fullmatch("pocket-[0-9a-f]{10}", settings.run_dir.name)
    assert settings.figures_dir == settings.run_dir / "imgs"


def test_another_base_lands_apart(tiny_folder):
    settings = load_settings({"PROFILE": "pocket", "BASE_MODEL": str(tiny_folder)})
    assert re.fullmatch("pocket-[0-9a-f]{10}", settings.run_dir.name)
    assert not settings.figures_dir.is_relative_to(IMAGES)


def test_a_hub_id_as_base_needs_no_network():
    settings = load_settings({"PROFILE": "pocket", "BASE_MODEL": "some/model"})
    assert settings.base_model == "some/model"
    assert re.fullmatch("pocket-[0-9a-f]{10}", settings.run_dir.name)


def test_the_fingerprint_is_of_the_content_not_of_the_path(rows_file, tmp_path):
    def folder(path):
        environ = {"PROFILE": "pocket", "FIRST_AID_DATASET": str(path)}
        return load_settings(environ).run_dir.name

    elsewhere = tmp_path / "copy" / "rows.jsonl"
    elsewhere.parent.mkdir()
    elsewhere.write_text(ROWS, "utf-8")
    before = folder(rows_file)
    assert folder(elsewhere) == before
    rows_file.write_text(ROWS.replace("Because", "Hence"), "utf-8")
    assert folder(rows_file) != before


def test_the_two_datasets_are_not_confused(rows_file):
    names = {
        load_settings({"PROFILE": "pocket", name: str(rows_file)}).run_dir.name
        for name in ("FIRST_AID_DATASET", "FINETOME_DATASET")
    }
    assert len(names) == 2


def test_run_dir_is_taken_and_spares_the_figures(tmp_path):
    run_dir = tmp_path / "mine"
    settings = load_settings({"PROFILE": "pocket", "RUN_DIR": str(run_dir)})
    assert settings.run_dir == run_dir.resolve()
    assert settings.figures_dir == run_dir.resolve() / "imgs"
    assert settings.is_default  # the data are still the profile's own


def test_relative_paths_mean_the_project_root(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    environ = {
        "PROFILE": "pocket",
        "RUN_DIR": "data/runs/mine",
        "FIRST_AID_DATASET": "data/samples/general.jsonl",
    }
    settings = load_settings(environ)
    assert settings.run_dir == config.ROOT / "data" / "runs" / "mine"
    assert settings.first_aid_dataset == "data/samples/general.jsonl"


def test_the_default_spelt_out_is_still_the_default():
    own = PROFILES["pocket"].first_aid
    settings = load_settings({"PROFILE": "pocket", "FIRST_AID_DATASET": own})
    assert settings.is_default and settings.overrides == {}
    assert settings.run_dir == DATA / "runs" / "pocket"


@pytest.mark.parametrize(
    ("name", "value", "default"),
    [
        ("BASE_MODEL", "./no_such_model", "data/pocket_llama"),
        ("FIRST_AID_DATASET", "no_such.json", "data/samples/first_aid.jsonl"),
        ("FINETOME_DATASET", "/no/such/folder", "data/samples/general.jsonl"),
    ],
)
def test_a_missing_path_is_named(name, value, default):
    with pytest.raises(FileNotFoundError) as caught:
        load_settings({"PROFILE": "pocket", name: value})
    assert str(caught.value) == (
        f"{name}={value}: there is no such file or folder. Paths are relative to the "
        f"project root; check the spelling, or unset {name} to use {default}."
    )


@pytest.mark.parametrize("name", ["MAX_STEPS", "SEED"])
@pytest.mark.parametrize("value", ["0", "-3", "ten", "1.5", "²"])
def test_a_bad_number_is_named(name, value):
    with pytest.raises(ValueError) as caught:
        load_settings({"PROFILE": "pocket", name: value})
    expected = f"{name}={value!r} must be a whole number of at least 1."
    assert str(caught.value) == expected


def test_good_numbers_are_taken_and_listed():
    environ = {"PROFILE": "pocket", "MAX_STEPS": "7", "SEED": " 3 "}
    settings = load_settings(environ)
    assert (settings.max_steps, settings.seed) == (7, 3)
    assert settings.overrides == {"MAX_STEPS": "7", "SEED": "3"}


def test_four_bit_is_a_switch():
    assert load_settings({"PROFILE": "pocket", "LOAD_IN_4BIT": "1"}).load_in_4bit
    assert not load_settings({"PROFILE": "pocket", "LOAD_IN_4BIT": "0"}).load_in_4bit
    with pytest.raises(ValueError, match=r"^LOAD_IN_4BIT='yes' must be 0 or 1\.$"):
        load_settings({"PROFILE": "pocket", "LOAD_IN_4BIT": "yes"})


def test_an_old_python_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 14, "final", 0))
    with pytest.raises(RuntimeError) as caught:
        load_settings({"PROFILE": "pocket"})
    assert str(caught.value) == (
        "Python 3.10.14 is too old: this project needs 3.11 or newer. "
        "Try: make PYTHON=python3.12 run"
    )


def test_show_prints_every_knob_and_hides_the_machine(settings, tmp_path, capsys):
    settings(MAX_STEPS=5).show()
    shown = capsys.readouterr().out
    assert re.search(r"^profile +pocket$", shown, re.M)
    assert re.search(r"^optimizer steps +5$", shown, re.M)
    assert re.search(r"^overridden +MAX_STEPS, RUN_DIR$", shown, re.M)
    assert re.search(r"^run folder +…/run$", shown, re.M)
    assert str(tmp_path) not in shown


def test_what_is_local_and_what_is_on_the_hub(tmp_path):
    for source in ("./x", "/x", "~/x", "x.json", "x.csv", "a/b.parquet", str(tmp_path)):
        assert config.is_local(source), source
    for source in ("i-am-mushfiq/FirstAidQA", "mlabonne/FineTome-100k"):
        assert not config.is_local(source), source
