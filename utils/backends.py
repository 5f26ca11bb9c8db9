"""Where the chat's answers come from: here, from one base with two adapters."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock

from utils.config import Settings
from utils.generation import stream_answer
from utils.models import load_three_models, use_model


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn; temperature 0 is greedy."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 0.95
    seed: int = 42


@dataclass(frozen=True)
class Progress:
    """An answer so far, its tokens, and the seconds to the first one and in all."""

    text: str
    tokens: int
    first_token_s: float
    seconds: float


class LocalBackend:
    """Transformers and PEFT in this process; one lock decides whose turn it is.

    Adapters are switched on the one model in memory, so two answers at a time would
    get each other's adapter.
    """

    def __init__(self, settings: Settings):
        self.model, self.tokenizer = load_three_models(settings)
        self.lock = Lock()

    def stream(
        self, key: str, messages: Sequence[Mapping], sampling: Sampling
    ) -> Iterator[Progress]:
        """Yield the growing answer of model `key`; closing the iterator stops it."""
        with self.lock, use_model(self.model, key) as model:
            began = time.perf_counter()
            first = None
            generated = 0

            def on_token() -> None:
                nonlocal generated
                generated += 1

            for text in stream_answer(
                model,
                self.tokenizer,
                messages,
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=sampling.seed,
                on_token=on_token,  # cutting the text up anew may give another count
            ):
                now = time.perf_counter() - began
                first = now if first is None else first
                yield Progress(text, generated, first, now)
