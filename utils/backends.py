"""Where the chat's answers come from: here, from one base with two adapters.

`utils.remote` has the other back end, with the same `stream`.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

from utils.config import Settings
from utils.generation import stream_answer
from utils.models import load_three_models, use_model

LOOK_UP_S = 0.25  # how often a waiting answer looks whether it was stopped meanwhile


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn; temperature 0 is greedy."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 0.95
    seed: int = 42


@dataclass(frozen=True)
class Progress:
    """An answer so far, its tokens, and the seconds to the first one and in all.

    `note` says what an answer without text waits for.
    """

    text: str
    tokens: int
    first_token_s: float
    seconds: float
    note: str = ""


class Backend(Protocol):
    """What the chat needs of whatever answers.

    `at_once` is how many answers may grow at a time; `about` says in a few words what
    answers.
    """

    at_once: int
    about: str

    def stream(
        self,
        key: str,
        messages: Sequence[Mapping],
        sampling: Sampling,
        token: str | None = None,
    ) -> Iterator[Progress]:
        """Yield the growing answer of model `key`; closing the iterator stops it.

        Raises:
            RuntimeError: the answer broke off; the message says why and what to do.
        """
        ...


class LocalBackend:
    """Transformers and PEFT in this process; one lock decides whose turn it is.

    Adapters are switched on the one model in memory, so two answers at a time would
    get each other's adapter.
    """

    at_once = 1

    def __init__(self, settings: Settings, *, load: bool = True):
        """Load the three models now, or with `load=False` for the first question."""
        self.settings = settings
        self.about = f"this machine ({settings.profile} profile)"
        self.lock = Lock()
        self.model = self.tokenizer = None
        if load:
            self._load()

    def _load(self) -> None:
        if self.model is None:
            self.model, self.tokenizer = load_three_models(self.settings)

    def stream(
        self,
        key: str,
        messages: Sequence[Mapping],
        sampling: Sampling,
        token: str | None = None,
    ) -> Iterator[Progress]:
        """As `Backend.stream`; no token is needed here."""
        asked = time.perf_counter()
        while not self.lock.acquire(timeout=LOOK_UP_S):
            # Where it yields, a stopped or closed chat can leave the queue.
            waited = time.perf_counter() - asked
            yield Progress("", 0, 0.0, waited, "waits for its turn")
        try:
            if self.model is None:
                yield Progress("", 0, 0.0, 0.0, "loads the models")
                self._load()
            yield from self._generate(key, messages, sampling)
        finally:
            self.lock.release()

    def _generate(
        self, key: str, messages: Sequence[Mapping], sampling: Sampling
    ) -> Iterator[Progress]:
        with use_model(self.model, key) as model:
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
