"""Precision, the base and its adapters: which one answers, and what is refused."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from utils import adapters, models, prompts
from utils.config import ROOT
from utils.generation import answer_nll, generate_answers

MESSAGES = prompts.first_aid_messages("What should I do about a burn?")


def lively(model, tokenizer):
    """A copy of `model` that says something: random words, and never an end.

    With tied random embeddings a model repeats its last token for ever. Its own
    output layer, with nothing in it for tokens that are not plain words, ends that.
    """
    torch.manual_seed(11)
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    config.initializer_range = 0.3
    fresh = type(model)(config).eval()
    with torch.no_grad():
        for token in range(config.vocab_size):
            text = tokenizer.decode([token])
            if not text.strip().isalpha() or not text.isascii():
                fresh.lm_head.weight[token] = 0
    fresh.generation_config = copy.deepcopy(model.generation_config)
    return fresh


def save_three(folder, model, tokenizer, **info):
    """Save a base and two random adapters as a run would; returns base and run."""
    base, run = folder / "base", folder / "run"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    for seed, name in enumerate(models.ADAPTERS, start=1):
        torch.manual_seed(seed)
        lora = LoraConfig(
            r=4,
            lora_alpha=32,
            target_modules=["q_proj", "v_proj", "down_proj"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        adapted = get_peft_model(copy.deepcopy(model), lora)
        adapted.save_pretrained(run / "adapters" / name)
        about = {"base_model": "base", **info}
        (run / "adapters" / name / models.ADAPTER_INFO).write_text(json.dumps(about))
    return base, run


@pytest.fixture
def lively_model(tiny_model, tiny_tokenizer):
    return lively(tiny_model, tiny_tokenizer)


@pytest.fixture
def three(tmp_path, lively_model, tiny_tokenizer, settings):
    """Settings of a run that has its own base and both adapters."""
    base, run = save_three(tmp_path, lively_model, tiny_tokenizer)
    return settings(BASE_MODEL=base, RUN_DIR=run)


def ask(model, tokenizer):
    return generate_answers(
        model, tokenizer, [MESSAGES], max_new_tokens=12, progress=None
    )[0]["answer"]


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((7, 5), torch.float16, "compute capability 7.5 < 8.0"),
        ((7, 0), torch.float16, "compute capability 7.0 < 8.0"),
        ((8, 0), torch.bfloat16, "compute capability 8.0 ≥ 8.0"),
        ((9, 0), torch.bfloat16, "compute capability 9.0 ≥ 8.0"),
        ((12, 0), torch.bfloat16, "compute capability 12.0 ≥ 8.0"),
        ((0, 0), torch.float32, "no GPU"),
    ],
)
def test_precision_follows_the_compute_capability(capability, dtype, reason):
    found = models.choose_precision(capability)
    assert found.dtype == dtype
    assert reason in found.reason


def test_a_t4_that_claims_bfloat16_gets_float16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    assert models.choose_precision().dtype == torch.float16


def test_without_a_gpu_the_precision_is_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert models.choose_precision().dtype == torch.float32


@pytest.mark.parametrize(
    ("capability", "on"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((0, 0), "use_cpu")]
)
def test_the_trainer_gets_exactly_one_precision(capability, on):
    flags = models.choose_precision(capability).trainer_flags
    assert set(flags) == {"fp16", "bf16", "use_cpu"}
    assert [name for name, value in flags.items() if value] == [on]


def test_tokenizer_pads_left_and_has_a_pad_token(three):
    tokenizer = models.load_tokenizer(three.base_model)
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token


def test_tokenizer_without_pad_token_gets_one_that_is_trained_away(
    tmp_path, tiny_tokenizer
):
    bare = copy.deepcopy(tiny_tokenizer)
    bare.pad_token = None
    bare.padding_side = "right"
    bare.save_pretrained(tmp_path)
    tokenizer = models.load_tokenizer(str(tmp_path))
    known = "<|finetune_right_pad_id|>" in bare.get_vocab()
    expected = "<|finetune_right_pad_id|>" if known else bare.eos_token
    assert tokenizer.pad_token == expected
    assert tokenizer.padding_side == "left"


def test_tokenizer_without_chat_template_is_refused(tmp_path, tiny_tokenizer):
    bare = copy.deepcopy(tiny_tokenizer)
    bare.chat_template = None
    bare.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no chat template; use an Instruct one"):
        models.load_tokenizer(str(tmp_path))


def test_a_folder_without_a_model_is_refused_with_advice(tmp_path, settings):
    with pytest.raises(OSError, match="cannot be loaded.*config.json"):
        models.load_base(settings(BASE_MODEL=tmp_path))


def test_a_pickled_base_is_refused(tmp_path, tiny_model, settings):
    tiny_model.config.save_pretrained(tmp_path)
    torch.save(tiny_model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        models.load_base(settings(BASE_MODEL=tmp_path))


def test_the_runs_own_adapter_comes_first(three):
    found = models.find_adapter(three, "first_aid")
    assert found.path == three.run_dir / "adapters" / "first_aid"
    assert found.origin.startswith("this run's")


def test_a_shipped_adapter_is_taken_for_the_pocket_base_and_said(
    tmp_path, settings, monkeypatch
):
    pocket = tmp_path / "pocket_llama"
    (pocket / "adapters" / "finetome").mkdir(parents=True)
    monkeypatch.setattr(adapters, "POCKET", pocket)
    run = settings(BASE_MODEL=pocket)
    found = models.find_adapter(run, "finetome")
    assert found.path == pocket / "adapters" / "finetome"
    assert "shipped" in found.origin and "none yet" in found.origin
    other = settings(BASE_MODEL=tmp_path)
    with pytest.raises(FileNotFoundError):  # of no use to another base
        models.find_adapter(other, "finetome")


@pytest.mark.parametrize(
    ("name", "notebook"),
    [
        ("first_aid", "02_fine_tune_on_first_aid"),
        ("finetome", "03_fine_tune_on_finetome"),
    ],
)
def test_a_missing_adapter_names_the_notebook_to_run(
    tmp_path, settings, name, notebook
):
    with pytest.raises(FileNotFoundError) as caught:
        models.find_adapter(settings(BASE_MODEL="nobody/nothing"), name)
    assert f"Run notebooks/{notebook}.ipynb first" in str(caught.value)
    assert (ROOT / "notebooks" / f"{notebook}.ipynb").is_file()


def test_an_adapter_of_another_base_is_refused(
    tmp_path, tiny_model, tiny_tokenizer, settings
):
    base, run = save_three(
        tmp_path, tiny_model, tiny_tokenizer, base_fingerprint="0123456789abcdef"
    )
    with pytest.raises(ValueError, match="trained on another base .*0123456789abcdef"):
        models.load_three_models(settings(BASE_MODEL=base, RUN_DIR=run))


def test_a_fingerprint_follows_the_weights(three, tmp_path, tiny_model, settings):
    base = models.load_base(three)
    one = models.base_fingerprint(three, base)
    assert one == models.base_fingerprint(three, base)
    changed = copy.deepcopy(tiny_model)
    with torch.no_grad():
        changed.lm_head.weight[0, 0] += 1
    changed.save_pretrained(tmp_path / "other")
    other = settings(BASE_MODEL=tmp_path / "other")
    assert models.base_fingerprint(other, changed) != one


def test_an_adapter_with_the_right_fingerprint_is_taken(three, capsys):
    fingerprint = models.base_fingerprint(three, models.load_base(three))
    for name in models.ADAPTERS:
        info = models.adapter_dir(three, name) / models.ADAPTER_INFO
        info.write_text(json.dumps({"base_fingerprint": fingerprint}))
    model, _ = models.load_three_models(three)
    assert sorted(model.peft_config) == sorted(models.ADAPTERS)
    said = capsys.readouterr().out
    assert "FirstAidQA adapter: this run's" in said
    assert "FineTome adapter: this run's" in said


def test_a_pickled_adapter_is_refused(three):
    folder = models.adapter_dir(three, "finetome")
    weights = folder / "adapter_model.safetensors"
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises((ValueError, FileNotFoundError), match="finetome"):
        models.load_three_models(three)


def test_use_model_switches_and_the_base_stays_the_base(three, lively_model):
    model, tokenizer = models.load_three_models(three, verbose=False)
    expected = {"base": ask(lively_model, tokenizer)}
    for name in models.ADAPTERS:
        alone = PeftModel.from_pretrained(
            copy.deepcopy(lively_model), models.adapter_dir(three, name)
        ).eval()
        expected[name] = ask(alone, tokenizer)
    assert len(set(expected.values())) == 3, "the three must differ to tell a switch"
    for key in ("base", "first_aid", "finetome", "base", "finetome", "first_aid"):
        with models.use_model(model, key) as switched:
            assert ask(switched, tokenizer) == expected[key]


def test_base_is_the_base_again_after_an_error_inside(three, lively_model):
    model, tokenizer = models.load_three_models(three, verbose=False)
    with pytest.raises(InterruptedError), models.use_model(model, "base"):
        raise InterruptedError
    with models.use_model(model, "first_aid") as switched:
        tuned = ask(switched, tokenizer)
    with models.use_model(model, "base") as switched:
        assert ask(switched, tokenizer) == ask(lively_model, tokenizer) != tuned


def test_an_unknown_model_is_a_key_error_that_lists_the_known(three):
    model, _ = models.load_three_models(three, verbose=False)
    with (
        pytest.raises(KeyError, match="gpt.*base, first_aid, finetome"),
        models.use_model(model, "gpt"),
    ):
        pass


def test_four_bits_load_and_learn(three, settings):
    run = settings(BASE_MODEL=three.base_model, LOAD_IN_4BIT=1)
    assert run.load_in_4bit
    base = models.load_base(run, models.choose_precision((0, 0)))
    kinds = {type(module).__name__ for module in base.modules()}
    assert "Linear4bit" in kinds
    tokenizer = models.load_tokenizer(run.base_model)
    row = prompts.encode(
        tokenizer, [*MESSAGES, {"role": "assistant", "content": "Cool it."}]
    )
    torch.manual_seed(0)
    lora = LoraConfig(r=8, target_modules=["q_proj", "o_proj", "down_proj"])
    model = get_peft_model(base, lora)
    # An evaluation comes first: on some CPUs it would quietly end all learning.
    before = answer_nll(model, [row])[0][0]
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(2):  # in the first step only B moves, since it starts at zero
        optimizer.zero_grad()
        model(
            input_ids=torch.tensor([row["input_ids"]]),
            labels=torch.tensor([row["labels"]]),
        ).loss.backward()
        optimizer.step()
    gradients = {
        name: p.grad.abs().max().item()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    assert all(value > 0 for value in gradients.values()), gradients
    assert answer_nll(model, [row])[0][0] < before - 0.01
