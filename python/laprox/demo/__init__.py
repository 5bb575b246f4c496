"""What `laprox demo` reads and asks: a text in the public domain, and questions with the answers that count."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files

BRIEFLY = " Answer in a few words."  # goes behind each question


@dataclass(frozen=True)
class Question:
    """A question about the text.

    Attributes:
        text: As a reader would ask it.
        answers: A reply that has one of them in it is right.
    """

    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Demo:
    """A text and questions about it.

    Attributes:
        title: Of the text.
        author: Who wrote it.
        source: Where it is from.
        text: About 6,000 tokens.
        questions: Eight, spread over the text.
    """

    title: str
    author: str
    source: str
    text: str
    questions: tuple[Question, ...]


def load() -> Demo:
    """The demo that ships with the package."""
    here = files(__package__)
    about = json.loads(here.joinpath("questions.json").read_text("utf-8"))
    questions = tuple(Question(q["question"], tuple(q["answers"])) for q in about["questions"])
    text = here.joinpath("text.txt").read_text("utf-8")
    return Demo(about["title"], about["author"], about["source"], text, questions)
