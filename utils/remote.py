"""Answers from a deployed endpoint or any OpenAI-compatible server, such as vLLM."""

import time
from collections.abc import Iterator, Mapping, Sequence
from queue import Empty, SimpleQueue
from threading import Event, Thread
from urllib.parse import urlsplit

from huggingface_hub import InferenceClient, get_session
from huggingface_hub.errors import (
    HfHubHTTPError,
    InferenceTimeoutError,
    OfflineModeIsEnabled,
    TextGenerationError,
)

from utils.protocol import LOOK_UP_S, Progress, Sampling

try:  # whichever of the two huggingface_hub is built on: 2.x on the one, 1.x the other
    import httpx2 as httpx
except ImportError:
    import httpx

WAIT_S = 60.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")
HTTP_ERRORS = (httpx.HTTPError, HfHubHTTPError, OfflineModeIsEnabled)


class RemoteBackend:
    """`huggingface_hub.InferenceClient` on one address that serves all three models."""

    at_once = 16

    def __init__(
        self,
        endpoint: str,
        names: Mapping[str, str],
        *,
        token: str | None = None,
        wait_s: float = WAIT_S,
    ):
        """Nothing is asked yet.

        Args:
            endpoint: the address, without `/v1`.
            names: what each of our models is called there.
            token: sent where the visitor brings none; never over plain http to
                another machine, where anybody on the way could read it.
            wait_s: the longest silence, before the first token and between two.
        """
        parts = urlsplit(endpoint)
        self.endpoint, self.names, self.wait_s = endpoint, dict(names), wait_s
        self.about = f"the endpoint at {parts.hostname}"
        self._private = parts.scheme == "https" or parts.hostname in LOOPBACK
        self._token = token

    def _key(self, token: str | None) -> str:
        # Servers that want none take this one; with None the client would send
        # whatever token is saved on this machine.
        return (token or self._token or "EMPTY") if self._private else "EMPTY"

    def check(self, timeout: float = 5.0) -> str:
        """Why no answer can be had there now; empty if one can."""
        try:
            get_session().get(
                f"{self.endpoint}/v1/models",
                headers={"authorization": f"Bearer {self._key(None)}"},
                timeout=timeout,
            ).raise_for_status()
        except httpx.HTTPStatusError as error:
            if error.response.status_code in (401, 403, 404):
                return ""  # it is there; a visitor may bring a token
            return self._explain(error, "")
        except HTTP_ERRORS as error:
            return self._explain(error, "")
        return ""

    def stream(
        self,
        key: str,
        messages: Sequence[Mapping],
        sampling: Sampling,
        token: str | None = None,
    ) -> Iterator[Progress]:
        """As `utils.protocol.Backend.stream`, with the visitor's `token` if there is.

        A thread reads, so that stopping works while the server is silent.
        """
        began = heard = time.perf_counter()
        said: SimpleQueue = SimpleQueue()
        stopped = Event()
        Thread(
            target=self._read,
            args=(key, list(messages), sampling, self._key(token), said, stopped),
            daemon=True,
        ).start()
        text, tokens, first = "", 0, 0.0
        try:
            while True:
                try:
                    piece, counted, ended = said.get(timeout=LOOK_UP_S)
                except Empty:
                    now = time.perf_counter()
                    if now - heard > self.wait_s:
                        raise RuntimeError(self._silent()) from None
                    if not text:
                        note = "waits for the endpoint"
                        yield Progress("", 0, 0.0, now - began, note)
                    continue
                heard = time.perf_counter()
                if isinstance(ended, RuntimeError):
                    raise ended
                if piece and not text:
                    first = heard - began
                text += piece
                tokens = counted or tokens
                if text.strip() or ended:
                    yield Progress(text.strip(), tokens, first, heard - began)
                if ended:
                    return
        finally:
            stopped.set()

    def _read(self, key, messages, sampling, token, said, stopped) -> None:
        """Put (text, tokens so far or 0, ended) into `said`; an error ends it too."""
        tokens, finished = 0, False
        greedy = sampling.temperature <= 0
        client = InferenceClient(
            base_url=self.endpoint, token=token, timeout=self.wait_s
        )
        try:
            with client:
                for chunk in client.chat_completion(
                    messages,
                    model=self.names[key],
                    stream=True,
                    stream_options={"include_usage": True},
                    max_tokens=sampling.max_new_tokens,
                    temperature=0.0 if greedy else sampling.temperature,
                    top_p=None if greedy else sampling.top_p,
                    seed=sampling.seed,
                ):
                    if stopped.is_set():
                        return  # leaving closes the connection, and the server stops
                    for choice in chunk.choices:
                        finished = finished or bool(choice.finish_reason)
                        if choice.delta.content:
                            tokens += 1  # until the server says how many they were
                            said.put((choice.delta.content, tokens, False))
                    if chunk.usage and chunk.usage.completion_tokens:
                        said.put(("", chunk.usage.completion_tokens, False))
            if finished:
                said.put(("", 0, True))
            else:
                said.put(("", 0, RuntimeError(self._broken("it stopped sending"))))
        except (*HTTP_ERRORS, TextGenerationError, ValueError, OSError) as error:
            said.put(("", 0, RuntimeError(self._explain(error, key))))

    def _explain(self, error: Exception, key: str) -> str:
        """What happened, in one line that holds no token and says what to do."""
        if isinstance(error, InferenceTimeoutError | httpx.TimeoutException):
            return self._silent()
        if isinstance(error, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE=1 keeps the app from the endpoint; unset it"
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            return (
                f"the endpoint does not accept the token ({status}); log in, or set "
                "HF_TOKEN to one that it accepts"
            )
        if status == 404:
            return (
                f"the endpoint has no model {self.names.get(key)!r} (404); check "
                "MODEL_NAMES and MODEL_ENDPOINT"
            )
        if status is not None:
            return f"the endpoint answered with an error ({status}); try again later"
        if isinstance(error, httpx.ConnectError):
            return (
                f"the endpoint at {urlsplit(self.endpoint).netloc} is away; start it, "
                "or check MODEL_ENDPOINT"
            )
        if isinstance(error, TextGenerationError | ValueError):
            return "the endpoint answered with an error; its log says more"
        return self._broken(type(error).__name__)

    def _silent(self) -> str:
        return (
            f"the endpoint said nothing for {self.wait_s:.0f} s; it may be overloaded"
        )

    def _broken(self, how: str) -> str:
        return (
            f"the connection to the endpoint broke ({how}); see whether it still runs"
        )
