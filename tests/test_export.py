"""Exports that are halves, of another base or not to be had, and who answers then."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
from safetensors.numpy import load_file, save_file

from utils import export, exported, openvino_engine, space
from utils.adapters import find_adapter
from utils.backends import LocalBackend
from utils.config import POCKET, load_chat_settings
from utils.openvino_engine import EngineUnavailable, OpenVinoBackend, check_adapter

FINGERPRINT = exported.weights_fingerprint(POCKET)


@pytest.fixture
def exports(tmp_path, monkeypatch):
    monkeypatch.setattr(exported, "EXPORTS", tmp_path / "exports")
    return tmp_path / "exports"


@pytest.fixture
def half(exports, settings):
    """A folder like an export's, complete in its files, with nothing in the model."""

    def make(weight_format="int4", **changed):
        folder = exported.export_dir(settings(), weight_format)
        folder.mkdir(parents=True)
        for name in exported.NEEDED:
            (folder / name).write_text("")
        shutil.copyfile(POCKET / "config.json", folder / "config.json")
        record = {
            "base_model": "data/pocket_llama",
            "base_fingerprint": FINGERPRINT,
            "weight_format": weight_format,
            "files": {file.name: file.stat().st_size for file in folder.iterdir()},
        }
        (folder / exported.RECORD).write_text(json.dumps(record | changed))
        return folder

    return make


@pytest.fixture
def adapter(tmp_path, settings):
    """A copy of the shipped first-aid adapter, which may be spoilt."""
    source = find_adapter(settings(), "first_aid").path
    folder = tmp_path / "adapter"
    shutil.copytree(source, folder)
    return folder


def test_the_smallest_complete_export_is_taken(half, settings):
    assert exported.find_export(settings()) is None
    half("int8")
    assert exported.find_export(settings()).weight_format == "int8"
    half("int4")
    found = exported.find_export(settings())
    assert (found.weight_format, found.base_fingerprint) == ("int4", FINGERPRINT)
    assert "data/pocket_llama in int4" in found.about()


@pytest.mark.parametrize("missing", [exported.RECORD, "openvino_model.bin"])
def test_a_half_written_export_is_refused(half, settings, missing):
    (half() / missing).unlink()
    with pytest.raises(ValueError, match=rf"no complete export \(no {missing}\)"):
        exported.find_export(settings())


def test_an_export_cut_short_is_refused(half, settings):
    with (half() / "config.json").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match=r"config.json has 100 of \d+ bytes, so the"):
        exported.find_export(settings())


@pytest.mark.parametrize("record", ["{", "[]", "{}"])
def test_a_spoilt_record_is_refused(half, settings, record):
    (half() / exported.RECORD).write_text(record)
    with pytest.raises(ValueError, match="export.json cannot be read .*make export"):
        exported.find_export(settings())


def test_an_export_of_what_the_base_was_before_is_refused(half, settings):
    half(base_fingerprint="0123456789abcdef")
    with pytest.raises(ValueError, match="an export of another base than"):
        exported.find_export(settings())


def test_one_that_is_named_is_taken_from_there(half, settings, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.move(half(), elsewhere)
    assert exported.find_export(settings(), str(elsewhere)).path == elsewhere
    with pytest.raises(OSError, match="ENGINE_MODEL=no/one cannot be fetched"):
        exported.find_export(settings(), "no/one")


def test_an_unknown_format_is_refused(settings):
    with pytest.raises(ValueError, match="choose one of int4, int8, fp16, fp32"):
        export.export(settings(), "int3")


def test_the_scale_is_alpha_over_rank(half, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = check_adapter(adapter, exported.read_export(half()))
    assert scale == config["lora_alpha"] / config["r"]


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("adapter_config.json", {"r": 7}, "does not fit"),
        ("adapter_config.json", {"use_dora": True}, r"not a plain LoRA \(use_dora\)"),
        ("adapter_info.json", {"base_fingerprint": "f00"}, "trained on another base"),
    ],
)
def test_an_adapter_that_does_not_fit_is_named(half, adapter, file, values, said):
    change(adapter / file, **values)
    with pytest.raises(EngineUnavailable, match=said):
        check_adapter(adapter, exported.read_export(half()))


@pytest.mark.parametrize(
    "values", [{"hidden_size": 128}, {"num_hidden_layers": 1}, {"head_dim": 32}]
)
def test_layers_of_another_width_or_number_are_named(half, adapter, values):
    made = exported.read_export(half())
    change(made.path / "config.json", **values)
    with pytest.raises(EngineUnavailable, match=r"layers.* is \[.*and the base has"):
        check_adapter(adapter, made)


def test_a_layer_that_a_llama_has_not_is_named(half, adapter):
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "q_proj.lora_A" in name)
    weights[name.replace("q_proj", "w_proj")] = weights[name]
    save_file(weights, file)
    with pytest.raises(
        EngineUnavailable, match="w_proj.lora_A.weight is .*no such layer"
    ):
        check_adapter(adapter, exported.read_export(half()))


def test_without_the_package_a_sentence_names_it(half, settings, monkeypatch):
    monkeypatch.setattr(openvino_engine, "genai", None)
    with pytest.raises(EngineUnavailable, match="-r requirements-openvino.txt"):
        OpenVinoBackend(settings(), exported.read_export(half()))


def test_too_little_memory_is_said_before_loading(half, settings, monkeypatch):
    pytest.importorskip("openvino_genai")
    free = SimpleNamespace(available=10_000)
    monkeypatch.setattr(openvino_engine.psutil, "virtual_memory", lambda: free)
    folder = half()
    large = dataclasses.replace(exported.read_export(folder), size=20_000)
    with pytest.raises(EngineUnavailable, match="GB are free: close something"):
        OpenVinoBackend(settings(), large)


def test_what_openvino_cannot_read_is_said(half, settings):
    pytest.importorskip("openvino_genai")
    with pytest.raises(EngineUnavailable, match="OpenVINO cannot load .*make export"):
        OpenVinoBackend(settings(), exported.read_export(half()))


def chosen(settings, **environ):
    return space.local_backend(settings, load_chat_settings(environ))


def test_transformers_stays_where_nobody_asks(half, settings):
    half()
    backend, note = chosen(settings())
    assert isinstance(backend, LocalBackend) and note == ""


@pytest.mark.parametrize("complete", [True, False, None])
def test_transformers_stays_and_a_sentence_says_why(
    half, settings, complete, capsys, exports
):
    if complete is not None:
        folder = half()  # complete in its files, and yet nothing that can be loaded
        if not complete:
            (folder / exported.RECORD).unlink()
    backend, note = chosen(settings(), CHAT_ENGINE="openvino")
    assert isinstance(backend, LocalBackend)
    assert note.endswith("Transformers answers instead.") and "make export" in note
    assert note.strip() in capsys.readouterr().out


@pytest.mark.parametrize("gpu", [True, False])
def test_a_1b_without_a_gpu_wants_it_unasked(settings, monkeypatch, gpu):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    own = dataclasses.replace(settings(), profile="llama_1b")
    assert space._wants_openvino(own, load_chat_settings({})) is not gpu
    stay = load_chat_settings({"CHAT_ENGINE": "transformers"})
    assert not space._wants_openvino(own, stay)
    assert not space._wants_openvino(settings(), load_chat_settings({}))


def test_only_known_engines_can_be_asked_for():
    assert load_chat_settings({"CHAT_ENGINE": "OpenVINO"}).engine == "openvino"
    with pytest.raises(ValueError, match="must be transformers or openvino"):
        load_chat_settings({"CHAT_ENGINE": "llama.cpp"})
