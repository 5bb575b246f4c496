"""Training batches, each a function of (seed, stage, step) alone."""
from __future__ import annotations

import os
import random
import re
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
def nouns() -> tuple[str, ...]:
    """More attribute names for training: words of the books that the evaluation does not use."""
    held_out = {w for kind in ("person", "city", "room")
                for a, _ in documents.attributes("eval", kind) for w in a.split()}
    seen = {}
    for part in chapters():
        for s in part:
            for w in re.findall(r"\b(?:the|a) ([a-z]{4,9}) (?:of|is|was)\b", s):
                seen[w] = seen.get(w, 0) + 1
    return tuple(sorted(w for w, n in seen.items() if n >= 3 and w not in held_out))


def chunks(rng: np.random.Generator, batch, length, vocab, pool=0, size=8):
    """Random tokens in chunks, then the same chunks in another order: only matching predicts the second half.

    With `pool`, a row uses that many different tokens, so that one token is no longer enough to match."""
    n = length // 2 // size
    size_, half = size, n * size
    x = rng.integers(3, vocab, (batch, half))
    if pool:
        x = np.take_along_axis(rng.integers(3, vocab, (batch, pool)), rng.integers(0, pool, (batch, half)), 1)
    x = x.reshape(batch, n, size_)
    y = np.take_along_axis(x, rng.random((batch, n)).argsort(1)[:, :, None], 1)
    ids = np.concatenate([x.reshape(batch, -1), y.reshape(batch, -1)], 1)
    weight = np.zeros(ids.shape, np.float32)
    weight[:, half:].reshape(batch, n, size_)[:, :, (3 if pool else 1):] = 1
    return ids, weight, []


def chats(rng: random.Random, tok, batch, length, split="train", answers=0.45, prose_share=0.5, lm=0.0,
          share=(0.35, 0.8), rephrased=0.25, kinds=documents.KINDS, density=40):
    """A document, then questions with answers until the row is full; the answers are supervised.

    Also returns where the answers lie: (row, start, end, kind)."""
    ids, weight, spans = np.full((batch, length), END, np.int64), np.zeros((batch, length), np.float32), []
    for row in range(batch):
        for _ in range(20):
            doc = documents.make_document(
                rng.random(), int(length * (1 - answers)), split=split, kinds=kinds, questions=2 + length // density,
                share=rng.uniform(*share), rephrased=rephrased, count=lambda s: len(s) * 10 // 28 + 1,
                prose=prose(rng) if rng.random() < prose_share else None,
                extra=rng.sample(nouns(), 12) if nouns() and split == "train" else ())
            if doc.questions:
                break
        rng.shuffle(doc.questions)
        flat = tok.encode(f"<|im_start|>user\n{doc.text}\n\n").ids
        weight[row, :len(flat)] = lm
        for i, q in enumerate(doc.questions):
            flat += tok.encode(f"{START_TURN * (i > 0)}{q.text}<|im_end|>\n<|im_start|>assistant\n").ids
            answer = tok.encode(q.answer + "<|im_end|>").ids
            if len(flat) + len(answer) > length:
                break
            spans.append((row, len(flat), len(flat) + len(answer), q.kind))
            weight[row, len(flat):len(flat) + len(answer)] = 1
            flat += answer + tok.encode("\n").ids
        flat = flat[:length]
        ids[row, :len(flat)] = flat
    return ids, weight, spans
