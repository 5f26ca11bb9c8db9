"""What the chat takes from a visitor: how long, how often, and which characters."""

import time
import unicodedata
from collections import deque
from threading import Lock

MAX_CHARACTERS = 4000
MAX_TURNS = 12
MAX_HISTORY_CHARACTERS = 12_000
MAX_COMMENT = 1000
REQUESTS, WINDOW_S = 60, 600.0
VISITORS = 10_000  # as many are remembered; beyond that, the longest silent are not
JOINER = "\u2060"  # invisible; `utils.chat_look` puts it where a tag would begin
# Override and isolate marks make a text look like another one.
BIDI = {*map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A)))}


def problem(message: object) -> str:
    """Why `message` cannot be asked; empty if it can."""
    if not isinstance(message, str) or not clean(message[:MAX_CHARACTERS]).strip():
        return "Please type a question first."
    if len(message) > MAX_CHARACTERS:
        return (
            f"The question has {len(message):,} characters; at most "
            f"{MAX_CHARACTERS:,} are read. Please shorten it."
        )
    return ""


def clean(text: str) -> str:
    """`text` without control characters and without the template's own marks.

    `<|eot_id|>` in a question would otherwise be read as the end of a turn.
    """
    kept = (
        character
        for character in text.replace("\r\n", "\n")
        if character in "\n\t"
        or (unicodedata.category(character) not in ("Cc", "Cs"))
        and character not in (JOINER, *BIDI)
    )
    return "".join(kept).replace("<|", "< |").replace("|>", "| >")


class RequestLimit:
    """At most so many questions per visitor in a sliding window of time."""

    def __init__(self, requests: int = REQUESTS, window_s: float = WINDOW_S):
        self.requests, self.window_s = requests, window_s
        self._asked: dict[str, deque[float]] = {}
        self._lock = Lock()

    def take(self, visitor: str, cost: int = 1) -> str:
        """Count `cost` questions; why they are refused, empty if they are not."""
        now = time.monotonic()
        with self._lock:
            times = self._asked.pop(visitor, deque())
            while times and times[0] <= now - self.window_s:
                times.popleft()
            self._asked[visitor] = times  # last in the dictionary: asked last
            if len(self._asked) > VISITORS:
                self._asked.pop(next(iter(self._asked)))
            if len(times) + cost > self.requests:
                oldest = min(len(times) + cost - self.requests, len(times)) - 1
                free = (times[oldest] if times else now) + self.window_s
                return (
                    f"A visitor gets {self.requests} answers in "
                    f"{self.window_s / 60:.0f} minutes. Please ask again in "
                    f"{max(1, round(free - now))} s."
                )
            times.extend([now] * cost)
        return ""
