"""How well the pocket Llama speaks, on texts it never learnt from.

Held-out texts are whole hand-written pieces, and pairs of a record and a template, that
`utils.grammar.texts` never yields for training.
"""

import math
from collections.abc import Iterator, Sequence

from nltk.lm import WittenBellInterpolated
from nltk.util import everygrams
from tqdm.auto import tqdm

from utils import prompts
from utils.generation import answer_nll, generate_answers
from utils.grammar import Grammar, texts
from utils.metrics import perplexity, repeats_ngram

HELD_OUT_SEED = 7


def encode(tokenizer, text: str | list[dict]) -> dict[str, list[int]]:
    """Tokens of a piece of prose, all of them trained, or of a chat (its answers)."""
    if isinstance(text, str):
        ids = tokenizer(tokenizer.bos_token + text + "<|end_of_text|>")["input_ids"]
        return {"input_ids": ids, "labels": list(ids)}
    return prompts.encode(tokenizer, text)


def held_out_chats(grammars: Sequence[Grammar], n: int) -> list[list[dict]]:
    """`n` held-out chats of one question each, no two with the same question."""
    found: dict[str, list[dict]] = {}
    for text in texts(grammars, HELD_OUT_SEED, held_out=True):
        if not isinstance(text, str):
            question = next(m["content"] for m in text if m["role"] == "user")
            found.setdefault(question, text)
        if len(found) == n:
            return list(found.values())
    raise AssertionError("the stream has no end")


def held_out_perplexity(
    model, tokenizer, grammars: Sequence[Grammar], n: int = 300
) -> dict[str, float]:
    """Token-weighted perplexity of the answers in `n` held-out chats.

    Returns:
        As `utils.metrics.perplexity`, and `bits_per_byte`: the same loss over the
        answers' UTF-8 bytes, which compares models of different vocabularies.
    """
    chats = held_out_chats(grammars, n)
    found = perplexity(answer_nll(model, [encode(tokenizer, c) for c in chats]))
    written = sum(len(chat[-1]["content"].encode()) for chat in chats)
    bits = found["nll"] * found["tokens"] / math.log(2)
    return {**found, "bits_per_byte": bits / written}


def ngram_perplexity(
    tokenizer,
    grammars: Sequence[Grammar],
    training_texts: Iterator,
    tokens: int,
    *,
    order: int = 5,
    n: int = 300,
) -> dict[str, float]:
    """The same perplexity of a smoothed n-gram model of the same training text.

    Interpolated Witten-Bell smoothing (Chen and Goodman 1999), as NLTK has it.

    Args:
        tokenizer: the model's.
        grammars: the text's domains.
        training_texts: the stream that the model was trained on.
        tokens: how many of its tokens to count.
        order: words in the longest n-gram.
        n: held-out chats.
    """
    counted = 0

    def sentences() -> Iterator:
        nonlocal counted
        yield [(word,) for word in words]  # so that none is unseen
        with tqdm(total=tokens, desc=f"{order}-grams", unit="token") as bar:
            while counted < tokens:
                ids = encode(tokenizer, next(training_texts))["input_ids"]
                counted += len(ids)
                bar.update(len(ids))
                yield everygrams([words[i] for i in ids], max_len=order)

    words = [str(token) for token in range(len(tokenizer))]  # NLTK takes no numbers
    model = WittenBellInterpolated(order)
    model.fit(sentences(), vocabulary_text=words)
    losses = []
    for chat in held_out_chats(grammars, n):
        row = encode(tokenizer, chat)
        ids, loss, count = [words[i] for i in row["input_ids"]], 0.0, 0
        for place, label in enumerate(row["labels"]):
            if label != prompts.IGNORED:
                context = tuple(ids[max(0, place - order + 1) : place])
                loss -= math.log(model.score(words[label], context))
                count += 1
        losses.append((loss, count))
    return {**perplexity(losses), "order": order, "training_tokens": counted}


def habits(
    model, tokenizer, grammars: Sequence[Grammar], *, cap: int, n: int = 200
) -> dict[str, float]:
    """How answers to `n` held-out prompts behave, decoded greedily up to `cap` tokens.

    Returns:
        Shares of the answers: `ended` by themselves, `repeats` some four words three
        times, and `different` from every other answer; `words`, their mean length.
    """
    asked = [chat[:-1] for chat in held_out_chats(grammars, n)]
    rows = generate_answers(model, tokenizer, asked, max_new_tokens=cap, progress=None)
    answers = [row["answer"] for row in rows]
    return {
        "prompts": n,
        "cap": cap,
        "ended": sum(not row["hit_cap"] for row in rows) / n,
        "repeats": sum(map(repeats_ngram, answers)) / n,
        "different": len(set(answers)) / n,
        "words": sum(len(answer.split()) for answer in answers) / n,
    }
