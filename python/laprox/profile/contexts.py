"""What a model is profiled on: contexts and questions about them.

A `.jsonl` file has one context per line:

    {"context": "...", "questions": ["...", "..."]}

Any other file is a document as `laprox chat` reads them (text, Markdown, HTML, PDF). It is read in pieces of equal
length, with questions that can be asked about any text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from laprox.chat.reading import read_document, read_jsonl

QUESTIONS = (
    "What is this text about? Answer in one paragraph.",
    "Which people, places or things matter most in it, and why?",
    "What comes first in the text, what comes last, and how does one lead to the other?",
    "Write down the numbers, dates and names in it, each with what it belongs to.",
    "What does the text claim, and what does it give as evidence?",
    "Which small details might a reader want to look up again later?",
    "Quote the one sentence that says the most.",
    "Which question does the text leave open?",
    "What is said in the middle of the text?",
    "Explain the text to somebody who has not read it.",
)


@dataclass(frozen=True)
class Context:
    """A text to read and what to ask about it."""

    source: str  # where it comes from, for messages
    text: str
    questions: tuple[str, ...]


def read_contexts(paths: Sequence[Path], count: Callable[[str], int], longest: int, piece: int) -> list[Context]:
    """The contexts of several files.

    Args:
        paths: .jsonl files and documents.
        count: Tokens of a text.
        longest: Tokens that a context may have; 0 = any number.
        piece: Tokens of a document's pieces, at most.

    Raises:
        ValueError: A file can't be read, or a line of it is not a context or too long; names file and line.
    """
    contexts: list[Context] = []
    for path in paths:
        if path.suffix.lower() != ".jsonl":
            contexts += _pieces(path, count, piece)
            continue
        for context in _lines(path):
            if longest and (n := count(context.text)) > longest:
                raise ValueError(f"{context.source}: the context is {n:,} tokens, more than {longest:,}")
            contexts.append(context)
    return contexts


def _lines(path: Path) -> Iterator[Context]:
    for source, data in read_jsonl(path, '{"context": "...", "questions": ["...", ...]}'):
        text, questions = data.get("context"), data.get("questions")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f'{source}: "context" must be a text')
        if not isinstance(questions, list) or not questions or not all(isinstance(q, str) and q.strip() for q in questions):
            raise ValueError(f'{source}: "questions" must be a list of at least one text')
        yield Context(source, text, tuple(questions))


def _pieces(path: Path, count: Callable[[str], int], length: int) -> Iterator[Context]:
    text = read_document(path)
    n = -(-count(text) // length)
    pieces = _cut(text, n)
    while max(map(count, pieces)) > length:
        n += 1  # some parts have more tokens per character than others
        pieces = _cut(text, n)
    for i, piece in enumerate(pieces, 1):
        yield Context(f"{path} part {i} of {n}" if n > 1 else str(path), piece, QUESTIONS)


def _cut(text: str, n: int) -> list[str]:
    """About equal parts of a text, cut at white space where there is some nearby."""
    edges = [0]
    for i in range(1, n):
        at = i * len(text) // n
        space = re.compile(r"\s").search(text, at, at + 200)
        edges.append(space.start() if space else at)
    edges.append(len(text))
    return [text[a:b].strip() for a, b in zip(edges, edges[1:])]
