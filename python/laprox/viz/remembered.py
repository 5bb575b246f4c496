"""What a Llama remembers of the text that it has seen, gathered from `llm.kv`."""

from __future__ import annotations

import codecs
import ctypes
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import llama_cpp
import numpy as np
import numpy.typing as npt

from laprox.config import KVConfig
from laprox.kv import KVStats
from laprox.viz.text import visible

if TYPE_CHECKING:
    from laprox.llama import Llama

# Shades of the text: the share of (layer, KV head) pairs up to which each goes; the last is for all of them. The same for every
# model and document, so that pictures can be compared; finer at the low end, where most of a compressed text is.
SHADES = (0.05, 0.10, 0.20, 0.35, 0.50, 0.75, 1.0, 1.0)
MUCH = 3  # the shade from which what came back is shown: a little comes back nearly everywhere


@dataclass(frozen=True)
class Remembered:
    """A text and what is held of it.

    Attributes:
        pieces: The bytes of each token seen, in order; a character may be spread over several.
        control: [tokens] whether a token is one of the model's own, such as the beginning of a turn.
        held: {layer: bool [KV heads, tokens]}, as `llm.kv.held()` gives it.
        scores: {layer: float32 [KV heads, tokens]}, NaN where there is none; empty if nobody asked.
        config: The settings that were in force.
        stats: The cache in numbers.
        n_ctx: Tokens that the context has room for.
        marks: Positions with a name: {"question": 2013}.
        before: As `held`, what of this text was held before it was chosen anew, for another question; tokens that are new since
            then count as held. None: nobody asked before.
    """

    pieces: list[bytes]
    control: npt.NDArray[np.bool_]
    held: dict[int, npt.NDArray[np.bool_]]
    scores: dict[int, npt.NDArray[np.float32]]
    config: KVConfig
    stats: KVStats
    n_ctx: int
    marks: dict[str, int] = field(default_factory=dict)
    before: dict[int, npt.NDArray[np.bool_]] | None = None

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """All (layer, KV head), in the order of `rows`."""
        return [(layer, head) for layer, heads in self.held.items() for head in range(len(heads))]

    @property
    def rows(self) -> npt.NDArray[np.bool_]:
        """What each pair holds: [pairs, tokens]."""
        return np.concatenate(list(self.held.values()))

    @property
    def rows_before(self) -> npt.NDArray[np.bool_]:
        """The same of `before`; without it, of nothing."""
        return np.zeros_like(self.rows) if self.before is None else np.concatenate(list(self.before.values()))

    @property
    def came(self) -> npt.NDArray[np.bool_]:
        """What each pair holds now and didn't before: [pairs, tokens]."""
        return self.rows & ~self.rows_before

    @property
    def entries(self) -> npt.NDArray[np.float64]:
        """How many entries each head kept: [layers, most heads], NaN where a layer has fewer heads."""
        table = np.full((len(self.held), max(map(len, self.held.values()))), np.nan)
        for row, heads in zip(table, self.held.values()):
            row[: len(heads)] = heads.sum(1)
        return table


@dataclass(frozen=True)
class Cell:
    """The shortest part of the text that is whole tokens and whole characters.

    Attributes:
        text: Safe to show: control characters and what would turn the reading direction around are made visible.
        start: The first token,
        stop: and the one after the last.
        control: One of the model's own tokens.
    """

    text: str
    start: int
    stop: int
    control: bool


def look(
    llm: Llama,
    scores: dict[int, npt.NDArray[np.float32]] | None = None,
    marks: Mapping[str, int] | None = None,
    before: Remembered | None = None,
) -> Remembered:
    """What a Llama holds now.

    Args:
        llm: One whose cache is compressed.
        scores: Of all entries, taken with `score_all` before something was evicted; None scores what is held now.
        marks: Positions to show by name.
        before: What it held when the last question was asked, of a text that begins alike.

    Raises:
        LaproxError: Its cache is not compressed; or it can't be scored.
        ValueError: It has seen nothing yet.
    """
    stats = llm.kv.stats()
    if not stats.tokens_seen:
        raise ValueError("nothing was read yet, so there is nothing to show")
    tokens = [int(token) for token in llm.input_ids[: stats.tokens_seen]]
    vocabulary = llama_cpp.llama_model_get_vocab(llm.model)
    control = np.array([llama_cpp.llama_vocab_is_control(vocabulary, token) for token in tokens], bool)
    pieces, held = [_piece(vocabulary, token) for token in tokens], llm.kv.held()
    return Remembered(
        pieces,
        control,
        held,
        score_all(llm) if scores is None else scores,
        llm.kv.config,
        stats,
        llm.n_ctx(),
        dict(marks or {}),
        None if before is None else _held_before(before, pieces, held),
    )


def score_all(llm: Llama) -> dict[int, npt.NDArray[np.float32]]:
    """`llm.kv.scores()` by token: {layer: float32 [KV heads, positions seen]}, NaN where nothing is held.

    Empty under the policy "full", which scores nothing.
    """
    if llm.kv.config.policy == "full":
        return {}
    n = llm.kv.stats().tokens_seen
    dense = {layer: np.full((n_head_kv, n), np.nan, np.float32) for layer, n_head_kv in llm.kv.layers.items()}
    for layer, heads in llm.kv.scores().items():
        for head, values in enumerate(heads):
            dense[layer][head, llm.kv.positions(layer, head)] = values
    return dense


def cells(remembered: Remembered) -> list[Cell]:
    """The text, cut where both a token and a character end."""
    made: list[Cell] = []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text, start = "", 0
    for i, (piece, control) in enumerate(zip(remembered.pieces, remembered.control)):
        if control:
            if start < i:
                made.append(Cell(visible(text + decoder.decode(b"", True)), start, i, False))
            decoder.reset()
            made.append(Cell(visible(piece.decode(errors="replace")), i, i + 1, True))
            text, start = "", i + 1
            continue
        text += decoder.decode(piece)
        if not text or decoder.getstate()[0] or text.endswith("\r"):  # which may be half of a line break
            continue
        if made and start and _joins(made[-1], text):
            before = made.pop()
            made.append(Cell(before.text + visible(text), before.start, i + 1, False))
        else:
            made.append(Cell(visible(text), start, i + 1, False))
        text, start = "", i + 1
    if start < len(remembered.pieces):
        made.append(Cell(visible(text + decoder.decode(b"", True)), start, len(remembered.pieces), False))
    return made


def held_by(remembered: Remembered, parts: Sequence[Cell]) -> npt.NDArray[np.bool_]:
    """Which pairs hold a cell, that is, any token of it, or have it back where that is known: [pairs, cells]."""
    return np.logical_or.reduceat(remembered.came, [cell.start for cell in parts], axis=1)


def shade(count: int, n_pairs: int) -> int:
    """0 for what nothing holds, up to len(SHADES) for what all pairs do."""
    if count in (0, n_pairs):
        return len(SHADES) if count else 0
    return 1 + next(i for i, top in enumerate(SHADES) if count <= top * n_pairs)


def levels(remembered: Remembered, parts: Sequence[Cell]) -> npt.NDArray[np.int64]:
    """The shade of each cell."""
    counts, n_pairs = held_by(remembered, parts).sum(0), len(remembered.pairs)
    return np.array([shade(int(count), n_pairs) for count in counts])


def least(remembered: Remembered, shades: npt.NDArray[np.int64]) -> int:
    """The shade from which a cell is shown, not only its neighbours."""
    return 1 if remembered.before is None else max(1, min(MUCH, int(shades.max(initial=0))))


def legend(n_pairs: int) -> list[tuple[int, str]]:
    """The shades that this many pairs can have, and the counts that each stands for."""
    ranges: dict[int, tuple[int, int]] = {}
    for count in range(1, n_pairs + 1):
        low, _ = ranges.get(shade(count, n_pairs), (count, count))
        ranges[shade(count, n_pairs)] = (low, count)
    return [(0, "0")] + [(level, str(low) if low == high else f"{low}–{high}") for level, (low, high) in ranges.items()]


def _held_before(
    before: Remembered, pieces: Sequence[bytes], held: Mapping[int, npt.NDArray[np.bool_]]
) -> dict[int, npt.NDArray[np.bool_]]:
    """What was held of the tokens that both texts begin with; all others are new."""
    n = next((i for i, pair in enumerate(zip(before.pieces, pieces)) if pair[0] != pair[1]), min(len(before.pieces), len(pieces)))
    made = {layer: np.ones_like(heads) for layer, heads in held.items()}
    for layer, heads in made.items():
        heads[:, :n] = before.held[layer][:, :n]
    return made


def _joins(before: Cell, text: str) -> bool:
    """Whether a character begins in one token and is changed by the next: accents, emoji sequences."""
    if before.control or not before.text:
        return False
    first = text[0]
    modifies = unicodedata.category(first) in ("Mn", "Me") or first == "\u200d" or "\U0001f3fb" <= first <= "\U0001f3ff"
    return modifies or before.text[-1] == "\u200d"


def _piece(vocabulary: ctypes.c_void_p, token: int) -> bytes:
    room = 64
    while True:
        buffer = ctypes.create_string_buffer(room)
        n = llama_cpp.llama_token_to_piece(vocabulary, token, buffer, room, 0, True)
        if n >= 0:
            return buffer.raw[:n]
        room = -n
