"""What a model answers, in batches or streamed, and how well it predicts an answer."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from queue import Empty
from threading import Event, Thread

import torch
from tqdm.auto import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from utils.prompts import IGNORED, prompt_text

SILENCE_S = 120  # a streamed answer that says nothing for so long is given up
TOKENS_A_ROUND = 80  # most answers end before; then those rows leave the batch
POSITIONS_AT_ONCE = 512  # logits of 128,256 floats each: 0.26 GB in float32


def answer_batches(
    model,
    tokenizer,
    conversations: Sequence[Sequence[Mapping]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    done: Collection[int] = (),
    progress: str | None = "answer",
) -> Iterator[dict[int, dict]]:
    """Answer greedily, in left-padded batches sorted by length, batch by batch.

    Args:
        model: in evaluation mode, the wanted adapter on (`utils.models.use_model`).
        tokenizer: its tokenizer.
        conversations: lists of chat messages that end with a user's turn.
        max_new_tokens: the cap on an answer's length.
        batch_size: conversations at once.
        done: places in `conversations` that are answered already. The batches are
            cut before these are left out, so that a run that goes on pads the other
            batches as one that was never stopped.
        progress: the progress bar's label; None for no bar.

    Yields:
        By place in `conversations`, what `generate_answers` says of an answer.
    """
    prompts = [prompt_text(tokenizer, messages) for messages in conversations]
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    ends = _end_tokens(model, tokenizer)
    with tqdm(total=len(prompts), desc=progress, disable=progress is None) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            rows = [i for i in batch if i not in done]
            bar.update(len(batch) - len(rows))
            if not rows:
                continue
            began = time.perf_counter()
            texts = [prompts[i] for i in rows]
            given = generate_tokens(
                model, tokenizer, texts, max_new_tokens=max_new_tokens
            )
            seconds = (time.perf_counter() - began) / len(rows)
            answers = {}
            for i, ids in zip(rows, given):
                ended = ids[-1] in ends
                said = ids[:-1] if ended else ids
                answers[i] = {
                    "answer": tokenizer.decode(said, skip_special_tokens=True).strip(),
                    "tokens": len(ids),
                    "seconds": round(seconds, 4),
                    "hit_cap": not ended,
                }
            yield answers
            bar.update(len(rows))


def generate_tokens(
    model, tokenizer, texts: Sequence[str], *, max_new_tokens: int
) -> list[list[int]]:
    """The greedy continuation of every prompt in `texts`, as one padded batch.

    It goes in rounds, and a row that has ended leaves the batch: otherwise one long
    answer keeps the model busy with all the short ones.

    Returns:
        Token ids per prompt, up to the token that ends the turn, that one included;
        `max_new_tokens` of them where none came.
    """
    ends = _end_tokens(model, tokenizer)
    prompts = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    answers: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    while going:
        rows = [prompts[i] + answers[i] for i in going]
        batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        left = max_new_tokens - len(answers[going[0]])
        with torch.inference_mode():
            output = model.generate(
                **batch.to(model.device),
                do_sample=False,
                temperature=None,
                top_p=None,
                max_new_tokens=min(TOKENS_A_ROUND, left),
                eos_token_id=ends,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = output[:, batch["input_ids"].shape[1] :].tolist()
        for i, ids in zip(going, new):
            stop = next((n + 1 for n, t in enumerate(ids) if t in ends), None)
            answers[i] += ids[:stop]
        going = [
            i
            for i in going
            if answers[i][-1] not in ends and len(answers[i]) < max_new_tokens
        ]
    return answers


def generate_answers(
    model,
    tokenizer,
    conversations: Sequence[Sequence[Mapping]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    progress: str | None = "answer",
) -> list[dict]:
    """All answers of `answer_batches`, which says what the arguments are.

    Returns:
        In the order of `conversations`, dictionaries of `answer`, `tokens` (its
        length, the end-of-turn token included), `seconds` (of its batch, divided by
        the rows in it) and `hit_cap` (whether the cap cut it short).
    """
    answers: list[dict] = [{} for _ in conversations]
    for batch in answer_batches(
        model,
        tokenizer,
        conversations,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    ):
        for place, answer in batch.items():
            answers[place] = answer
    return answers


def stream_answer(
    model,
    tokenizer,
    messages: Sequence[Mapping],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 42,
    on_token: Callable[[], None] = lambda: None,
) -> Iterator[str]:
    """Yield the answer as it grows: each item is the whole text so far.

    Closing the iterator stops the computation. `temperature` 0 is greedy. `on_token`
    is called for every generated token, by the generating thread.

    Raises:
        RuntimeError: the generating thread failed; its error is the cause.
    """
    prompt = tokenizer(
        prompt_text(tokenizer, messages), add_special_tokens=False, return_tensors="pt"
    ).to(model.device)
    streamer = TextIteratorStreamer(
        tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=SILENCE_S
    )
    stopped = Event()
    failure: list[Exception] = []

    class Stopped(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            on_token()
            return torch.full(
                (len(input_ids),), stopped.is_set(), device=input_ids.device
            )

    sampling = {"do_sample": False, "temperature": None, "top_p": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}

    def run() -> None:
        try:
            torch.manual_seed(seed)
            with torch.inference_mode():
                model.generate(
                    **prompt,
                    **sampling,
                    max_new_tokens=max_new_tokens,
                    eos_token_id=_end_tokens(model, tokenizer),
                    pad_token_id=tokenizer.pad_token_id,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([Stopped()]),
                )
        except Exception as error:  # noqa: BLE001 - handed on to the reader below
            failure.append(error)
            streamer.end()

    thread = Thread(target=run, daemon=True)
    thread.start()
    text = ""
    try:
        for piece in streamer:
            text += piece
            yield text.strip()
    except Empty as error:
        raise RuntimeError(
            f"the answer broke off: no word for {SILENCE_S} s, the machine is too busy "
            "or the conversation too long"
        ) from error
    finally:
        stopped.set()
        thread.join()
    if failure:
        raise RuntimeError(f"the answer broke off: {failure[0]}") from failure[0]


def answer_nll(
    model,
    rows: Sequence[Mapping],
    *,
    batch_size: int = 16,
    progress: str | None = None,
) -> list[tuple[float, int]]:
    """Negative log-likelihood of each row's trained tokens, in nats.

    Arguments as `token_nll` takes them.

    Returns:
        Per row, in the order given, the sum over its labelled tokens and how many
        they are. Token-weighted perplexity is exp(sum of sums / sum of counts).
    """
    losses = token_nll(model, rows, batch_size=batch_size, progress=progress)
    return [(loss.sum().item(), len(loss)) for loss in losses]


def token_nll(
    model,
    rows: Sequence[Mapping],
    *,
    batch_size: int = 16,
    progress: str | None = None,
) -> list[torch.Tensor]:
    """Negative log-likelihood of every labelled token, in nats.

    Only the positions that carry a label are multiplied with the vocabulary, a few
    hundred at a time, so that logits are never held in full.

    Args:
        model: a causal language model, with or without adapters.
        rows: `input_ids` and `labels`, as `utils.prompts.encode` makes them.
        batch_size: rows at once; they are sorted by length.
        progress: the progress bar's label; None for no bar.

    Returns:
        Per row, in the order given, a float64 tensor with one value for each of its
        labelled tokens, on the CPU.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    result: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    device = next(causal.parameters()).device
    was_training = model.training
    model.eval()
    with (
        torch.inference_mode(),
        tqdm(total=len(rows), desc=progress, disable=progress is None) as bar,
    ):
        for start in range(0, len(order), batch_size):
            batch = [rows[i] for i in order[start : start + batch_size]]
            longest = max(len(row["input_ids"]) for row in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            labels = torch.full_like(ids, IGNORED)
            mask = torch.zeros_like(ids)
            for n, row in enumerate(batch):
                length = len(row["input_ids"])
                ids[n, :length] = torch.tensor(row["input_ids"])
                labels[n, :length] = torch.tensor(row["labels"])
                mask[n, :length] = 1
            hidden = causal.model(
                input_ids=ids.to(device), attention_mask=mask.to(device)
            ).last_hidden_state[:, :-1]
            targets = labels[:, 1:].to(device)
            wanted = targets != IGNORED
            states, tokens = hidden[wanted], targets[wanted]
            losses = torch.cat(
                [
                    torch.nn.functional.cross_entropy(
                        causal.lm_head(states[at : at + POSITIONS_AT_ONCE]).float(),
                        tokens[at : at + POSITIONS_AT_ONCE],
                        reduction="none",
                    )
                    for at in range(0, len(tokens), POSITIONS_AT_ONCE)
                ]
            )
            counts = wanted.sum(dim=1).tolist()
            for i, part in zip(
                order[start : start + batch_size], losses.split(counts), strict=True
            ):
                result[i] = part.double().cpu()
            bar.update(len(batch))
    model.train(was_training)
    return result


def _end_tokens(model, tokenizer) -> list[int]:
    """Every token that ends a turn, as the model's own generation config says."""
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    return sorted({*ends, tokenizer.eos_token_id})
