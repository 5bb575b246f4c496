"""Questions about excerpts of books in the public domain: what real prose costs, beside what generated documents cost.

A file of questions holds no text but says where an excerpt begins and ends in a book of Project Gutenberg. The books
are the user's: a folder with pg<number>.txt, as PG19 (arXiv 1911.05507) has them. A checksum makes sure that everybody
measures on the same text.

    for document in load(Path("scripts/questions/books.json")):
        text = document.text(Path("books"))
        for question in document.questions:
            contains_any(reply, question.answers)  # of laprox.eval.metrics
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laprox.chat.reading import read_document, read_json

_FIELDS = {"book": int, "title": str, "author": str, "first": str, "last": str, "sha256": str, "questions": list}
_PAGE_OR_ITALICS = re.compile(r"\{\d+\}|_")  # Project Gutenberg's marks, which no reader of the book sees


@dataclass(frozen=True)
class Question:
    """A question that one place in an excerpt answers.

    Attributes:
        text: Ends with "?".
        answers: A reply that names one of them is right: see `laprox.eval.metrics.names`.
    """

    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """Some paragraphs of a book, and questions in the order of the places that answer them.

    Attributes:
        book: Its number at Project Gutenberg.
        title: Of the book.
        author: Of the book.
        first: The words that the first paragraph begins with, and no other one in the book.
        last: The words that the last paragraph ends with, and no other one in the book.
        sha256: Of the text in UTF-8.
        questions: At least one.
    """

    book: int
    title: str
    author: str
    first: str
    last: str
    sha256: str
    questions: tuple[Question, ...]

    def text(self, folder: Path) -> str:
        """The excerpt from a folder of books: a line per paragraph, and a blank line between them.

        Raises:
            ValueError: The book is missing or differs from the one that the questions were made for.
        """
        path = folder / f"pg{self.book}.txt"
        if not path.exists():
            raise ValueError(
                f"{path}: not found; it is {self.title!r} by {self.author}, number {self.book} of Project Gutenberg"
            )
        paragraphs = normalised(read_document(path))
        first = _only(path, "begin", self.first, [p.startswith(self.first) for p in paragraphs])
        last = _only(path, "end", self.last, [p.endswith(self.last) for p in paragraphs])
        if last < first:
            raise ValueError(f"{path}: the paragraph that ends with {self.last!r} precedes the one with {self.first!r}")
        text = "\n\n".join(paragraphs[first : last + 1])
        if (found := checksum(text)) != self.sha256:
            raise ValueError(
                f"{path}: the text from {self.first!r} to {self.last!r} is not what the questions were made for "
                f"(SHA-256 {found[:12]}..., not {self.sha256[:12]}...)"
            )
        return text


def load(path: Path) -> list[Document]:
    """The documents of a file {"documents": [{"book", "title", ..., "questions": [{"question", "answers"}]}]}.

    Raises:
        ValueError: It can't be read, or something in it is missing or of another type; the path comes first.
    """
    documents = read_json(path).get("documents")
    if not isinstance(documents, list) or not documents:
        raise ValueError(f'{path}: expected {{"documents": [...]}} with at least one document')
    return [_document(data, f"{path}: document {number}") for number, data in enumerate(documents, 1)]


def normalised(book: str) -> list[str]:
    """The paragraphs of a book, each on one line, without the marks for italics and pages."""
    paragraphs = (" ".join(_PAGE_OR_ITALICS.sub("", p).split()) for p in re.split(r"\n[^\S\n]*\n", _lines(book)))
    return [p for p in paragraphs if p]


def checksum(text: str) -> str:
    """The SHA-256 of a text in UTF-8, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def _lines(book: str) -> str:
    return book.replace("\r\n", "\n").replace("\r", "\n")


def _only(path: Path, verb: str, words: str, fits: Sequence[bool]) -> int:
    if (n := sum(fits)) != 1:
        raise ValueError(f"{path}: {n or 'none'} of its {len(fits)} paragraphs {verb} with {words!r}; expected one")
    return list(fits).index(True)


def _document(data: Any, source: str) -> Document:
    values = _fields(data, _FIELDS, source)
    questions = []
    for number, question in enumerate(values.pop("questions"), 1):
        asked = _fields(question, {"question": str, "answers": list}, f"{source}, question {number}")
        if not asked["answers"] or not all(isinstance(a, str) and re.search(r"\w", a) for a in asked["answers"]):
            raise ValueError(f"{source}, question {number}: 'answers' should be one or more texts with a word in each")
        questions.append(Question(asked["question"], tuple(asked["answers"])))
    if not questions:
        raise ValueError(f"{source}: there are no questions")
    return Document(questions=tuple(questions), **values)


def _fields(data: Any, types: dict[str, type], source: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{source}: not an object")
    for name, kind in types.items():
        if type(data.get(name)) is not kind or data[name] == "":
            raise ValueError(f"{source}: {name!r} is {data.get(name)!r}; expected {_KINDS[kind]}")
    return {name: data[name] for name in types}


_KINDS = {int: "a number", str: "a text", list: "a list"}
