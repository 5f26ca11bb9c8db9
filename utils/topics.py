"""What a first-aid question is about, how urgent that is, and how it is asked."""

import re

from utils.sources import is_true

# Topic → (safety-critical, pattern). The first that matches a question decides, so
# the urgent and the specific stand before the general.
TOPICS = {
    "cpr_aed": (
        True,
        r"\bcpr\b|compression|defib|\baed\b|cardiac arrest|rescue breath",
    ),
    "choking": (True, r"chok|heimlich|abdominal thrust|back blow|airway (?:is )?block"),
    "drowning": (True, r"drown|submer|near-drown|pulled from (?:the )?water"),
    "stroke": (True, r"\bstroke(?! of)\b(?<!heat stroke)|face.{0,12}droop"),
    "heart_attack": (True, r"heart attack|chest pain|angina|cardiac"),
    "seizure": (True, r"seizure|epilep|convuls|fitting\b"),
    "breathing_allergy": (
        True,
        r"asthma|inhaler|allerg|anaphyla|epipen|auto-?injector|hyperventilat|"
        r"wheez|shortness of breath|trouble breathing|difficulty breathing",
    ),
    "diabetes": (True, r"diabet|insulin|blood sugar|hypoglyc|hyperglyc|glucose"),
    "severe_bleeding": (
        True,
        r"tourniquet|severe(?:ly)? bleed|heavy bleed|bleed(?:ing)? (?:heavily|won)|"
        r"spurting|arter|amputat|internal bleed|hemorrhag|haemorrhag|impaled|embedded",
    ),
    "poisoning_eye": (
        True,
        r"poison|overdos|swallow(?:ed|s|ing)?|ingest|toxic|carbon monoxide|naloxone|"
        r"\beyes?\b|contact lens|chemical",
    ),
    "head_spine": (True, r"\bhead\b|concuss|skull|spin(?:e|al)|neck|whiplash|brain"),
    "bites_stings": (
        True,
        r"bite|bitten|sting|stung|snake|spider|tick\b|jellyfish|bee\b|wasp|venom|rabies",
    ),
    "heat_cold": (
        True,
        r"heat ?stroke|heat exhaust|heat|hypotherm|frostbit|frostnip|cold|dehydrat",
    ),
    "burns": (True, r"burn|scald|blister|electric"),
    "shock_fainting": (True, r"\bshock\b|faint|dizz|pass(?:es|ed)? out|lightheaded"),
    "unconsciousness": (
        True,
        r"unconscious|unresponsive|recovery position|not breathing|collaps",
    ),
    "fractures_sprains": (
        False,
        r"fractur|sprain|strain|dislocat|broken|splint|sling|bone|ankle|cramp|muscle|"
        r"joint|bruis",
    ),
    "minor_wounds": (
        False,
        r"\bcuts?\b|wound|scrape|graze|splinter|nose ?bleed|nose|tooth|teeth|infect|"
        r"bandag|dressing|bleed|stitch|scratch",
    ),
    "emergency_call": (
        True,
        r"\b(?:911|112|999)\b|ambulance|dispatch|call for help|emergency (?:services|"
        r"number|call)|paramedic|scene|bystander",
    ),
    "first_aid_kit": (False, r"\bkit\b|suppl(?:y|ies)|gloves|prepar|train(?:ed|ing)"),
}

QUESTION_KINDS = {
    "how": r"^how\b",
    "what": r"^(?:what|which)\b",
    "should or can": r"^(?:should|can|could|may|must|would|will|is it (?:ok|safe))\b",
    "is or does": r"^(?:is|are|do|does|did|has|have)\b",
    "why": r"^why\b",
    "when": r"^when\b",
    "who or where": r"^(?:who|where)\b",
}


def topic_of(row: dict) -> tuple[str, bool]:
    """A question-answer row's topic and whether it is safety-critical.

    The row's own columns count if it has them; else the first pattern in `TOPICS`
    that its question matches, then its answer; else `("other", False)`.
    """
    if row.get("topic"):
        topic = str(row["topic"])
        critical = row.get("safety_critical")
        if critical is None:
            critical = TOPICS.get(topic, (False, ""))[0]
        return topic, is_true(critical)
    for text in (row["question"].lower(), row["answer"].lower()):
        for topic, (critical, pattern) in TOPICS.items():
            if re.search(pattern, text):
                return topic, critical
    return "other", False


def question_kind(question: str) -> str:
    """How a normalised question begins: how, what, why …, or "other"."""
    for kind, pattern in QUESTION_KINDS.items():
        if re.search(pattern, question):
            return kind
    return "other"
