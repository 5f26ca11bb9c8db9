"""What fewer bits cost: measured on the engine's weights, and shown as recorded."""

import json

import pytest

from utils import benchmark_engine, dataset, exported, prompts, sources
from utils.adapters import find_adapter
from utils.backends import LocalBackend
from utils.config import MODELS, POCKET, load_settings
from utils.generation import answer_nll
from utils.metrics import perplexity
from utils.models import use_model

pytest.importorskip("openvino_genai", reason="pip install -r requirements-openvino.txt")
from utils import engine_cost  # noqa: E402
from utils.openvino_engine import OpenVinoBackend  # noqa: E402


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cost") / "run"
    return load_settings({"PROFILE": "pocket", "RUN_DIR": str(folder)})


@pytest.fixture(scope="module")
def local(run):
    return LocalBackend(run)


@pytest.fixture(scope="module")
def rows(run, local):
    source = sources.load_source(run.first_aid_dataset)
    test = dataset.split_rows(source, progress=False).test[:6]
    return prompts.encode_rows(local.tokenizer, test, run.context_length)[0]


@pytest.mark.parametrize("key", MODELS)
def test_losses_of_an_exact_export_are_those_of_transformers(
    traced_pocket,
    local,
    run,
    rows,
    key,
):
    adapter = None if key == "base" else find_adapter(run, key).path
    found = engine_cost.exported_nll(traced_pocket, adapter, rows)
    with use_model(local.model, key) as model:
        wanted = answer_nll(model, rows)
    assert [n for _, n in found] == [n for _, n in wanted]
    assert perplexity(found)["nll"] == pytest.approx(perplexity(wanted)["nll"], 1e-4)


def test_an_adapter_of_other_layers_is_refused(traced_pocket, tmp_path):
    import numpy as np
    import openvino as ov
    from safetensors.numpy import save_file

    name = "base_model.model.model.layers.99.mlp.up_proj.lora_A.weight"
    save_file({name: np.zeros((1, 1))}, tmp_path / "adapter_model.safetensors")
    model = ov.Core().read_model(traced_pocket.path / "openvino_model.xml")
    with pytest.raises(ValueError, match="no layer model.layers.99.mlp.up_proj"):
        engine_cost.with_lora(model, tmp_path, 1.0)


@pytest.fixture
def record(tmp_path, monkeypatch):
    """Makes a record of what was measured on a base."""
    file = tmp_path / "engine.json"
    monkeypatch.setattr(exported, "cost_file", lambda profile: file)

    def write(fingerprint):
        scores = {"perplexity": 12.346, "rougeL_f1": 0.15678, "same_answers": 3}
        cell = {"bytes": 2_500_000, "models": {"first_aid": scores}}
        found = {"base_fingerprint": fingerprint, "n": 4, "formats": {"int4": cell}}
        file.write_text(json.dumps(found))

    return write


def test_the_record_becomes_a_table(record, run, capsys):
    assert exported.cost_rows(run) == []
    assert "holds nothing yet" in capsys.readouterr().out
    record("another")
    assert exported.cost_rows(run) == []
    assert "holds another base; `python -m utils.eng" in capsys.readouterr().out
    record(exported.weights_fingerprint(POCKET))
    assert exported.cost_rows(run) == [
        {
            "weights": "int4",
            "MB": 2.5,
            "model": "FirstAidQA",
            "perplexity": 12.35,
            "ROUGE-L": 0.1568,
            "same answers": "3 of 4",
        }
    ]


# --- the benchmark of the engine ---


def test_the_prompt_has_forty_tokens(local):
    messages = benchmark_engine.prompt_of(local.tokenizer)
    text = prompts.prompt_text(local.tokenizer, messages)
    assert len(local.tokenizer(text, add_special_tokens=False)["input_ids"]) == 40


def test_a_side_is_timed_on_all_three_models(traced_pocket, run, local, monkeypatch):
    monkeypatch.setattr(benchmark_engine, "NEW_TOKENS", 8)
    engine = OpenVinoBackend(run, traced_pocket)
    monkeypatch.setattr(benchmark_engine, "open_side", lambda *_: engine)
    messages = benchmark_engine.prompt_of(local.tokenizer)
    found = benchmark_engine.run_side("openvino", None, messages, 2)
    assert set(found["tokens_per_second"]) == set(found["first_token_s"]) == set(MODELS)
    assert all(rate > 1 for rate in found["tokens_per_second"].values())
    assert found["peak_memory_gb"] > 0.05


def test_ratios_are_ours_over_theirs(tiny_folder, tiny_tokenizer, monkeypatch):
    sides = {
        "openvino": ({"base": 12.0, "first_aid": 9.0}, {"base": 1.0, "first_aid": 2.0}),
        "transformers": ({"base": 3, "first_aid": 3}, {"base": 2.0, "first_aid": 2.5}),
    }

    def run(side, *_):
        rates, waits = sides[side]
        both = {"tokens_per_second": rates, "first_token_s": waits}
        return {**both, "peak_memory_gb": 2.5 if side == "openvino" else 4.0}

    monkeypatch.setattr(benchmark_engine, "in_own_process", run)
    monkeypatch.setattr(exported, "EXPORTS", exported.EXPORTS)  # put back afterwards
    found = benchmark_engine.compare(tiny_folder, 1)
    assert found["tokens_per_second_ratios"] == {"base": 4.0, "first_aid": 3.0}
    assert found["worst_tokens_per_second_ratio"] == 3.0
    assert found["worst_first_token_ratio"] == 0.8
    assert found["peak_memory_gb"] == 2.5
