"""The benchmark of fine-tuning measures what it says, on both sides of a pair."""

import json

import pytest

from utils import benchmark, benchmark_training
from utils.benchmark_training import Setup, compare, run_side, utilisation
from utils.config import load_settings
from utils.results import read_json


@pytest.fixture
def setup(tiny_folder, tmp_path):
    """A side in miniature: the tiny random Llama, two steps on a few rows."""
    rows = tmp_path / "rows.jsonl"
    lines = [
        json.dumps({"question": f"What about {w * n}?", "answer": f"Rest {w}. " * n})
        for n, w in enumerate(
            ("ankle", "burn", "cut", "dizzy", "eye", "fall", "graze"), 1
        )
    ]
    rows.write_text("\n".join(lines), encoding="utf-8")
    return Setup(
        side="ours",
        base=str(tiny_folder),
        tokenizer=str(tiny_folder),
        rows=str(rows),
        run_dir=str(tmp_path / "run"),
        micro=2,
        batch=2,
        steps=2,
        rank=4,
        rate=1e-3,
        validate=False,
    )


ORIGINAL = dict(side="plain", load_in_4bit=True, recompute=True, batch=4, steps=1)


@pytest.mark.parametrize("side", [dict(side="ours"), dict(side="plain"), ORIGINAL])
def test_a_side_counts_its_rows(setup, side):
    done = run_side(benchmark_training.replace(setup, **side))
    assert done["rows_per_second"] * done["seconds"] == pytest.approx(4, rel=0.1)
    assert done["tokens_per_second"] > done["rows_per_second"]
    assert done["validation_nll"] is None and done["peak_memory_gb"] > 0


def test_ratios_are_of_pairs_and_the_order_alternates(setup, monkeypatch):
    speeds = {
        ("ours", 42): 30.0,
        ("plain", 42): 10.0,
        ("ours", 43): 20.0,
        ("plain", 43): 10.0,
        ("ours", 44): 50.0,
        ("plain", 44): 10.0,
    }
    called = []

    def run(one):
        called.append(one.side)
        nll = 1.0 if one.side == "plain" else 1.0 + (one.seed - 42) / 100
        speed = speeds[one.side, one.seed]
        return {"rows_per_second": speed, "validation_nll": nll}

    monkeypatch.setattr(benchmark_training, "in_own_process", run)
    ours = benchmark_training.replace(setup, validate=True)
    found = compare(ours, benchmark_training.replace(ours, side="plain"), 3)
    assert called == ["ours", "plain", "plain", "ours", "ours", "plain"]
    assert found["rows_per_second_ratio"] == 3.0  # the median of 3, 2 and 5
    assert found["worst_validation_nll_ratio"] == 1.02


def test_utilisation_projects_to_a_t4(monkeypatch):
    monkeypatch.setattr(benchmark_training.torch.cuda, "is_available", lambda: True)
    name = "NVIDIA H100 80GB HBM3"
    monkeypatch.setattr(benchmark_training.torch.cuda, "get_device_name", lambda: name)
    ours = {"tokens_per_second": 989e3, "rows_per_second": 9890.0, "parameters": 10**9}
    found = utilisation([{"ours": ours}])
    # 989,000 tokens of 4e9 FLOPs a second are 4 of 989 TFLOP/s.
    assert found["model_flops_utilisation"] == 4.0
    # 3 × 5,550 rows of 100 tokens at 4e9 FLOPs, at four times 65 TFLOP/s.
    assert found["projected_t4_seconds"] == round(3 * 5550 * 100 * 4e9 / 260e12)


def test_without_a_gpu_the_gpu_section_is_not_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_training.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(benchmark, "REPORT", tmp_path / "benchmark.json")
    benchmark.main(["gpu"])
    assert "not measured, there is no CUDA GPU" in capsys.readouterr().out
    assert not (tmp_path / "benchmark.json").exists()


def test_a_section_is_written_beside_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "REPORT", tmp_path / "benchmark.json")
    monkeypatch.setattr(
        benchmark_training, "on_cpu", lambda *_: {"rows_per_second_ratio": 2.0}
    )
    (tmp_path / "benchmark.json").write_text('{"data": {"kept": 1}}')
    benchmark.main(["training"])
    report = read_json(tmp_path / "benchmark.json")
    assert report["data"] == {"kept": 1}
    assert report["training"]["rows_per_second_ratio"] == 2.0
    assert report["training"]["hardware"]


@pytest.mark.slow
def test_four_bits_end_within_five_percent_of_the_unquantised_run():
    rows = load_settings({"PROFILE": "pocket"}).first_aid_dataset
    found = benchmark_training.four_bit(rows, steps=60)
    print(found)
    assert found["four_bit"]["validation_nll"] < 6  # it has learnt
    assert abs(found["validation_nll_ratio"] - 1) <= 0.05
