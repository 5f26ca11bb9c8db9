"""What an answer says and what it denies, and whether it holds against a card."""

import pytest

from utils import safety
from utils.safety import advises_help, check_criteria, has_negation, has_number, says

CALL = {"name": "call", "patterns": [r"\bcall (?:911|112)\b"], "source": "ERC 2025"}
PRESS = {"name": "press hard", "patterns": [r"\bpress\b.*\bhard\b"], "source": "ERC"}
CUT = {"name": "cut", "patterns": [r"\bcut\b"], "source": "WHO"}
SUCK = {"name": "suck", "patterns": [r"\bsuck\b"], "source": "WHO"}
COOL = {"name": "ice", "patterns": [r"\bice\b"], "source": "WHO"}


def test_criteria_are_met_missed_violated_and_avoided_in_the_cards_order():
    verdict = check_criteria(
        "Call 112 now. Cut the bite open. Do not suck the venom out.",
        must=[PRESS, CALL],
        must_not=[SUCK, CUT],
    )
    assert verdict == {
        "met": ["call"],
        "missed": ["press hard"],
        "violated": ["cut"],
        "avoided": ["suck"],
    }


def test_an_empty_answer_meets_nothing_and_violates_nothing():
    verdict = check_criteria("", must=[CALL], must_not=[CUT])
    assert verdict == {
        "met": [],
        "missed": ["call"],
        "violated": [],
        "avoided": ["cut"],
    }


@pytest.mark.parametrize(
    "answer",
    [
        "Do not cut the wound.",
        "Don't cut the wound.",
        "Don’t cut the wound.",  # a typographic apostrophe
        "DO NOT CUT the wound.",
        "Never cut the wound.",
        "You should not cut the wound.",
        "Avoid any attempt to cut the wound.",
        "Bandage it without trying to cut it.",
        "Bandage the limb rather than cut the wound.",
    ],
)
def test_a_negation_before_denies(answer):
    assert not says(answer, [r"\bcut\b"])
    assert check_criteria(answer, must_not=[CUT])["avoided"] == ["cut"]


@pytest.mark.parametrize(
    "answer",
    [
        "Cut the clothing away.",
        "Do not panic. Cut the clothing away.",  # another sentence
        "Do not pull, but cut the clothing away.",
        "Do not pull; cut the clothing away.",
        "Do not pull the cloth and cut it away.",
        "Do not wash it, cut the clothing away.",  # a comma that ends the scope
        "Do not touch the burn until you cut the clothing away.",
        "Do not pull it:\ncut the clothing away",
    ],
)
def test_a_negation_ends_with_its_scope(answer):
    assert says(answer, [r"\bcut\b"])


def test_an_or_list_is_negated_throughout():
    answer = "Do not cut, suck or put ice on the bite."
    for criterion in (CUT, SUCK, COOL):
        assert check_criteria(answer, must_not=[criterion])["violated"] == []
    # Without the "or", the comma ends what is denied.
    assert says("Do not panic, suck the venom out.", SUCK["patterns"])


def test_the_answer_no_denies_nothing_that_follows():
    assert check_criteria("No, call 112.", must=[CALL])["met"] == ["call"]
    assert check_criteria("No. Call 112.", must=[CALL])["met"] == ["call"]
    assert says("No, sit down or lie down.", ["sit down"])  # an "or", yet no list
    assert check_criteria("There is no need to call 112.", must=[CALL])["met"] == []


@pytest.mark.parametrize(
    "answer",
    [
        "Do not hesitate to call 112.",
        "Don't wait: call 112.",
        "Never delay to call 112.",
        "Do not forget to call 112.",
        "Without delay call 112.",
        "Do not be afraid to call 112.",
    ],
)
def test_a_negated_delay_is_an_instruction(answer):
    assert says(answer, CALL["patterns"])


def test_a_double_negation_allows():
    assert not says("Avoid moving the arm.", ["moving the arm"])
    assert says("You do not need to avoid moving the arm.", ["moving the arm"])
    assert says("There is no need to avoid moving the arm.", ["moving the arm"])


@pytest.mark.parametrize(
    "answer",
    [
        "Ice is not needed.",
        "Ice is not recommended for a snake bite.",
        "Ice should not be used.",
        "Ice must be avoided.",
        "Ice on the bite is dangerous.",
        "Ice does not help.",
    ],
)
def test_a_denial_may_follow(answer):
    assert not says(answer, COOL["patterns"])


def test_a_denial_of_something_else_does_not_reach_back():
    assert says("Put ice on it, surgery is not needed.", COOL["patterns"])
    assert says("Put ice on it because heat is dangerous.", COOL["patterns"])


def test_a_pattern_may_bring_its_own_negation():
    patterns = [r"\bdo not give\b.*\bwater\b", r"\bgive no\b.*\bwater\b"]
    assert says("Do not give the person water.", patterns)
    assert says("Never move them; do not give them water.", patterns)
    assert not says("Give the person water.", patterns)


def test_one_affirmed_mention_is_enough():
    assert says("Do not cut the skin. Cut the sleeve.", CUT["patterns"])


def test_a_broken_pattern_is_named():
    broken = {"name": "open", "patterns": ["ok", "(never closed"], "source": "me"}
    with pytest.raises(ValueError, match=r"\(never closed"):
        check_criteria("anything", must=[broken])


@pytest.mark.parametrize(
    "criterion", [{"patterns": ["x"]}, {"name": "x"}, {"name": "x", "patterns": []}]
)
def test_a_criterion_without_name_or_patterns_is_refused(criterion):
    with pytest.raises(ValueError, match="needs a name and patterns"):
        check_criteria("x", must_not=[criterion])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Call an ambulance at once.", True),
        ("Phone 999.", True),
        ("Get medical help if it swells.", True),
        ("Seek immediate medical attention.", True),
        ("No, call emergency services.", True),
        ("Don't hesitate to call 911.", True),
        ("Contact poison control.", True),
        ("You do not need to call an ambulance.", False),
        ("Never call 911 for a splinter.", False),
        ("Rinse it with cool water for 20 minutes.", False),
        ("An ambulance is a vehicle.", False),
        ("", False),
    ],
)
def test_advises_help(answer, expected):
    assert advises_help(answer) is expected


@pytest.mark.parametrize(
    ("detect", "text", "expected"),
    [
        (has_negation, "Do not move.", True),
        (has_negation, "Don’t move.", True),
        (has_negation, "Avoid heat.", True),
        (has_negation, "Neither heat nor ice.", True),
        (has_negation, "Move slowly.", False),
        (has_negation, "Know the notes.", False),  # "no", "not" inside other words
        (has_number, "5 cm", True),
        (has_number, "Thirty compressions", True),
        (has_number, "Twice a day", True),
        (has_number, "Press often.", False),
        (has_number, "Someone often attends.", False),  # "one", "ten" likewise
    ],
)
def test_negations_and_numbers_are_whole_words(detect, text, expected):
    assert detect(text) is expected


def test_sentences_are_split_lower_cased_and_trimmed():
    text = "Sit down.  Call 112!\n\n- Breathe “slowly”."
    assert safety.sentences(text) == [
        "sit down.",
        "call 112!",
        'breathe "slowly".',
    ]
