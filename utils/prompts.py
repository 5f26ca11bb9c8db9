"""The only place where text becomes a chat prompt: training, evaluation and chat.

A prompt and its answer are cut into tokens separately and then joined, so that the
tokens a model is trained on are the very tokens it will be asked to continue.
"""

from collections.abc import Mapping, Sequence

# Llama 3.2's template writes "today" into every prompt. A fixed day keeps prompts,
# fingerprints and resumed runs the same tomorrow.
DATE = "26 Jul 2024"
IGNORED = -100  # the label that PyTorch's cross-entropy leaves out

SYSTEM_PROMPTS = {
    "first_aid": "You are a certified first aid assistant.",
    "finetome": "You are a helpful assistant.",
}


def first_aid_messages(question: str, answer: str | None = None) -> list[dict]:
    """A first-aid question, and its answer if there is one, as chat messages."""
    messages = [
        {"role": "system", "content": SYSTEM_PROMPTS["first_aid"]},
        {"role": "user", "content": question},
    ]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return messages


def row_messages(row: Mapping) -> list[dict]:
    """The chat messages of a row of either kind (see `utils.dataset`).

    A conversation keeps its own system prompt; one without gets FineTome's.
    """
    if "messages" not in row:
        return first_aid_messages(row["question"], row["answer"])
    messages = list(row["messages"])
    if messages[0]["role"] != "system":
        system = {"role": "system", "content": SYSTEM_PROMPTS["finetome"]}
        messages.insert(0, system)
    return messages


def prompt_text(tokenizer, messages: Sequence[Mapping]) -> str:
    """`messages` in the model's chat format, up to where the answer begins."""
    return tokenizer.apply_chat_template(
        list(messages),
        tokenize=False,
        add_generation_prompt=True,
        date_string=DATE,
    )


def encode(tokenizer, messages: Sequence[Mapping]) -> dict[str, list[int]]:
    """Tokens of a conversation and which of them are trained.

    Args:
        tokenizer: a Transformers tokenizer with a chat template.
        messages: they end with the assistant's turn.

    Returns:
        `input_ids` and `labels`, of equal length. A label is the token's own id
        inside an answer (its end-of-turn token included) and -100 elsewhere.

    Raises:
        ValueError: the template rewrites earlier turns, or nothing is to be learnt.
    """
    input_ids, labels = [], []
    done = ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = prompt_text(tokenizer, messages[:turn])
        through = tokenizer.apply_chat_template(
            list(messages[: turn + 1]), tokenize=False, date_string=DATE
        )
        if not (before.startswith(done) and through.startswith(before)):
            raise ValueError(
                "the chat template does not only append turns; the mask would be wrong"
            )
        for text, trained in (
            (before[len(done) :], False),
            (through[len(before) :], True),
        ):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            input_ids += ids
            labels += ids if trained else [IGNORED] * len(ids)
        done = through
    if all(label == IGNORED for label in labels):
        raise ValueError(f"no answer to learn in {list(messages)!r}")
    return {"input_ids": input_ids, "labels": labels}


def encode_rows(
    tokenizer, rows: Sequence[Mapping], context_length: int
) -> tuple[list[dict], int]:
    """Encode `rows`, leaving out those that do not fit into `context_length` tokens.

    A cut answer would teach the model to stop in mid-sentence, so a row that is too
    long is left out whole.

    Returns:
        The encoded rows, and how many were left out.

    Raises:
        ValueError: there are no rows, or none fits.
    """
    if not rows:
        raise ValueError("there are no rows to encode; was the split empty?")
    encoded = [encode(tokenizer, row_messages(row)) for row in rows]
    kept = [row for row in encoded if len(row["input_ids"]) <= context_length]
    if not kept:
        shortest = min(len(row["input_ids"]) for row in encoded)
        raise ValueError(
            f"not one of {len(encoded)} rows fits into {context_length} tokens; the "
            f"shortest has {shortest}. Raise the context length."
        )
    return kept, len(encoded) - len(kept)


def mask_table(tokenizer, encoded: Mapping, width: int = 76) -> str:
    """The text of an encoded row with what is trained between ⟦ and ⟧, wrapped."""
    pieces, run, state = [], [], None
    for token, label in [*zip(encoded["input_ids"], encoded["labels"]), (None, None)]:
        trained = None if token is None else label != IGNORED
        if trained != state and run:
            text = tokenizer.decode(run)
            pieces.append(f"⟦{text}⟧" if state else text)
            run = []
        state = trained
        if token is not None:
            run.append(token)
    lines = []
    for line in "".join(pieces).splitlines():
        while len(line) > width:
            cut = line.rfind(" ", 0, width)
            cut = cut if cut > 0 else width
            lines.append(line[:cut])
            line = line[cut:].lstrip()
        lines.append(line)
    return "\n".join(lines)
