"""Whose adapters a notebook shows when it is the first one that somebody opens."""

import pytest
from test_models import lively, save_three

from utils.adapters import ADAPTERS, find_adapter, settings_with_adapters
from utils.config import POCKET, load_settings
from utils.results import ADAPTER_LOG, find_training_log


@pytest.fixture
def three(tmp_path, tiny_model, tiny_tokenizer):
    return save_three(tmp_path, lively(tiny_model, tiny_tokenizer), tiny_tokenizer)


def test_the_runs_own_come_first(three, settings, tmp_path, capsys):
    base, run = three
    own = settings(BASE_MODEL=base, RUN_DIR=run)
    named = {"FIRST_AID_ADAPTER": "some/one", "FINETOME_ADAPTER": "some/other"}
    assert settings_with_adapters(own, tmp_path / "runs", named) is own
    assert capsys.readouterr().out == ""


def test_then_those_that_are_named_with_their_logs(three, settings, tmp_path, capsys):
    base, run = three
    named = {
        f"{name.upper()}_ADAPTER": str(run / "adapters" / name) for name in ADAPTERS
    }
    (run / "adapters" / "first_aid" / ADAPTER_LOG).write_text("{}\n")
    asked = settings(BASE_MODEL=base, RUN_DIR=tmp_path / "empty")
    found = settings_with_adapters(asked, tmp_path / "runs", named)
    assert found.base_model == str(base)
    assert found.run_dir.parent == tmp_path / "runs"
    assert found.figures_dir == found.run_dir / "imgs"
    for name in ADAPTERS:
        assert find_adapter(found, name).path.is_relative_to(found.run_dir)
    log, origin = find_training_log(found, "first_aid")
    assert log.is_file() and "fetched with the adapter" in origin
    assert "adapters: those named" in capsys.readouterr().out


def test_a_named_one_that_is_away_is_never_left_out(settings, tmp_path):
    named = {"FIRST_AID_ADAPTER": "no/one", "FINETOME_ADAPTER": "no/other"}
    with pytest.raises(OSError, match="FIRST_AID_ADAPTER=no/one cannot be fetched"):
        settings_with_adapters(settings(), tmp_path / "runs", named)


def test_those_on_the_drive_are_the_runs_own(three, tmp_path, capsys):
    """With the Drive, `runs` lies on it: what an earlier runtime made is there."""
    base, run = three
    drive = tmp_path / "drive" / "runs"
    environ = {"PROFILE": "pocket", "BASE_MODEL": str(base)}
    asked = load_settings(environ, runs=drive)
    asked.run_dir.parent.mkdir(parents=True)
    run.rename(asked.run_dir)
    assert settings_with_adapters(asked, drive, environ) is asked
    for name in ADAPTERS:
        assert find_adapter(asked, name).path.is_relative_to(drive)
    assert capsys.readouterr().out == ""


def test_named_ones_are_for_the_1b_unless_somebody_says_otherwise(
    three, tmp_path, settings, capsys
):
    """As on a Space: without a GPU the profile would be pocket, and they not fit."""
    _, run = three
    named = {
        f"{name.upper()}_ADAPTER": str(run / "adapters" / name) for name in ADAPTERS
    }
    asked = settings(RUN_DIR=tmp_path / "empty")
    found = settings_with_adapters(asked, tmp_path / "runs", named)
    assert found.profile == "llama_1b"
    assert "slow without a GPU" in capsys.readouterr().out
    named["PROFILE"] = "pocket"
    assert settings_with_adapters(asked, tmp_path, named).profile == "pocket"
    assert "slow" not in capsys.readouterr().out


def test_then_the_shipped_ones(settings, tmp_path, capsys):
    asked = settings()
    assert settings_with_adapters(asked, tmp_path, {}) is asked
    assert find_adapter(asked, "first_aid").path.is_relative_to(POCKET)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("made", [(), ("first_aid",)])
def test_and_else_the_pocket_model_visibly(three, tmp_path, settings, made, capsys):
    base, run = three
    for name in set(ADAPTERS) - set(made):
        (run / "adapters" / name / "adapter_model.safetensors").unlink()
    environ = {"PROFILE": "llama_1b", "BASE_MODEL": str(base), "RUN_DIR": str(run)}
    environ |= {"SEED": "7", "QUICK": "1"}
    asked = load_settings(environ)
    found = settings_with_adapters(asked, tmp_path / "runs", environ)
    assert (found.profile, found.seed, found.quick) == ("pocket", 7, False)
    assert found.run_dir == tmp_path / "runs" / "pocket"
    said = capsys.readouterr().out
    assert said.startswith(f"No adapters for {base} in ")
    assert "Going on with the pocket profile" in said
    assert ("notebooks/02_fine_tune_on_first_aid.ipynb" in said) == (not made)
    assert "notebooks/03_fine_tune_on_finetome.ipynb would make them" in said
