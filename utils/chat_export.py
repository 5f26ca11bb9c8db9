"""A conversation as Markdown or JSON, for the visitor to keep."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from utils import results
from utils.chat_limits import clean
from utils.chat_talk import Answer, name, plain
from utils.config import MODELS, SAFETY_NOTICE

SUFFIXES = {"markdown": "md", "json": "json"}


def export(
    kind: str, history: Sequence[Mapping], answers: Mapping[str, Answer]
) -> tuple[str, str]:
    """A file's name and its text; the name is ours, whatever was asked.

    Args:
        kind: `markdown` or `json`.
        history: of the conversation.
        answers: what is known of its answers, by id.

    Raises:
        ValueError: another kind, or nothing was said yet.
    """
    if kind not in SUFFIXES:
        raise ValueError(f"{kind!r} is no kind of export: {' or '.join(SUFFIXES)}")
    turns = [_turn(message, answers) for message in history]
    if not turns:
        raise ValueError("There is nothing to export yet. Ask something first.")
    made = results.now()
    text = _markdown(made, turns) if kind == "markdown" else _json(made, turns)
    stamp = re.sub(r"\D", "", made.partition("+")[0])
    return f"conversation_{stamp}.{SUFFIXES[kind]}", text


def _turn(message: Mapping, answers: Mapping[str, Answer]) -> dict:
    if message.get("role") != "assistant":
        return {"role": "user", "text": clean(plain(message.get("content")))}
    known = answers.get((message.get("metadata") or {}).get("id"))
    if not known:
        return {"role": "assistant", "text": clean(plain(message.get("content")))}
    kept = asdict(known)
    figures = {key: kept[key] for key in ("tokens", "first_token_s", "seconds")}
    return {
        "role": "assistant",
        "text": clean(known.text),
        "model": MODELS[known.model].label,
        "figures": known.figures,
        **figures,
        "problem": known.problem,
        "settings": known.settings,
    }


def _json(made: str, turns: list[dict]) -> str:
    content = {"notice": SAFETY_NOTICE, "exported": made, "turns": turns}
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def _markdown(made: str, turns: list[dict]) -> str:
    parts = [f"# Conversation\n\n*{SAFETY_NOTICE}*\n\nExported {made}."]
    for turn in turns:
        model = next((k for k in MODELS if MODELS[k].label == turn.get("model")), None)
        head = name(model) if model else turn["role"].capitalize()
        if turn["role"] == "user":
            head = "Question"
        parts.append(f"## {head}\n\n{_fenced(turn['text'])}")
        if turn.get("figures"):
            parts.append(f"*{turn['figures']}*")
    return "\n\n".join(parts) + "\n"


def _fenced(text: str) -> str:
    """`text` in a fence that nothing in it can close, so that no viewer renders it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
