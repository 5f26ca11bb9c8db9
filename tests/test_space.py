"""What runs where: the front matter, the environment's knobs, adapters, the start."""

import dataclasses
import os
import re
import subprocess
import sys
import time

import gradio as gr
import httpx
import huggingface_hub.constants
import pytest
from huggingface_hub import metadata_load
from peft import PeftModel
from safetensors.torch import load_file
from test_backends import free_port
from test_models import lively, save_three

from utils import benchmark_chat, space
from utils.adapters import with_adapters
from utils.backends import LocalBackend
from utils.chat import build_chat
from utils.config import ROOT, SAFETY_NOTICE, load_chat_settings, load_settings
from utils.models import find_adapter, load_three_models
from utils.remote import RemoteBackend

# https://huggingface.co/docs/hub/spaces-config-reference and .../spaces-oauth
DOCUMENTED = {
    "title",
    "emoji",
    "colorFrom",
    "colorTo",
    "sdk",
    "python_version",
    "sdk_version",
    "suggested_hardware",
    "suggested_storage",
    "app_file",
    "app_port",
    "base_path",
    "fullWidth",
    "header",
    "short_description",
    "models",
    "datasets",
    "tags",
    "thumbnail",
    "pinned",
    "hf_oauth",
    "hf_oauth_scopes",
    "hf_oauth_expiration_minutes",
    "hf_oauth_authorized_org",
    "disable_embedding",
    "startup_duration_timeout",
    "custom_headers",
    "preload_from_hub",
    "license",
}
SCOPES = {
    "email",
    "read-billing",
    "read-repos",
    "gated-repos",
    "contribute-repos",
    "write-repos",
    "manage-repos",
    "inference-api",
    "jobs",
    "webhooks",
    "write-discussions",
}
FIRST_WITHOUT_THE_LEAK = (6, 22)  # gradio, CVE-2026-27167


@pytest.fixture(scope="module")
def card():
    return metadata_load(ROOT / "README.md")


def test_the_front_matter_has_documented_keys_only(card):
    assert set(card) <= DOCUMENTED


def test_the_front_matter_is_within_its_limits(card):
    assert 0 < len(card["short_description"]) <= 60
    assert card["hf_oauth"] is True
    assert set(card["hf_oauth_scopes"]) == {"inference-api"}  # and no right to write
    assert set(card["hf_oauth_scopes"]) <= SCOPES
    assert 0 < card["hf_oauth_expiration_minutes"] <= 43_200
    assert re.fullmatch(r"3\.\d+(\.\d+)?", card["python_version"])
    assert card["app_file"] == "app.py" and (ROOT / card["app_file"]).is_file()
    for name in (*card["models"], *card["datasets"]):
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", name)


def test_the_tested_gradio_is_named_and_a_maintained_one(card):
    assert card["sdk_version"] == gr.__version__
    assert tuple(map(int, card["sdk_version"].split(".")[:2])) >= FIRST_WITHOUT_THE_LEAK


def test_the_knobs_are_read_and_no_token_is_shown():
    read = load_chat_settings(
        {
            "MODEL_ENDPOINT": "http://localhost:8000/v1/",
            "MODEL_NAMES": "base=meta/llama, first_aid=fa",
            "FEEDBACK_REPO": "owner/votes",
            "HF_TOKEN": "hf_secret",
            "SPACE_ID": "owner/space",
            "OAUTH_CLIENT_ID": "x",
        }
    )
    assert read.endpoint == "http://localhost:8000"
    assert read.model_names == {"base": "meta/llama", "first_aid": "fa"}
    assert read.login and read.on_space and read.token == "hf_secret"
    assert "hf_secret" not in repr(read)
    assert not load_chat_settings({"OAUTH_CLIENT_ID": "x"}).login


@pytest.mark.parametrize(
    ("knob", "value", "said"),
    [
        ("MODEL_ENDPOINT", "localhost:8000", "is no address"),
        ("MODEL_NAMES", "gpt=4", "is no model with its name"),
        ("MODEL_NAMES", "base", "is no model with its name"),
        ("FEEDBACK_REPO", "votes", "must read owner/name"),
        ("CHAT_ENGINE", "llama.cpp", "must be transformers or openvino"),
        ("FIRST_AID_ADAPTER", "a/b", "Set both"),
    ],
)
def test_a_wrong_knob_is_refused_with_advice(knob, value, said):
    with pytest.raises(ValueError, match=said):
        load_chat_settings({knob: value})


@pytest.fixture
def three(tmp_path, tiny_model, tiny_tokenizer):
    return save_three(tmp_path, lively(tiny_model, tiny_tokenizer), tiny_tokenizer)


def test_adapters_made_elsewhere_are_taken_into_a_folder_of_their_own(
    three, tmp_path, settings
):
    base, run = three
    own = settings(BASE_MODEL=base)
    named = {key: str(run / "adapters" / key) for key in ("first_aid", "finetome")}
    chosen = with_adapters(own, named, runs=tmp_path / "runs")
    assert chosen.run_dir.parent == tmp_path / "runs" and chosen.run_dir != own.run_dir
    for key in named:
        found = find_adapter(chosen, key).path
        assert load_file(found / "adapter_model.safetensors").keys()
    model, _ = load_three_models(chosen, verbose=False)
    assert isinstance(model, PeftModel) and set(model.peft_config) == set(named)


def test_an_adapter_in_a_pickle_is_refused(three, tmp_path, settings):
    base, run = three
    for key in ("first_aid", "finetome"):
        folder = run / "adapters" / key
        weights = folder / "adapter_model.safetensors"
        weights.rename(folder / "adapter_model.bin")
    named = {key: str(run / "adapters" / key) for key in ("first_aid", "finetome")}
    with pytest.raises(ValueError, match=r"pickles \(\.bin\) are refused"):
        with_adapters(settings(BASE_MODEL=base), named, runs=tmp_path / "runs")


def test_a_base_in_a_pickle_is_refused(three, settings):
    base, run = three
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        LocalBackend(settings(BASE_MODEL=base, RUN_DIR=run))


def test_no_code_of_a_models_author_is_run():
    for file in [*(ROOT / "utils").glob("*.py"), ROOT / "app.py"]:
        assert "trust_remote_code" not in file.read_text("utf-8"), file.name


def test_an_adapter_that_is_nowhere_is_named(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    named = {"first_aid": "nobody/adapter", "finetome": "nobody/other"}
    with pytest.raises(OSError, match="FIRST_AID_ADAPTER=nobody/adapter cannot be"):
        with_adapters(settings(), named, runs=tmp_path)


def test_with_an_endpoint_nothing_is_loaded_and_the_local_model_is_offered(three):
    base, run = three
    environ = {"PROFILE": "pocket", "BASE_MODEL": str(base), "RUN_DIR": str(run)}
    environ["MODEL_ENDPOINT"] = f"http://127.0.0.1:{free_port()}"
    cast = space.choose_cast(load_chat_settings(environ), environ)
    assert list(cast.sources) == ["endpoint", "local"]
    assert isinstance(cast.sources["endpoint"], RemoteBackend)
    assert cast.sources["local"].model is None
    assert "⚠" in cast.about and "let this machine answer instead" in cast.about


def test_without_local_adapters_none_are_offered(three, tmp_path):
    base, _ = three
    environ = {"PROFILE": "pocket", "BASE_MODEL": str(base)}
    environ |= {"RUN_DIR": str(tmp_path / "empty")}
    environ["MODEL_ENDPOINT"] = f"http://127.0.0.1:{free_port()}"
    cast = space.choose_cast(load_chat_settings(environ), environ)
    assert list(cast.sources) == ["endpoint"]
    assert "no model on this machine" in cast.about


def test_the_login_button_is_on_spaces_only(three, settings, monkeypatch):
    monkeypatch.setattr("gradio.oauth.get_space", lambda: "owner/space")
    for name in ("CLIENT_ID", "CLIENT_SECRET", "SCOPES"):
        monkeypatch.setattr(f"gradio.oauth.OAUTH_{name}", "x")
    monkeypatch.setattr("gradio.oauth.OPENID_PROVIDER_URL", "https://huggingface.co")
    base, run = three
    backend = LocalBackend(settings(BASE_MODEL=base, RUN_DIR=run), load=False)
    for login in (False, True):
        app = build_chat(backend.settings, backend, login=login)
        assert app.expects_oauth is login


@pytest.mark.slow
def test_the_app_starts_on_what_the_repository_has_within_a_minute(tmp_path):
    """As on a Space's free CPU: nothing trained, no network, nothing in the cache."""
    port = free_port()
    environ = {
        "PATH": os.environ["PATH"],
        "PROFILE": "pocket",
        "RUN_DIR": str(tmp_path / "run"),
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "GRADIO_SERVER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }
    begun = time.monotonic()
    app = subprocess.Popen([sys.executable, "app.py"], cwd=ROOT, env=environ)
    try:
        page = ""
        while not page and time.monotonic() - begun < 60:
            assert app.poll() is None, "app.py ended"
            try:
                page = httpx.get(f"http://127.0.0.1:{port}/config", timeout=5).text
            except httpx.HTTPError:
                time.sleep(0.3)
        assert page, "not up within a minute"
    finally:
        app.terminate()
        app.wait(10)
    assert SAFETY_NOTICE.split("(")[0] in page
    assert "data/pocket_llama with our adapters" in page
    assert "It is not Llama 3.2 1B" in page


def test_three_models_in_the_1b_shape_weigh_little_more_than_one():
    found = benchmark_chat.one_b_shape()
    assert found["base_bytes"] == pytest.approx(2 * 1.2358e9, rel=1e-3)
    # 16 layers, rank 16, in + out of all seven linear layers, two adapters, float32.
    sizes = [(2048, 2048)] * 2 + [(2048, 512)] * 2 + [(2048, 8192)] * 3
    numbers = 16 * sum(16 * (a + b) for a, b in sizes)
    assert found["adapter_bytes"] == 2 * 4 * numbers
    assert found["three_models_over_base"] <= 1.06


def test_settings_are_as_they_were_without_a_knob():
    assert dataclasses.asdict(load_chat_settings({})) == {
        "endpoint": "",
        "model_names": {},
        "adapters": {},
        "engine": "",
        "engine_model": "",
        "feedback_repo": "",
        "on_space": False,
        "login": False,
        "token": None,
    }
    assert load_settings({"PROFILE": "pocket"}).profile == "pocket"
