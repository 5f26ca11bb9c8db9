"""The mask: which tokens are trained, and that they are those the chat will see."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from utils import prompts
from utils.dataset import load_source
from utils.prompts import IGNORED, encode, encode_rows, first_aid_messages

END = "<|eot_id|>"
QUESTION = "What should I do about a burn?"
ANSWER = "Cool it under running water for 20 minutes; then cover it — loosely."
TURNS = [
    {"role": "system", "content": "You are a patient assistant."},
    {"role": "user", "content": "Write a poem about the sea."},
    {"role": "assistant", "content": "The waves come in,\nthe waves go out."},
    {"role": "user", "content": "  Shorter?  "},
    {"role": "assistant", "content": " Waves! "},
    {"role": "user", "content": "Größer, with ü and 水?"},
    {"role": "assistant", "content": "Wäves: 水."},
]


def trained_runs(tokenizer, encoded) -> list[str]:
    """The text of each unbroken run of trained tokens."""
    assert len(encoded["input_ids"]) == len(encoded["labels"])
    runs, before = [], IGNORED
    for token, label in zip(encoded["input_ids"], encoded["labels"]):
        assert label in (IGNORED, token)
        if label != IGNORED and before == IGNORED:
            runs.append([])
        if label != IGNORED:
            runs[-1].append(token)
        before = label
    return [tokenizer.decode(run) for run in runs]


@pytest.fixture(params=["tiny", "llama"])
def tokenizer(request):
    """The toy tokenizer, and Llama 3's where REAL_TOKENIZER names it."""
    name = "tiny_tokenizer" if request.param == "tiny" else "real_tokenizer"
    return request.getfixturevalue(name)


def test_the_mask_is_the_answer_and_its_end(tokenizer):
    encoded = encode(tokenizer, first_aid_messages(QUESTION, ANSWER))
    assert trained_runs(tokenizer, encoded) == [ANSWER + END]
    # Everything before it carries -100, to the last token of the header.
    answer_length = sum(label != IGNORED for label in encoded["labels"])
    start = len(encoded["labels"]) - answer_length
    assert encoded["labels"][:start] == [IGNORED] * start
    assert tokenizer.decode(encoded["input_ids"][:start]).endswith(
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_every_answer_of_a_conversation_is_trained(tokenizer):
    encoded = encode(tokenizer, TURNS)
    assert trained_runs(tokenizer, encoded) == [
        f"The waves come in,\nthe waves go out.{END}",
        f"Waves!{END}",
        f"Wäves: 水.{END}",
    ]


def test_a_conversation_is_encoded_whole(tokenizer):
    whole = tokenizer.apply_chat_template(
        TURNS, tokenize=False, date_string=prompts.DATE
    )
    encoded = encode(tokenizer, TURNS)
    assert tokenizer.decode(encoded["input_ids"]) == whole


@pytest.mark.parametrize("messages", [first_aid_messages(QUESTION, ANSWER), TURNS])
def test_training_and_chat_see_the_same_prompt(tokenizer, messages):
    asked = prompts.prompt_text(tokenizer, messages[:-1])
    prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
    encoded = encode(tokenizer, messages)
    assert encoded["input_ids"][: len(prompt)] == prompt
    trained = encoded["labels"][len(prompt) :]
    assert IGNORED not in trained  # the answer begins right behind the prompt
    assert encoded["labels"][len(prompt) - 1] == IGNORED


def test_a_prompt_begins_once_and_ends_where_the_answer_begins(tokenizer):
    text = prompts.prompt_text(tokenizer, first_aid_messages(QUESTION))
    assert text.startswith("<|begin_of_text|>")
    assert text.count("<|begin_of_text|>") == 1
    assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert QUESTION + END in text
    assert "You are a certified first aid assistant." in text


def test_the_date_is_fixed(tiny_tokenizer):
    template = tiny_tokenizer.chat_template
    tiny_tokenizer.chat_template = "{{ date_string }}" + template
    try:
        text = prompts.prompt_text(tiny_tokenizer, first_aid_messages(QUESTION))
        encoded = encode(tiny_tokenizer, first_aid_messages(QUESTION, ANSWER))
    finally:
        tiny_tokenizer.chat_template = template
    assert text.startswith("26 Jul 2024<|begin_of_text|>")
    whole = tiny_tokenizer.decode(encoded["input_ids"])
    assert whole.startswith("26 Jul 2024<|begin_of_text|>")


def test_the_date_of_llama_is_fixed(real_tokenizer):
    text = prompts.prompt_text(real_tokenizer, first_aid_messages(QUESTION))
    assert "Today Date: 26 Jul 2024\n" in text


def test_a_template_that_rewrites_earlier_turns_is_refused(tiny_tokenizer):
    template = tiny_tokenizer.chat_template
    tiny_tokenizer.chat_template = "{{ messages | length }}" + template
    try:
        with pytest.raises(ValueError, match="does not only append turns"):
            encode(tiny_tokenizer, TURNS)
    finally:
        tiny_tokenizer.chat_template = template


def test_a_conversation_without_answer_is_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match="^no answer to learn in .*about a burn"):
        encode(tiny_tokenizer, first_aid_messages(QUESTION))


def test_rows_of_both_kinds_become_messages():
    row = {"question": "Q?", "answer": "A.", "topic": "burns"}
    assert prompts.row_messages(row) == [
        {"role": "system", "content": "You are a certified first aid assistant."},
        {"role": "user", "content": "Q?"},
        {"role": "assistant", "content": "A."},
    ]
    own = {"messages": TURNS, "source": "x"}
    assert prompts.row_messages(own) == TURNS
    bare = {"messages": TURNS[1:3]}
    helpful = {"role": "system", "content": "You are a helpful assistant."}
    assert prompts.row_messages(bare) == [helpful, *TURNS[1:3]]
    assert bare["messages"] == TURNS[1:3]  # the row itself is left alone


def test_a_row_too_long_is_left_out_whole(tiny_tokenizer):
    short = {"question": "Burn?", "answer": "Cool it."}
    long = {"question": "Burn?", "answer": "Cool it. " * 50}
    length = len(encode(tiny_tokenizer, prompts.row_messages(short))["input_ids"])
    kept, left_out = encode_rows(tiny_tokenizer, [long, short, long], length)
    assert left_out == 2
    (row,) = kept
    assert len(row["input_ids"]) == length  # a row that just fits stays
    assert trained_runs(tiny_tokenizer, row) == ["Cool it." + END]


def test_it_is_refused_when_no_row_fits(tiny_tokenizer):
    rows = [{"question": "Burn?", "answer": "Cool it."}] * 3
    length = len(encode(tiny_tokenizer, prompts.row_messages(rows[0]))["input_ids"])
    with pytest.raises(ValueError) as caught:
        encode_rows(tiny_tokenizer, rows, length - 1)
    assert str(caught.value) == (
        f"not one of 3 rows fits into {length - 1} tokens; the shortest has {length}. "
        "Raise the context length."
    )


def test_no_rows_at_all_are_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match="^there are no rows to encode"):
        encode_rows(tiny_tokenizer, [], 512)


def test_the_mask_table_brackets_what_is_trained(tiny_tokenizer):
    encoded = encode(tiny_tokenizer, first_aid_messages(QUESTION, ANSWER))
    table = prompts.mask_table(tiny_tokenizer, encoded, width=40)
    assert all(len(line) <= 40 for line in table.splitlines())
    joined = " ".join(table.splitlines())
    assert joined.count("⟦") == joined.count("⟧") == 1
    assert joined[joined.index("⟦") + 1 : joined.index("⟧")] == ANSWER + END


def test_every_real_row_trains_its_answer_and_none_is_cut(
    real_first_aid, real_tokenizer
):
    rows = load_source(str(real_first_aid)).rows
    assert len(rows) == len(json.loads(real_first_aid.read_text("utf-8"))) == 5550
    encoded, left_out = encode_rows(real_tokenizer, rows, 2048)
    assert left_out == 0 and len(encoded) == len(rows)
    for row, found in zip(rows, encoded):
        assert trained_runs(real_tokenizer, found) == [row["answer"] + END]
        asked = prompts.prompt_text(real_tokenizer, first_aid_messages(row["question"]))
        prompt = real_tokenizer(asked, add_special_tokens=False)["input_ids"]
        assert found["input_ids"][: len(prompt)] == prompt
        assert found["labels"][: len(prompt)] == [IGNORED] * len(prompt)


def test_packed_rows_do_not_see_each_other(real_first_aid, real_tokenizer):
    """With positions and without a mask; a mask of ones would let them leak."""
    rows = load_source(str(real_first_aid)).rows[:12]
    encoded, _ = encode_rows(real_tokenizer, rows, 2048)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(real_tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,  # attention that really looks somewhere
        )
    ).eval()
    apart = [torch.tensor([row["input_ids"]]) for row in encoded]
    positions = [torch.arange(ids.shape[1])[None] for ids in apart]
    packed = dict(input_ids=torch.cat(apart, 1), position_ids=torch.cat(positions, 1))
    with torch.no_grad():
        alone = torch.cat([model(input_ids=ids).logits[0] for ids in apart])
        # As in training; with a cache, Transformers does not look for packed rows.
        together = model(**packed, use_cache=False).logits[0]
        ones = torch.ones_like(packed["input_ids"])
        leaking = model(**packed, attention_mask=ones, use_cache=False).logits[0]
    assert (alone - together).abs().max() < 1e-4
    assert (alone - leaking).abs().max() > 1e-2
