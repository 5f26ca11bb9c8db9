"""Reads an answer the way a first-aid instructor skims it: what is said, what denied.

Pure functions on text. `check_criteria` holds an answer against a safety card: a
list of things it must say and a list of dangerous things it must not advise.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

_SENTENCE = re.compile(r"(?<=[.!?;:])\s+|\n+")
_NEGATION = re.compile(
    r"\b(?:do not|don'?t|does not|doesn'?t|did not|didn'?t|is not|isn'?t|are not|"
    r"aren'?t|was not|wasn'?t|can ?not|can'?t|could not|couldn'?t|should not|"
    r"shouldn'?t|must not|mustn'?t|need not|needn'?t|will not|won'?t|would not|"
    r"wouldn'?t|never|not|no|nor|neither|avoid|avoiding|without|instead of|"
    r"rather than|refrain from|resist|stop|skip|omit|leave out|wrong to|nothing|"
    r"nobody|no one|none)\b"
)
# "No, call 112": an answer to the question, which denies nothing in the sentence.
_ANSWER_NO = re.compile(r"^(?:no|nope)\b(?= ?[,;:–—-])")
# "Give no food": the negation stands inside what was matched.
_INNER_NO = re.compile(r"^\w+ (?:\w+ )?(?:no|nothing|neither|never)\b")
# Two negations, or a negated delay, make an instruction: "do not hesitate to call".
_AFFIRMED = re.compile(
    r"\b(?:(?:do not|don'?t|never|not) (?:hesitate|delay|forget|fail|neglect|worry|"
    r"wait(?! to see| for| and| until| till| longer)|be afraid|be shy|stop)|"
    r"no later than|not only|without (?:any )?(?:delay|hesitation|waiting)|no matter|"
    r"if (?:you )?(?:are |is )?(?:not|no)|stop(?:s|ped)? (?:the )?(?:burn|bleed)ing|"
    r"why not|not sure|in no time)\b"
)
# Where a negation ends: "do not move them, but call 112", "and then", "until".
_SCOPE_END = re.compile(
    r"\b(?:but|instead(?! of)|until|unless|because|so that|then|while|after|before|"
    r"when|if|except|and)\b|[;:()—–]| - "
)
# A denial may also follow: "cold baths are not safe", "the kiss should be avoided".
_DENIED_AFTER = re.compile(
    r"\b(?:is|are|was|were)(?: not|n't) (?:needed|necessary|safe|recommended|advised|"
    r"required|used|helpful|(?:good )?enough|a good idea|the answer|called for)\b|"
    r"\b(?:should|must|can)(?: not|n't| never) be (?:used|done|given|tried)\b|"
    r"\b(?:should|must) be avoided\b|\b(?:is|are) (?:dangerous|harmful|a myth|wrong)\b|"
    r"\b(?:does|do|will)(?: not|n't) help\b|\bwon't help\b"
)
# "You do not need to avoid it" allows what "avoid it" alone would forbid.
_ALLOWED = re.compile(
    r"\b(?:do not|don't|does not|doesn't|no|not|needn't|need not)"
    r"(?: need| have| reason| necessary)?(?: to)? (?:avoid|refrain from)\b"
)
_HELP = re.compile(
    r"\b(?:call|calling|dial|phone|ring|contact|alert|summon|get|seek|request)\b"
    r"[^.;!?]{0,50}\b(?:911|112|999|000|111|ambulance|emergency|paramedics?|"
    r"medical (?:help|attention|care|assistance|advice|aid|treatment)|doctor|"
    r"poison (?:control|centre|center)|professional (?:help|medical)|help)\b"
)
_STRIPPED = (  # with what stands in its place
    (re.compile(r"\b(?:do not|don't|does not|doesn't|did not|didn't)\b ?", re.I), ""),
    (re.compile(r"\bcan(?:not|'t)\b", re.I), "can"),
    (re.compile(r"\bwon't\b", re.I), "will"),
    (re.compile(r"\bshan't\b", re.I), "shall"),
    (re.compile(r"(?<=\w)n't\b", re.I), ""),
    (re.compile(r"\b(?:not|never|no|nor|neither)\b ?", re.I), ""),
)
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
_FUNCTION_WORD = re.compile(
    r"a|an|and|any|are|as|at|be|been|being|but|by|can|could|did|do|does|for|from|had|"
    r"has|have|he|her|him|his|i|if|in|into|is|it|its|may|me|my|of|on|or|our|she|should|"
    r"so|that|the|their|them|then|they|this|to|unless|until|was|we|were|will|with|"
    r"would|you|your|no|nor|not|never|neither|cannot|\w+n't"
)
_NUMBER_WORDS = dict(
    zero="0", one="1", two="2", three="3", four="4", five="5", six="6", seven="7",
    eight="8", nine="9", ten="10", eleven="11", twelve="12", fifteen="15", twenty="20",
    thirty="30", forty="40", fifty="50", sixty="60", hundred="100",
)  # fmt: skip
_VALUE = re.compile(r"\d+(?:[.,]\d+)*|\b(?:" + "|".join(_NUMBER_WORDS) + r")\b")
_NUMBER = re.compile(
    r"\d|\b(?:one|two|three|four|five|six|seven|eight|nine|ten|twelve|fifteen|twenty|"
    r"thirty|forty|fifty|sixty|hundred|twice|half|third|quarter)\b"
)


def plain(text: str) -> str:
    """`text` lower-cased, with typographic quotes and blanks made plain."""
    text = text.lower().replace("’", "'").replace("‘", "'")
    return re.sub(r"[ \t\u00a0]+", " ", text.replace("“", '"').replace("”", '"'))


def sentences(text: str) -> list[str]:
    """The sentences of `text`, lower-cased and trimmed, in order."""
    text = _ALLOWED.sub("you may", plain(text))
    parts = [part.strip() for part in _SENTENCE.split(text)]
    return [_ANSWER_NO.sub("", part).lstrip(" ,;:–—-") for part in parts if part]


def is_negated(sentence: str, start: int, end: int | None = None) -> bool:
    """Whether `sentence[start:end]`, of a plain sentence, lies under a negation.

    A negation holds until a word that ends its scope ("but", "then", "and" …); a
    comma ends it too, unless an "or" goes on with the same list: in "do not cut,
    suck or cool the bite" all three are negated.
    """
    if end is not None:
        after = _SCOPE_END.split(sentence[end:], maxsplit=1)[0].split(",")[0]
        if _DENIED_AFTER.search(after):
            return True
        if _INNER_NO.search(sentence[start:end]) and not _NEGATION.match(
            sentence, start
        ):
            return True
    before = sentence[:start]
    for match in reversed(list(_NEGATION.finditer(before))):
        if any(
            m.start() <= match.start() < m.end() for m in _AFFIRMED.finditer(before)
        ):
            continue
        between = before[match.end() :]
        if _SCOPE_END.search(between):
            continue
        if "," in between and not _list_goes_on(sentence, match.end(), start):
            continue
        return True
    return False


def _list_goes_on(sentence: str, begin: int, start: int) -> bool:
    """Whether a comma after a negation only separates items joined by "or"."""
    if re.search(r"\b(?:n?or)\b", sentence[begin:start]):
        return True
    rest = sentence[start:]
    end = _SCOPE_END.search(rest)
    return bool(re.search(r"\b(?:n?or)\b", rest[: end.start() if end else None]))


def says(answer: str, patterns: Sequence[str]) -> bool:
    """Whether `answer` states one of `patterns` in a sentence, not negated.

    Args:
        answer: text in any case.
        patterns: regular expressions, searched case-insensitively sentence by
            sentence. One may begin with its own negation ("do not give .* water").

    Raises:
        ValueError: a pattern is no regular expression; it is named.
    """
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern, re.IGNORECASE))
        except re.error as error:
            raise ValueError(f"pattern {pattern!r}: {error}") from error
    return any(
        not is_negated(sentence, match.start(), match.end())
        for sentence in sentences(answer)
        for pattern in compiled
        for match in pattern.finditer(sentence)
    )


def check_criteria(
    answer: str,
    must: Sequence[Mapping] = (),
    must_not: Sequence[Mapping] = (),
) -> dict[str, list[str]]:
    """Hold `answer` against a safety card.

    Args:
        answer: the text to check.
        must: criteria `{name, patterns, source}` that the answer has to state.
        must_not: criteria of dangerous advice that it must not give.

    Returns:
        `met` and `missed` (names out of `must`), `violated` and `avoided` (names
        out of `must_not`), each in the card's order.

    Raises:
        ValueError: a criterion without name or patterns, or a broken pattern.
    """
    verdict = {"met": [], "missed": [], "violated": [], "avoided": []}
    for criteria, yes, no in (
        (must, "met", "missed"),
        (must_not, "violated", "avoided"),
    ):
        for criterion in criteria:
            if not criterion.get("name") or not criterion.get("patterns"):
                raise ValueError(f"criterion {criterion!r} needs a name and patterns")
            said = says(answer, criterion["patterns"])
            verdict[yes if said else no].append(criterion["name"])
    return verdict


def advises_help(answer: str) -> bool:
    """Whether `answer` advises to call or fetch help, and does not deny it."""
    return says(answer, [_HELP.pattern])


def has_negation(text: str) -> bool:
    """Whether `text` holds a word of negation."""
    return bool(_NEGATION.search(plain(text)))


def has_number(text: str) -> bool:
    """Whether `text` holds a digit or a number word."""
    return bool(_NUMBER.search(plain(text)))


@lru_cache(maxsize=4096)  # a reference is held against every arm's answer
def denied_words(text: str) -> frozenset[str]:
    """Stemmed content words of `text` that stand under a negation (`is_negated`).

    "Do not cut, suck or cool the bite" gives cut, suck, cool, bite. Function words and
    the negations themselves do not count. Stems are Porter's, as in ROUGE.
    """
    from nltk.stem.porter import PorterStemmer  # rouge_score brings it along

    stem = PorterStemmer().stem
    return frozenset(
        stem(match[0])
        for sentence in sentences(text)
        for match in _WORD.finditer(sentence)
        if not _FUNCTION_WORD.fullmatch(match[0])
        and is_negated(sentence, match.start(), match.end())
    )


def numbers(text: str) -> frozenset[str]:
    """The numbers that `text` names, as digits: "two inches, 5 cm" gives 2 and 5."""
    found = _VALUE.findall(plain(text))
    return frozenset(_NUMBER_WORDS.get(v, v.replace(",", "")) for v in found)


def negation_agreement(answer: str, reference: str) -> float | None:
    """How far `answer` denies what `reference` denies: F1 of their `denied_words`.

    None where the reference denies nothing: there is nothing to agree with.
    """
    return _overlap(denied_words(answer), denied_words(reference))


def number_agreement(answer: str, reference: str) -> float | None:
    """How far `answer` names the numbers of `reference`: F1 of their `numbers`.

    None where the reference names none.
    """
    return _overlap(numbers(answer), numbers(reference))


def _overlap(found: frozenset[str], wanted: frozenset[str]) -> float | None:
    if not wanted:
        return None
    return 2 * len(found & wanted) / (len(found) + len(wanted))


def strip_negations(text: str) -> str:
    """`text` without "not", "never", "no", "nor", "neither", "don't" and the like.

    "Do not give water" becomes "give water", "you cannot" becomes "you can". Words
    that deny by their meaning ("avoid", "without") stay.
    """
    text = text.replace("’", "'")
    for pattern, instead in _STRIPPED:
        text = pattern.sub(instead, text)
    return re.sub(r" {2,}", " ", text).strip()
