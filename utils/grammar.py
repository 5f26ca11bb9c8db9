"""The text that the pocket Llama learns English from, expanded from `data/pocket_text`.

A domain file holds records (a hammer, its use, its place …), templates that fit every
record, and hand-written pieces. Expanding them at random gives millions of tokens in
which facts stay coherent and wordings vary.
"""

import hashlib
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from utils.config import DATA, display_path
from utils.prompts import SYSTEM_PROMPTS

TEXT = DATA / "pocket_text"
WORD_LISTS = {
    "person": "Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Maria "
    "Noah Olga Paul Rosa Sam Tom Vera Will Yusuf Zoe Amir Lin Tara Omar Nina",
    "place": "park,market,station,library,kitchen,garden,school,beach,office,village",
    "day": "Monday,Tuesday,Wednesday,Thursday,Friday,Saturday,Sunday",
    "number": "two,three,four,five,six,seven,eight,nine,ten,twelve,fifteen,twenty",
    "colour": "red,blue,green,yellow,white,black,brown,grey,orange,pink",
    "animal": "dog,cat,horse,bird,rabbit,cow,sheep,duck,mouse,goat",
    "food": "bread,soup,rice,apples,cheese,eggs,noodles,salad,cake,potatoes",
    "weather": "sunny,rainy,windy,cold,warm,cloudy,foggy,snowy",
    "feeling": "happy,tired,proud,calm,nervous,curious,glad,sad,surprised,hopeful",
}
ASSISTANTS = ("", "cooking ", "travel ", "school ", "garden ", "weather ", "first aid ")
MANNERS = ("helpful", "friendly", "careful", "patient", "certified")
HELD_OUT_SHARE = 0.03


class Grammar:
    """Expands the records and templates of one domain into text.

    `{field}` is a field of a random record, `{^field}` the same capitalised,
    `{other.field}` that of another record, `[a|b]` one of several, and `<person>`
    a word of a list, the same within one text.
    """

    def __init__(self, domain: dict):
        self.domain = domain

    def expand(
        self, template: str, record: dict, rng: random.Random, words: dict
    ) -> str:
        """One text out of `template`; `words` keeps the list words chosen so far."""

        def choose(match: re.Match) -> str:
            return rng.choice(match.group(1).split("|"))

        while "[" in template:
            shorter = re.sub(r"\[([^\[\]]*)\]", choose, template)
            if shorter == template:
                raise ValueError(f"unbalanced brackets in {template!r}")
            template = shorter
        others = [r for r in self.domain["records"] if r is not record] or [record]
        if "other" not in words:
            words["other"] = rng.choice(others)

        def fill(match: re.Match) -> str:
            name = match.group(1)
            capital = name.startswith("^") or name.startswith("other.^")
            name = name.replace("^", "")
            owner = words["other"] if name.startswith("other.") else record
            text = owner[name.removeprefix("other.")]
            return text[:1].upper() + text[1:] if capital else text

        def pick(match: re.Match) -> str:
            name = match.group(1)
            if name not in words:
                kind = name.rstrip("0123456789")
                taken = {v for v in words.values() if isinstance(v, str)}
                options = re.split(r"[ ,]", WORD_LISTS[kind])
                words[name] = rng.choice([w for w in options if w not in taken])
            return words[name]

        text = re.sub(r"\{([^{}]+)\}", fill, template)
        text = re.sub(r"<([a-z]+\d*)>", pick, text)
        return re.sub(r" {2,}", " ", text).strip()


def load_grammars(folder: Path = TEXT) -> list[Grammar]:
    """The domains in `folder`, in the order of their names.

    Raises:
        FileNotFoundError: there is none.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise FileNotFoundError(
            f"{display_path(folder)} holds no domain files (*.json)"
        )
    return [Grammar(json.loads(file.read_text("utf-8"))) for file in files]


def is_held_out(*parts: object) -> bool:
    """Whether a text, or a pair of record and template, is kept for evaluation."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()
    return int(digest[:8], 16) / 16**8 < HELD_OUT_SHARE


def texts(
    grammars: Sequence[Grammar], seed: int, *, held_out: bool = False
) -> Iterator[str | list[dict]]:
    """An endless stream of prose (a string) and chats (a list of messages).

    Held-out texts are whole hand-written pieces and pairs of record and template
    that the training stream never yields.
    """
    rng = random.Random(f"{seed}-{held_out}")
    kinds = ("dialogues", "plain_dialogues", "prose", "plain_prose")
    weights = (0.58, 0.22, 0.12, 0.08)
    while True:
        grammar = rng.choice(grammars)
        domain = grammar.domain
        kind = rng.choices(kinds, weights)[0]
        item = rng.choice(domain[kind])
        record = rng.choice(domain["records"])
        words: dict = {}
        if kind == "plain_prose":
            if is_held_out(item) == held_out:
                yield item
        elif kind == "prose":
            if is_held_out(*record.values(), item) == held_out:
                yield grammar.expand(item, record, rng, words)
        else:
            plain = kind == "plain_dialogues"
            key = (() if plain else tuple(record.values())) + (item["q"][0],)
            if is_held_out(*key) != held_out:
                continue
            messages = _system(rng)
            turns = [item]
            if not plain and not held_out and rng.random() < 0.12:
                turns.append(rng.choice(domain["dialogues"]))
            for turn in turns:
                if turn is not item and is_held_out(*record.values(), turn["q"][0]):
                    break
                for role, options in (("user", turn["q"]), ("assistant", turn["a"])):
                    text = grammar.expand(rng.choice(options), record, rng, words)
                    messages.append({"role": role, "content": text})
            yield messages


def _system(rng: random.Random) -> list[dict]:
    draw = rng.random()
    if draw < 0.2:
        return []
    if draw < 0.6:
        text = SYSTEM_PROMPTS["finetome"]
    else:
        manner, field = rng.choice(MANNERS), rng.choice(ASSISTANTS)
        text = f"You are a {manner} {field}assistant."
    return [{"role": "system", "content": text}]
