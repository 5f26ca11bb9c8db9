"""What the chat asks of whatever answers: Transformers, an engine, or an endpoint.

Nothing heavy is imported here, so that each back end brings only what it needs.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

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


def wait_for_turn(lock: Lock) -> Iterator[Progress]:
    """Take `lock`, yielding while somebody else has it.

    Where it yields, a stopped or closed chat can leave the queue. Whoever runs it to
    its end holds the lock.
    """
    asked = time.perf_counter()
    while not lock.acquire(timeout=LOOK_UP_S):
        waited = time.perf_counter() - asked
        yield Progress("", 0, 0.0, waited, "waits for its turn")
