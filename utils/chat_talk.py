"""One answer from start to end: checks, history, sampling, figures, errors."""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address

import gradio as gr
from gradio.utils import get_space

from utils.chat_limits import (
    MAX_CHARACTERS,
    MAX_HISTORY_CHARACTERS,
    MAX_TURNS,
    RequestLimit,
    clean,
    problem,
)
from utils.config import MODELS, Settings
from utils.protocol import Backend, Sampling

MARKERS = {"base": "●", "finetome": "■", "first_aid": "▲"}  # as in the figures
KEPT_ANSWERS = 60  # per visitor: those that can be voted on and exported


@dataclass
class Answer:
    """What a model said, how fast, and with which settings it was asked."""

    model: str
    question: str
    settings: dict
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    text: str = ""
    tokens: int = 0
    first_token_s: float = 0.0
    seconds: float = 0.0
    note: str = ""
    problem: str = ""

    @property
    def figures(self) -> str:
        """The line under an answer: model, tokens, time to the first one, speed."""
        said = [name(self.model)]
        if self.tokens:
            rate = self.tokens / max(self.seconds, 1e-9)
            said += [
                f"{self.tokens} tokens",
                f"first after {self.first_token_s:.2f} s",
                f"{rate:.0f} tokens/s",
            ]
        if self.problem:
            said.append(f"⚠ {self.problem}. Please ask again.")
        elif self.note:
            said.append(f"{self.note} …")
        return " · ".join(said)


def name(key: str) -> str:
    """A model's name with its marker, so that colour is never the only cue."""
    return f"{MARKERS[key]} {MODELS[key].label}"


@dataclass(frozen=True)
class Controls:
    """The settings a visitor chose, brought within what the app allows."""

    system_prompt: str
    sampling: Sampling

    @classmethod
    def read(
        cls,
        settings: Settings,
        system_prompt: str | None,
        max_new_tokens: float | None,
        temperature: float | None,
        top_p: float | None,
        seed: float | None,
    ) -> "Controls":
        """Whatever was sent, even past the page, as values that can be used."""
        cap = settings.max_new_tokens
        wanted = cap if max_new_tokens is None else int(max_new_tokens)
        return cls(
            clean((system_prompt or "")[:MAX_CHARACTERS]),
            Sampling(
                max_new_tokens=min(max(wanted, 1), cap),
                temperature=min(max(float(temperature or 0), 0.0), 2.0),
                top_p=min(max(float(top_p or 1), 0.01), 1.0),
                # An emptied field, a negative or a huge number: any is a seed.
                seed=settings.seed if seed is None else int(seed) % 2**32,
            ),
        )


class Talk:
    """Asks one of several back ends on behalf of a visitor, within the limits."""

    def __init__(
        self, settings: Settings, sources: Mapping[str, Backend], limit: RequestLimit
    ):
        self.settings, self.sources, self.limit = settings, dict(sources), limit

    def refuse(self, message: object, models: Sequence[str], request) -> str:
        """Why this is not answered, empty if it is; counts it as asked."""
        if unknown := set(models) - set(MODELS):
            return f"There is no model {', '.join(sorted(map(str, unknown)))}."
        return problem(message) or self.limit.take(visitor(request), len(models))

    def backend(self, source: str | None) -> Backend:
        """The back end of that name, the first one if there is none."""
        return self.sources.get(source, next(iter(self.sources.values())))

    def answer(
        self,
        key: str,
        question: str,
        earlier: Sequence[Mapping],
        controls: Controls,
        source: str | None,
        token: str | None,
    ) -> Iterator[Answer]:
        """Yield the growing answer, the same object each time; never raises halfway.

        Args:
            key: the model.
            question: within the limits, as `refuse` has found.
            earlier: chat messages that came before.
            controls: of this answer.
            source: one of `sources`; the first if it is none of them.
            token: the visitor's, if they logged in.
        """
        backend = self.backend(source)
        sampling = controls.sampling
        shown = {
            "system_prompt": controls.system_prompt,
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "profile": self.settings.profile,
            "answered_by": backend.about,
        }
        messages = [
            {"role": "system", "content": controls.system_prompt},
            *earlier,
            {"role": "user", "content": clean(question)},
        ]
        answer = Answer(key, clean(question), shown)
        try:
            for so_far in backend.stream(key, messages, sampling, token):
                answer.text, answer.tokens = so_far.text, so_far.tokens
                answer.first_token_s = so_far.first_token_s
                answer.seconds, answer.note = so_far.seconds, so_far.note
                yield answer
        except (RuntimeError, OSError, ValueError) as error:
            answer.problem = str(error).rstrip(".")
            if backend is not list(self.sources.values())[-1]:
                answer.problem += "; under Settings you can let this machine answer"
        answer.note = ""
        if not answer.text and not answer.problem:
            answer.note = "said nothing"
        yield answer


def earlier_turns(
    history: Sequence[Mapping], answers: Mapping[str, Answer]
) -> list[dict]:
    """The newest whole turns of a conversation that fit, as chat messages.

    What a model said is taken from `answers`, where it stands without its figures. A
    turn that ended in an error is left out.
    """
    turns: list[list[dict]] = []
    asked = None
    for message in history:
        if message.get("role") == "user":
            asked = clean(plain(message.get("content")))[:MAX_CHARACTERS]
        elif message.get("role") == "assistant" and asked is not None:
            known = answers.get((message.get("metadata") or {}).get("id"))
            said = known.text if known else plain(message.get("content"))
            if said and not (known and known.problem):
                turns.append(
                    [
                        {"role": "user", "content": asked},
                        {"role": "assistant", "content": clean(said)},
                    ]
                )
            asked = None
    kept: list[dict] = []
    size = 0
    for turn in reversed(turns[-MAX_TURNS:]):
        size += sum(len(message["content"]) for message in turn)
        if size > MAX_HISTORY_CHARACTERS:
            break
        kept = turn + kept
    return kept


def plain(content: object) -> str:
    """A message's first text; Gradio hands it over as a list of typed parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    for part in parts:
        if isinstance(part, str):
            return part
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            return part["text"]
    return ""


def remember(answers: dict[str, Answer], answer: Answer) -> dict[str, Answer]:
    """`answers` with this one; the oldest are forgotten."""
    answers[answer.id] = answer
    while len(answers) > KEPT_ANSWERS:
        answers.pop(next(iter(answers)))
    return answers


def visitor(request: gr.Request | None) -> str:
    """Who asks: the account if they logged in, else the address they come from."""
    if request is None:
        return "this program"
    if account := getattr(request, "username", None):
        return f"user {account}"
    host = request.client.host if request.client else "unknown"
    if get_space() is None:  # anybody can write this header; only a proxy makes it true
        return host
    hops = request.headers.get("x-forwarded-for", "").split(",")
    # From the right, where the proxies write: the first that is not one of them.
    return next((hop.strip() for hop in reversed(hops) if _is_public(hop)), host)


def _is_public(address: str) -> bool:
    try:
        return ip_address(address.strip()).is_global
    except ValueError:
        return False
