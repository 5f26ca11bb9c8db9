"""What a run gives away: adapter, card, merged model and Modelfile, each read back."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
import trl
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import save_and_load
from transformers import AutoModelForCausalLM

from utils import models, prompts, publish, results
from utils.config import SAFETY_NOTICE

INFO = {
    "adapter": "first_aid",
    "data_fingerprint": "feedc0ffee",
    "base_fingerprint": "0123456789abcdef",
    "rows": {"train": 1234, "test": 5},
    "hyperparameters": {"rank": 7, "rate": 3e-4},
    "steps": 417,
    "tokens_per_second": 98.7,
    "peak_memory_gb": 6.54,
}
EVALUATIONS = [
    {"step": 0, "eval_nll": 3.21, "eval_perplexity": 24.7791},
    {"step": 1417, "eval_nll": 1.5, "eval_perplexity": 4.4817},
]


@pytest.fixture
def tuned(tiny_model):
    """The tiny model with an adapter that says something."""
    torch.manual_seed(1)
    layers = ["q_proj", "v_proj", "down_proj"]
    lora = LoraConfig(r=8, target_modules=layers, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model, lora)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data.normal_(std=0.1)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.arange(10, 60)[None]).logits


def card_of(settings, **changes) -> ModelCard:
    run = results.describe_run(settings)
    info = run | INFO | {"when": results.now()} | changes
    return ModelCard(publish.adapter_card(settings, info, EVALUATIONS))


# --- the adapter ----------------------------------------------------------------------


def test_the_adapter_is_saved_without_anybodys_folders(
    tuned, tmp_path, tiny_folder, settings, monkeypatch
):
    def no_hub(name, *_, **__):
        raise AssertionError(f"saving asked the Hub for {name}")

    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", no_hub)
    for config in tuned.peft_config.values():
        config.base_model_name_or_path = str(tiny_folder)  # what PEFT would keep
    folder = tmp_path / "adapter"
    house = settings(BASE_MODEL=tiny_folder)
    publish.save_adapter(tuned, folder, house, INFO, EVALUATIONS)
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        models.ADAPTER_INFO,
    }
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == tiny_folder.name
    for name in ("README.md", "adapter_config.json", models.ADAPTER_INFO):
        assert str(tiny_folder.parent) not in (folder / name).read_text("utf-8")
    info = models.read_adapter_info(folder)
    assert INFO.items() <= info.items()
    assert info["base_model"] == tiny_folder.name
    assert info["versions"]["peft"] and info["seed"] == 42

    again = PeftModel.from_pretrained(models.load_base(house), folder)
    assert torch.allclose(logits(again), logits(tuned), atol=1e-6)


def test_every_number_of_the_card_comes_out_of_the_run(settings):
    text = card_of(settings()).text
    for line in (
        "(1,234 training rows; data fingerprint\n`feedc0ffee`, base fingerprint "
        "`0123456789abcdef`)",
        "| rank | 7 |\n| rate | 0.0003 |\n| steps | 417 |\n| seed | 42 |",
        "| tokens per second | 98.7 |\n| peak memory | 6.54 GB |",
        "| 0 | 3.2100 | 24.78 |\n| 1,417 | 1.5000 | 4.48 |",
    ):
        assert line in text
    assert f"> {SAFETY_NOTICE}" in text and "Not medical advice" in text


def test_a_pocket_adapter_does_not_claim_to_be_built_with_llama(settings):
    card = card_of(settings())
    assert card.text.startswith("\n# Llama-pocket-FirstAidQA-LoRA\n")
    assert card.data.license == "mit" and card.data.datasets is None
    assert card.data.base_model == "data/pocket_llama"
    assert "not Llama 3.2 1B" in card.text and "Built with Llama" not in card.text


def test_an_adapter_of_the_1b_names_its_licence_and_its_data(settings):
    house = settings(PROFILE="llama_1b")
    card = card_of(house)
    assert card.text.startswith("\n# Llama-3.2-1B-Instruct-FirstAidQA-LoRA\n")
    assert card.data.license == "llama3.2" and card.data.language == "en"
    assert card.data.library_name == "peft"
    assert card.data.base_model == "unsloth/Llama-3.2-1B-Instruct"
    assert card.data.datasets == ["i-am-mushfiq/FirstAidQA"]
    assert card.data.tags == ["lora", "first-aid"]
    assert "Built with Llama." in card.text

    general = card_of(house, adapter="finetome")
    assert general.text.startswith("\n# Llama-3.2-1B-Instruct-FineTome-LoRA\n")
    assert general.data.datasets == ["mlabonne/FineTome-100k"]


def test_data_of_ones_own_is_not_called_first_aid_qa(settings, tmp_path):
    (tmp_path / "mine.jsonl").write_text("")
    mine = settings(PROFILE="llama_1b", FIRST_AID_DATASET=tmp_path / "mine.jsonl")
    card = card_of(mine)
    assert card.data.datasets is None
    assert "tuned on `mine.jsonl`" in card.text


def test_a_name_begins_with_llama(settings, tiny_folder):
    named = publish.adapter_name(settings(BASE_MODEL=tiny_folder), "finetome")
    assert named == f"Llama-{tiny_folder.name}-FineTome-LoRA"


def test_scores_are_added_to_the_card_once_there_are_some(settings, tuned):
    house = settings()
    folder = models.adapter_dir(house, "first_aid")
    publish.save_adapter(tuned, folder, house, INFO, EVALUATIONS)
    log = results.training_log(house, "first_aid")
    results.write_lines(log, [{"step": 1, "loss": 2.0}, *EVALUATIONS])
    before = (folder / "README.md").read_text("utf-8")
    assert "Not measured yet" in before
    publish.refresh_card(house, "first_aid")
    assert (folder / "README.md").read_text("utf-8") == before

    cell = {"n": 99, "rougeL_f1": 0.321, "rougeL_f1_low": 0.3, "rougeL_f1_high": 0.345}
    scores = {"first_aid": {"first_aid": {"original": cell}}}  # as notebook 05 writes
    results.write_json(house.run_dir / "scores.json", scores)
    publish.refresh_card(house, "first_aid")
    after = (folder / "README.md").read_text("utf-8")
    line = "ROUGE-L F1 0.321 (95 % interval 0.300 to 0.345) on 99 held-out first-aid"
    assert line in after and "Not measured" not in after


# --- the merged model -----------------------------------------------------------------


def test_the_merged_model_answers_as_base_and_adapter(
    settings, tuned, tiny_folder, tmp_path
):
    house = settings(BASE_MODEL=tiny_folder, LOAD_IN_4BIT=1)  # merging takes no 4-bit
    adapter = models.adapter_dir(house, "first_aid")
    publish.save_adapter(tuned, adapter, house, INFO)
    folder = publish.merge(house, "first_aid", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(merged.config, "quantization_config")
    assert torch.allclose(logits(merged), logits(tuned), atol=1e-4)
    assert not torch.allclose(logits(merged), logits(models.load_base(house)), atol=0.1)
    assert (folder / "model.safetensors").is_file()
    tokenizer = models.load_tokenizer(str(folder))
    written = (folder / "Modelfile").read_text("utf-8")
    assert written == publish.modelfile(tokenizer, "first_aid")


def test_without_an_adapter_there_is_nothing_to_merge(settings, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        publish.merge(settings(), "first_aid", tmp_path / "merged")


@pytest.mark.parametrize("template", ["the pocket's", "Llama 3.2's"])
def test_the_modelfile_asks_as_the_model_was_trained(tiny_folder, template):
    tokenizer = models.load_tokenizer(str(tiny_folder))
    if template == "Llama 3.2's":
        file = Path(trl.__file__).parent / "chat_templates" / "llama3_2.jinja"
        tokenizer.chat_template = file.read_text("utf-8")
    text = publish.modelfile(tokenizer, "first_aid")
    rendered = text.split('TEMPLATE """')[1].split('"""')[0]
    system = text.split('SYSTEM """')[1].split('"""')[0]
    question = "What helps against a burn?"
    for field, value in {
        "{{ .System }}": system,
        "{{ .Prompt }}": question,
        "{{ .Response }}": "Cool it.",
    }.items():
        assert rendered.count(field) == 1
        rendered = rendered.replace(field, value)
    messages = prompts.first_aid_messages(question)
    asked = prompts.prompt_text(tokenizer, messages)
    assert asked.startswith("<|begin_of_text|>")  # which Ollama puts in front itself
    assert rendered == f"{asked.removeprefix('<|begin_of_text|>')}Cool it.<|eot_id|>"
    lines = text.splitlines()
    assert lines[0] == f"# {SAFETY_NOTICE}" and lines[1] == "FROM ."
    assert "PARAMETER stop <|eot_id|>" in lines and "PARAMETER temperature 0" in lines


# --- the Hub --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["me/First-Aid", "Llama-3.2-1B-FirstAid", "/Llama-x"])
def test_a_name_against_the_licence_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="write owner/name, with a name that begins"):
        publish.push(tmp_path, name)


@pytest.mark.parametrize("offline", [True, False])  # told so, or found to be
def test_without_the_hub_the_folder_stays_and_can_be_uploaded_later(
    tmp_path, monkeypatch, offline
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RuntimeError, match=f"…/{tmp_path.name} is complete and can be"):
        publish.push(tmp_path, "me/Llama-3.2-1B-FirstAidQA-LoRA")
