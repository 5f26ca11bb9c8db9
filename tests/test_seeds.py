"""What several seeds found is one record: one base, one split, one set of knobs."""

import pytest

from utils import results, seeds

PAIR = {"n": 3, "difference": 0.1, "low": 0.05, "high": 0.15, "won": 1.0, "lost": 0.0}
KNOBS = {"rank": 32, "rate": 0.002}


def finished_run(folder, seed: int, after: float, steps: int = 10):
    """A made-up finished run in `folder`."""
    training = {
        "adapter": "first_aid",
        "base_fingerprint": "base",
        "data_fingerprint": "data",
        "hyperparameters": KNOBS,
        "steps": steps,
        "eval_perplexity": {"before": 100.0, "after": after},
    }
    run = {
        "profile": "pocket",
        "seed": seed,
        "hardware": "made up",
        "training_first_aid": training,
        "training_finetome": training,
        "comparison": {
            "when": "2026-01-02T03:04:05+00:00",
            "perplexity": {"base": {"first aid": 100.0}},
            "gain_over_base": PAIR,
            "gain_over_random": PAIR,
        },
    }
    cell = {"rougeL_f1": 0.2, "ended": 1.0, "n": 3}
    scores = {"first_aid": {arm: {"original": cell} for arm in seeds.ARMS}}
    results.write_json(folder / "run.json", run)
    results.write_json(folder / "scores.json", scores)
    return training


@pytest.fixture
def house(tmp_path, monkeypatch, settings):
    """Settings of a finished default run; walks with other seeds are made up."""
    monkeypatch.setattr(results, "DATA", tmp_path)
    made = settings(RUN_DIR=tmp_path / "pocket")
    finished_run(tmp_path / "pocket", 42, 50.0)
    return made


def walks(tmp_path, monkeypatch, **other):
    def walk(seed, _):
        finished_run(tmp_path / str(seed), seed, float(seed), **other)
        return tmp_path / str(seed)

    monkeypatch.setattr(seeds, "walk_with", walk)


def test_every_seed_is_a_row_that_the_notebooks_show(house, tmp_path, monkeypatch):
    walks(tmp_path, monkeypatch)
    written = seeds.record(house, (43, 44))
    assert [row["seed"] for row in written["seeds"]] == [42, 43, 44]
    info = finished_run(tmp_path / "again", 42, 50.0)
    rows = results.seed_rows("pocket", info)
    assert [row["perplexity, tuned"] for row in rows] == [50.0, 43.0, 44.0]
    assert rows[0]["test ROUGE-L of the base"] == 0.2


def test_a_run_with_other_knobs_is_no_row(house, tmp_path, monkeypatch):
    walks(tmp_path, monkeypatch, steps=11)
    with pytest.raises(ValueError, match="differs"):
        seeds.record(house, (43,))


def test_other_knobs_show_no_rows_and_say_so(house, tmp_path, monkeypatch, capsys):
    walks(tmp_path, monkeypatch)
    seeds.record(house, (43,))
    info = finished_run(tmp_path / "again", 42, 50.0, steps=11)
    assert results.seed_rows("pocket", info) == []
    assert "not measured" in capsys.readouterr().out


def test_an_unfinished_run_is_named(settings, tmp_path):
    with pytest.raises(FileNotFoundError, match="run.json is not there yet"):
        seeds.collect(tmp_path)
