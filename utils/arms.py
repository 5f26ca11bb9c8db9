"""Who answers in the comparison: models, one of them asked to be short, and no models.

An arm is a way of getting an answer to a question. The first four generate theirs, all
with the same system prompt, the same cap and greedy decoding; the other three are what
any model has to beat.
"""

from dataclasses import dataclass

from utils.config import MODELS

# Added to the user's turn, so that the system prompt stays the same for all arms.
SHORT_REQUEST = "Answer in at most three sentences."


@dataclass(frozen=True)
class Arm:
    """One way of answering: `model` is a key of `MODELS`, None for no model."""

    key: str
    label: str
    model: str | None
    short: bool = False


ARMS = {
    "base": Arm("base", MODELS["base"].label, "base"),
    "base_short": Arm(
        "base_short", "Base, asked for three sentences", "base", short=True
    ),
    "finetome": Arm("finetome", MODELS["finetome"].label, "finetome"),
    "first_aid": Arm("first_aid", MODELS["first_aid"].label, "first_aid"),
    "nearest": Arm("nearest", "nearest training answer (no model)", None),
    "echo": Arm("echo", "the question itself (no model)", None),
    "random": Arm("random", "a random training answer (no model)", None),
}
GENERATED = tuple(key for key, arm in ARMS.items() if arm.model)


def is_asked(arm: Arm, question: dict) -> bool:
    """Whether `arm` is put to `question`, a row with `dataset` and `phrasing`.

    The short request only goes with first-aid questions as they stand in the data:
    it answers one doubt (is it only the length?), which needs no second wording.
    """
    kind = (question["dataset"], question["phrasing"])
    return not arm.short or kind == ("first_aid", "original")


def messages_for(arm: Arm, messages: list[dict]) -> list[dict]:
    """The conversation as `arm` gets it; it ends with the user's turn."""
    if not arm.short:
        return messages
    *before, last = messages
    return [*before, {**last, "content": f"{last['content']} {SHORT_REQUEST}"}]
