"""The live curve: nothing outside a notebook, one figure in place inside."""

import matplotlib.pyplot as plt
import pytest
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.pylabtools import select_figure_formats
from transformers import TrainerState

from utils import live
from utils.results import append_line, write_lines


@pytest.fixture
def log(tmp_path):
    """Two steps and an evaluation, as `StepLog` writes them."""
    path = tmp_path / "training_first_aid.jsonl"
    steps = [{"step": n, "epoch": n / 2, "loss": 5.0 / n} for n in (1, 2)]
    score = {"step": 0, "eval_nll": 5.0, "eval_perplexity": 148.4}
    write_lines(path, [score, *steps])
    return path


@pytest.fixture
def outputs():
    """What a notebook's kernel would be sent."""
    shell = InteractiveShell.instance()
    shell.kernel = object()
    shell.display_pub = CapturingDisplayPublisher()
    select_figure_formats(shell, {"png"})
    yield shell.display_pub.outputs
    InteractiveShell.clear_instance()


def test_outside_a_notebook_nothing_is_drawn(log, capsys):
    curve, state = live.LiveCurve(log, "first_aid", "So far"), TrainerState()
    curve.on_train_begin(None, state, None)
    curve.on_log(None, state, None, {})
    curve.on_train_end(None, state, None)
    assert capsys.readouterr().out == ""
    assert not plt.get_fignums()


def test_in_a_notebook_the_figure_grows_in_place(log, outputs, monkeypatch):
    curve, state = live.LiveCurve(log, "first_aid", "So far"), TrainerState()
    curve.on_train_begin(None, state, None)
    curve.on_log(None, state, None, {})
    append_line(log, {"step": 3, "epoch": 1.5, "loss": 1.0})
    curve.on_log(None, state, None, {})  # too soon after the last drawing
    curve.on_train_end(None, state, None)  # but the end is always drawn
    place, first, last = outputs
    assert "image/png" not in place["data"] and not place.get("update")
    for output in (first, last):
        assert output["update"] and output["transient"] == place["transient"]
    assert first["data"]["image/png"] != last["data"]["image/png"]
    assert not plt.get_fignums()  # or the notebook would show each a second time

    monkeypatch.setattr(live, "SECONDS_BETWEEN", 0)
    curve.on_log(None, state, None, {})
    assert len(outputs) == 4


def test_a_log_without_two_steps_is_not_drawn(log, outputs):
    write_lines(log, [{"step": 0, "eval_nll": 5.0, "eval_perplexity": 148.4}])
    curve, state = live.LiveCurve(log, "first_aid", "So far"), TrainerState()
    curve.on_train_begin(None, state, None)
    curve.on_log(None, state, None, {})
    assert len(outputs) == 1


def test_only_the_first_process_draws(log, outputs):
    curve = live.LiveCurve(log, "first_aid", "So far")
    state = TrainerState(is_world_process_zero=False)
    curve.on_train_begin(None, state, None)
    curve.on_log(None, state, None, {})
    assert not outputs
