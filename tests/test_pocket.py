"""The embedded base: its text, its making, and the files that are committed."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from utils import (
    dataset,
    grammar,
    models,
    pocket,
    pocket_card,
    pocket_evaluation,
    prompts,
    results,
    sources,
)
from utils.config import POCKET, PROFILES, load_settings

RECORD = {"name": "hammer", "a": "a hammer"}
OTHER = {"name": "saw", "a": "a saw"}
TINY = pocket.Recipe(
    vocabulary=512, hidden=64, layers=1, feed_forward=64, steps=3, tuning_steps=2
)


def expand(template: str) -> str:
    domain = grammar.Grammar({"records": [RECORD, OTHER]})
    return domain.expand(template, RECORD, random.Random(1), {})


def test_templates_are_filled():
    assert expand("{^a} is [not |]{name}").removeprefix("A hammer is ") in (
        "hammer",
        "not hammer",
    )
    assert expand("{other.a} and {name}") == "a saw and hammer"
    assert expand("[[a|b]|[c]]") in ("a", "b", "c")


def test_a_listed_word_stays_the_same_within_a_text():
    first, again, second = expand("<person> <person> <person2>").split()
    assert first == again != second


def test_unbalanced_brackets_are_named():
    with pytest.raises(ValueError, match="unbalanced brackets"):
        expand("[a|b")


def test_held_out_texts_are_never_trained_on():
    grammars = grammar.load_grammars()
    streams = [grammar.texts(grammars, seed=3, held_out=h) for h in (False, True)]
    trained, held_out = ({json.dumps(next(s)) for _ in range(1500)} for s in streams)
    assert not trained & held_out


def test_the_same_seed_gives_the_same_weights(tmp_path):
    for folder in ("one", "two"):
        pocket.make(TINY, tmp_path / folder, ngram_tokens=2000)
    one, two = (load_file(tmp_path / f / "model.safetensors") for f in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    card = (tmp_path / "one" / "README.md").read_text("utf-8")
    record = results.read_json(tmp_path / "one" / pocket_card.MAKING)
    assert "512, byte-level BPE" in card
    assert f"{record['held_out']['perplexity']:.2f} after it" in card
    assert f"reaches {record['ngram']['perplexity']:.1f} on" in card
    assert record["ngram"]["tokens"] == record["held_out"]["tokens"]  # the same answers


def test_held_out_questions_are_asked_once_each():
    chats = pocket_evaluation.held_out_chats(grammar.load_grammars(), 50)
    questions = [chat[-2]["content"] for chat in chats]
    assert len(set(questions)) == 50
    assert all(chat[-1]["role"] == "assistant" for chat in chats)


def test_an_ngram_model_is_sure_of_what_it_has_counted():
    grammars = grammar.load_grammars()
    tokenizer = models.load_tokenizer("data/pocket_llama")
    asked = pocket_evaluation.held_out_chats(grammars, 20)
    other = grammar.texts(grammars, seed=1)
    known, unknown = (
        pocket_evaluation.ngram_perplexity(tokenizer, grammars, stream, 1000, n=20)
        for stream in (iter(asked * 50), other)
    )
    assert known["perplexity"] < unknown["perplexity"] / 10
    assert known["rows"] == unknown["rows"] == 20


def test_habits_count_what_ends_and_what_repeats(tiny_model, tiny_tokenizer):
    grammars = grammar.load_grammars()

    def asked(token: str) -> dict:
        """What a model does that says `token` for ever."""
        head = torch.nn.Linear(64, 384)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        wanted = tiny_tokenizer(token, add_special_tokens=False)["input_ids"][-1]
        head.bias.data[wanted] = 1.0
        tiny_model.lm_head = head
        return pocket_evaluation.habits(
            tiny_model, tiny_tokenizer, grammars, cap=12, n=4
        )

    ends, repeats = asked("<|eot_id|>"), asked(" a")
    assert (ends["ended"], ends["repeats"], ends["words"]) == (1.0, 0.0, 0.0)
    assert (repeats["ended"], repeats["repeats"], repeats["words"]) == (0.0, 1.0, 12.0)
    assert repeats["different"] == 0.25


def test_the_committed_card_says_what_its_records_say(tmp_path):
    for file in POCKET.iterdir():
        if file.is_file() and file.suffix in (".json", ".jsonl"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    rendered = pocket_card.write_card(tmp_path).read_text("utf-8")
    assert rendered == (POCKET / "README.md").read_text("utf-8"), (
        "the card and its records have drifted apart: python -m utils.pocket --card"
    )


def test_thirty_answers_are_judged_and_none_is_left_out():
    source = sources.load_source(PROFILES["pocket"].first_aid)
    test = dataset.split_rows(source, progress=False).test
    judged = results.read_lines(POCKET / pocket_card.JUDGED)
    asked = [row["question"] for row in test[:30]]
    assert [row["question"] for row in judged] == asked
    assert len({row["judgement"] for row in judged}) == 30
    assert all(row["base"].strip() and row["tuned"].strip() for row in judged)


def test_the_committed_model_speaks_better_than_five_grams():
    record = results.read_json(POCKET / pocket_card.MAKING)
    assert record["held_out"]["perplexity"] < 0.9 * record["ngram"]["perplexity"]
    assert record["habits"]["ended"] >= 0.95 and record["habits"]["repeats"] <= 0.05


def test_the_committed_model_is_a_small_llama():
    config = AutoConfig.from_pretrained(POCKET)
    assert config.model_type == "llama" and config.tie_word_embeddings
    for size in (config.hidden_size, config.intermediate_size, config.vocab_size):
        assert size % 64 == 0
    assert config.num_key_value_heads < config.num_attention_heads
    files = [f for f in POCKET.iterdir() if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 12_000_000
    assert not list(POCKET.rglob("*.bin"))


def test_its_chat_format_is_llama_3s():
    tokenizer = models.load_tokenizer("data/pocket_llama")
    text = prompts.prompt_text(tokenizer, prompts.first_aid_messages("Why?"))
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "You are a certified first aid assistant.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_the_shipped_adapters_fit_and_say_what_made_them(tmp_path):
    settings = load_settings({"PROFILE": "pocket", "RUN_DIR": str(tmp_path)})
    model, _ = models.load_three_models(settings, verbose=False)
    assert set(model.peft_config) == set(models.ADAPTERS)
    for name in models.ADAPTERS:
        info = models.read_adapter_info(models.find_adapter(settings, name).path)
        assert info["profile"] == "pocket" and info["data_fingerprint"]
        assert info["max_steps"] is None
