"""Training batches, each a function of (seed, stage, step) alone."""
from __future__ import annotations

import os
import random
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np

from common import documents

END = 0  # <|endoftext|>, the padding
START_TURN = "<|im_start|>user\n"


@lru_cache(None)
def _sentences() -> tuple[tuple[str, ...], ...]:
    """Sentences of the books in LAPROX_BOOKS (plain text files), if any."""
    folder, books = os.environ.get("LAPROX_BOOKS"), []
    for path in sorted(Path(folder).glob("*.txt")) if folder else ():
        flat = " ".join(path.read_text(errors="replace").split())
        books.append(tuple(s for s in re.split(r"(?<=[.!?]) ", flat) if 20 < len(s) < 160 and s.isascii()))
    return tuple(books)


def chapters(share=1.0):
    for book in _sentences():
        yield book[:int(len(book) * share)]


def prose(rng: random.Random):
    """Consecutive sentences from a random place of a random book."""
    books = _sentences()
    if books:
        book = rng.choice(books)
        at = rng.randrange(len(book))
        while True:
            yield book[at % len(book)]
            at += 1


@lru_cache(None)
def words(least: int, pattern: str) -> tuple[str, ...]:
    """Words of the books that the evaluation uses for nothing, found so often by a pattern."""
    held_out = {w for a in documents.evaluation_words() for w in a.split()}
    seen = Counter(w for part in chapters() for s in part for w in re.findall(pattern, s))
    return tuple(sorted(w for w, n in seen.items() if n >= least and w not in held_out))


ANY = r"\b[a-z]{3,10}\b"
NOUN = (r"\b(?:the|a|his|her|my|their|your|our|its|every|this) ([a-z]{3,10})\b"
        r"(?=[,.;!?]| (?:of|is|was|and|in|to|had|has|for|on|at|with|from|that|were|which|who|by|as)\b)")


def more_attributes(rng: random.Random, n: int) -> list[str]:
    """Nouns, other words and made-up ones (so that they are matched, not known), pairs of them."""
    def word():
        pool = rng.choice((words(4, NOUN), words(3, ANY), ()))
        return rng.choice(pool) if pool else documents.person(rng, "train").lower()

    return [" ".join(word() for _ in range(1 + (rng.random() < 0.15))) for _ in range(n)]


def chats(rng: random.Random, tok, batch, length, split="train", answers=0.45, prose_share=0.5, lm=0.0,
          share=(0.35, 0.8), rephrased=0.25, kinds=documents.KINDS, density=40, restate=False, stress=1.0):
    """A document, then questions with answers until the row is full; the answers are supervised.

    restate: no questions; all facts again in another order, which supervises more of the tokens.
    stress: weight of the tokens at which an answer is decided: the first and what follows, of a name or a value.
    Also returns where the answers lie: (row, start, end, kind)."""
    ids, weight, spans = np.full((batch, length), END, np.int64), np.zeros((batch, length), np.float32), []
    turns = {tok.token_to_id(t) for t in ("Ġis", "Ġalso", "Ġof", ".", "ĠThe", "The", "<|im_end|>")}
    for row in range(batch):
        for _ in range(20):
            doc = documents.make_document(
                rng.random(), int(length * (1 - answers)), split=split, kinds=kinds, questions=2 + length // density,
                share=rng.uniform(*share), rephrased=rephrased, count=lambda s: len(s) // 3 + 1,
                prose=prose(rng) if rng.random() < prose_share else None,
                **({"extra": more_attributes(rng, 80), "words": words(3, ANY)} if split == "train" else {}))
            if doc.questions:
                break
        rng.shuffle(doc.questions)
        flat = tok.encode(f"<|im_start|>user\n{doc.text}\n\n").ids
        weight[row, :len(flat)] = lm
        while restate and len(flat) < length:
            for f in rng.sample(doc.facts, len(doc.facts)):
                told = tok.encode(f"The {f.attribute} of {f.name} is").ids
                value = tok.encode(f" {f.value}.\n").ids
                weight[row, len(flat):len(flat) + len(told)] = 0.1
                flat += told
                weight[row, len(flat):len(flat) + len(value)] = 1
                flat += value
            doc.questions = []
        for i, q in enumerate(doc.questions):
            flat += tok.encode(f"{START_TURN * (i > 0)}{q.text}<|im_end|>\n<|im_start|>assistant\n").ids
            answer = tok.encode(q.answer + "<|im_end|>").ids
            if len(flat) + len(answer) > length:
                break
            spans.append((row, len(flat), len(flat) + len(answer), q.kind))
            decided = [stress if a in turns or b in turns else 1 for a, b in zip(answer, [END] + answer)]
            weight[row, len(flat):len(flat) + len(answer)] = decided
            flat += answer + tok.encode("\n").ids
        flat = flat[:length]
        ids[row, :len(flat)] = flat
    return ids, weight, spans
