"""Facts put into somebody's own document, and questions about them.

The facts resemble each other, as those of laprox.documents do: for each one that is asked about, others have the same
attribute or the same name. Questions are worded unlike the facts. The names are made up, and none occurs in the document.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace

from laprox.documents import Fact, Question, tell_facts

KINDS = ("single", "rephrased")
PER_QUESTION = 3  # facts, so that two distract from each one that is asked about

# The end of a sentence, or of a paragraph; then any line's end, then any white space, where a text has too few of those.
_GAPS = (
    re.compile(r"(?:[.!?…]['\"”’)\]]*\s+(?=['\"“‘(\[]?[^\Wa-z_])|[。！？]['\"”’」』）]*|\n\s*\n)"),
    re.compile(r"\n+"),
    re.compile(r"\s+"),
)


def insert_facts(text: str, n_questions: int, seed: int) -> tuple[str, list[Question]]:
    """Put facts between the sentences of a text, evenly over its length.

    Args:
        text: The document. Nothing of it changes; white space next to a fact may be added.
        n_questions: Questions to ask; there are PER_QUESTION times as many facts.
        seed: The same seed, text and number give the same facts in the same places.

    Returns:
        The new text, and the questions in the order of the places of their facts, with depths from 0 to 1.

    Raises:
        ValueError: The text has no white space to put a fact at.
    """
    gaps = _gaps(text, PER_QUESTION * n_questions)
    told, asked = _draw(text, n_questions, seed)
    rng = random.Random(f"{seed}/places")
    rest = [fact for fact in told if all(fact not in q.facts for q in asked)]
    rng.shuffle(rest)

    # A question's fact comes in the middle of its share of the document, distractors before and after it.
    order: list[Fact] = []
    for i, question in enumerate(asked):
        share = rest[i * len(rest) // len(asked) : (i + 1) * len(rest) // len(asked)]
        order += [*share[: len(share) // 2], question.facts[0], *share[len(share) // 2 :]]

    pieces: list[str] = []
    done = 0
    for i, fact in enumerate(order):
        wanted = (i + 0.5) / len(order) * len(text)
        gap = min((g for g in gaps if g >= done), key=lambda g: abs(g - wanted), default=gaps[-1])
        pieces += [text[done:gap], told[fact] + " "]
        done = max(done, gap)
    pieces.append(text[done:])
    changed = "".join(pieces)
    return changed, [replace(q, depth=changed.index(told[q.facts[0]]) / len(changed)) for q in asked]


def says(answer: str, value: str) -> bool:
    """Whether an answer contains a value, in whatever case; 4,821 is 4821."""
    return value.lower() in re.sub(r"(?<=\d),(?=\d{3})", "", answer).lower()


def _draw(text: str, n_questions: int, seed: int) -> tuple[dict[Fact, str], list[Question]]:
    for attempt in range(100):
        rng = random.Random(f"facts {seed} {attempt}")
        told, asked, _ = tell_facts(rng, max(12, PER_QUESTION * n_questions), "eval", KINDS, n_questions, 0.5)
        if len(asked) == n_questions and not any(re.search(rf"\b{re.escape(fact.name)}\b", text) for fact in told):
            return told, asked
    raise ValueError(f"{n_questions} questions are too many: made-up names that don't occur in the document ran out")


def _gaps(text: str, least: int) -> list[int]:
    found: list[int] = []
    for pattern in _GAPS:
        found = [m.end() for m in pattern.finditer(text)]
        if len(found) >= least:
            break
    if not found:
        raise ValueError("the document is one word: there is no white space to put facts at")
    return found
