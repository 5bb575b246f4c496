"""Facts put into somebody's own document, and questions about them.

They are plain English sentences about people: "Helen Marlow was given locker 4821." For each one that is asked about there are
two that it could be mistaken for: the same thing about somebody with the same first or last name, and another thing about the
same person. Questions are worded unlike the facts. No name and no value of a fact occurs in the document.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from laprox.eval import english
from laprox.eval.metrics import names

PER_QUESTION = 3  # facts, so that two distract from each one that is asked about

# The end of a sentence, or of a paragraph; then any line's end, then any white space, where a text has too few of those.
_GAPS = (
    re.compile(r"(?:[.!?…]['\"”’)\]]*\s+(?=['\"“‘(\[]?[^\Wa-z_])|[。！？]['\"”’」』）]*|\n\s*\n)"),
    re.compile(r"\n+"),
    re.compile(r"\s+"),
)


@dataclass(frozen=True)
class Attribute:
    """Something that a person has.

    Attributes:
        told: The sentence, with {name} and {value}.
        asked: The question, with {name}.
        draw: A random value.
    """

    told: str
    asked: str
    draw: Callable[[random.Random], str]


def _number(rng: random.Random) -> str:
    return str(rng.randrange(1001, 10_000))


ATTRIBUTES = (
    Attribute("{name} was given locker {value}.", "What is the number of the locker that {name} uses?", _number),
    Attribute("To call {name}, dial extension {value}.", "What is the telephone extension of {name}?", _number),
    Attribute("The badge that {name} wears has the number {value}.", "Which number is on {name}'s badge?", _number),
    Attribute("{name} keeps the savings in account {value}.", "What is the number of {name}'s account?", _number),
    Attribute("{name} reports to {value}.", "Who is the boss of {name}?", english.full_name),
    Attribute("{name} shares an office with {value}.", "Who works in the same office as {name}?", english.full_name),
    Attribute("{name} learned the piano from {value}.", "Who taught {name} to play the piano?", english.full_name),
    Attribute("{name} grew up in {value}.", "In which town did {name} spend the childhood?", english.town),
    Attribute("{name} spends every summer in {value}.", "Where does {name} go for the summer holidays?", english.town),
    Attribute("{name} sails a boat called {value}.", "What is the name of {name}'s boat?", english.title),
    Attribute("{name} rides a horse called {value}.", "What is the name of {name}'s horse?", english.title),
)


@dataclass(frozen=True)
class Fact:
    """Something about somebody."""

    attribute: Attribute
    name: str
    value: str

    @property
    def sentence(self) -> str:
        """As it stands in the document."""
        return self.attribute.told.format(name=self.name, value=self.value)


@dataclass(frozen=True)
class Question:
    """A question about a fact.

    Attributes:
        text: The question.
        fact: What it asks about.
        depth: Where that stands in the document, from 0 to 1.
    """

    text: str
    fact: Fact
    depth: float = 0.0

    @property
    def value(self) -> str:
        """What a right answer contains."""
        return self.fact.value

    def answered_by(self, answer: str) -> bool:
        """Whether an answer contains the value, as whole words."""
        return names(answer, self.value)


def insert_facts(text: str, n_questions: int, seed: int | str) -> tuple[str, list[Question]]:
    """Put facts between the sentences of a text, evenly over its length.

    Args:
        text: The document. Nothing of it changes; white space next to a fact may be added.
        n_questions: Questions to ask; there are PER_QUESTION times as many facts.
        seed: The same seed, text and number give the same facts in the same places.

    Returns:
        The new text, and the questions in the order of the places of their facts.

    Raises:
        ValueError: The text has no white space to put a fact at, or has nearly all names and values that could be used.
    """
    gaps = _gaps(text, PER_QUESTION * n_questions)
    asked, rest = _draw(text, n_questions, random.Random(f"facts {seed}"))

    # A question's fact comes in the middle of its share of the document, distractors before and after it.
    order: list[Fact] = []
    for i, question in enumerate(asked):
        share = rest[i * len(rest) // len(asked) : (i + 1) * len(rest) // len(asked)]
        order += [*share[: len(share) // 2], question.fact, *share[len(share) // 2 :]]

    pieces: list[str] = []
    done = 0
    for i, fact in enumerate(order):
        wanted = (i + 0.5) / len(order) * len(text)
        gap = min((g for g in gaps if g >= done), key=lambda g: abs(g - wanted), default=gaps[-1])
        pieces += [text[done:gap], fact.sentence + " "]
        done = max(done, gap)
    pieces.append(text[done:])
    changed = "".join(pieces)
    return changed, [replace(q, depth=changed.index(q.fact.sentence) / len(changed)) for q in asked]


def _draw(text: str, n_questions: int, rng: random.Random) -> tuple[list[Question], list[Fact]]:
    """Questions, and the facts that distract from them, in any order."""
    there = set(re.findall(r"\w+", text.lower()))
    taken: set[str] = set()

    def draw(make: Callable[[], str]) -> str:
        for _ in range(1000):
            drawn = make()
            if drawn not in taken and not there.issuperset(drawn.lower().split()):
                taken.add(drawn)
                return drawn
        raise ValueError(f"{n_questions} questions are too many: the document has nearly all names and values that there are")

    asked: list[Question] = []
    rest: list[Fact] = []
    for i in range(n_questions):
        if i % len(ATTRIBUTES) == 0:
            turns = rng.sample(ATTRIBUTES, len(ATTRIBUTES))
        attribute = turns[i % len(ATTRIBUTES)]
        other = rng.choice([a for a in ATTRIBUTES if a is not attribute])
        name = draw(lambda: english.full_name(rng))
        like = draw(lambda: english.namesake(rng, name))
        values = [draw(lambda: a.draw(rng)) for a in (attribute, attribute, other)]
        asked.append(Question(attribute.asked.format(name=name), Fact(attribute, name, values[0])))
        rest += [Fact(attribute, like, values[1]), Fact(other, name, values[2])]
    rng.shuffle(rest)
    return asked, rest


def _gaps(text: str, least: int) -> list[int]:
    found: list[int] = []
    for pattern in _GAPS:
        found = [m.end() for m in pattern.finditer(text)]
        if len(found) >= least:
            break
    if not found:
        raise ValueError("the document is one word: there is no white space to put facts at")
    return found
