"""Where the chat's answers come from: here, from one base with two adapters.

`utils.remote` and `utils.openvino_engine` have the others, with the same `stream`.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from threading import Lock

from utils.config import Settings
from utils.generation import stream_answer
from utils.models import load_three_models, use_model
from utils.protocol import Backend, Progress, Sampling, wait_for_turn

__all__ = ["Backend", "LocalBackend", "Progress", "Sampling"]


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
        yield from wait_for_turn(self.lock)
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
