"""Shaded text as a chart: for pictures, where nobody can scroll."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from laprox.viz.charts import INK, MUTED, Chart
from laprox.viz.remembered import SHADES, Cell, Remembered, cells, held_by, shade

# Those of the page in its light scheme (templates/remembered.css).
FILLS = ("none", "#fff1cf", "#ffe5ab", "#ffd684", "#ffc45e", "#ffae42", "#f9962c", "#ee7f1c", "#e06a0f")
GONE = "#6c727d"

COLUMN, LINE = 6.9, 19.0  # pixels of a character


class Run(NamedTuple):
    """A piece of one line."""

    column: int
    text: str
    level: int


def excerpt(remembered: Remembered, n_lines: int) -> Chart:
    """The text in lines, shaded; of a long text the `n_lines` of which most is kept, in their order."""
    parts = cells(remembered)
    counts = held_by(remembered, parts).sum(0).tolist()
    n_pairs = len(remembered.pairs)
    chosen = "" if len(wrap(parts, counts, n_pairs, 130)) <= n_lines else f": the {n_lines} lines of which most is kept"
    return Chart(f"The text, shaded by what is kept{chosen}", lambda width: _draw(width, parts, counts, n_pairs, n_lines))


def wrap(parts: Sequence[Cell], counts: Sequence[int], n_pairs: int, columns: int) -> list[list[Run]]:
    """Lines of at most so many columns, broken before a word where one begins with a space."""
    lines: list[list[Run]] = [[]]
    at = 0
    for cell, count in zip(parts, counts):
        for i, text in enumerate(cell.text.replace("\t", "    ").split("\n")):
            if i:
                lines.append([])
                at = 0
            while text:
                if at and at + _columns(text) > columns:
                    lines.append([])
                    at, text = 0, text.lstrip(" ")
                    continue
                head = text
                while _columns(head) > columns:  # one long token
                    head = head[: max(1, len(head) // 2)]
                lines[-1].append(Run(at, head, shade(count, n_pairs)))
                at += _columns(head)
                text = text[len(head) :]
    return lines


def choose(lines: Sequence[Sequence[Run]], n: int, passage: int = 3) -> list[int]:
    """The numbers of n lines: the passages, of a few lines each, that most is kept of."""
    # Squares: a few tokens that everyone holds say more than many that somebody holds.
    weights = np.array([sum(SHADES[run.level - 1] ** 2 * len(run.text) for run in line if run.level) for line in lines])
    chosen: set[int] = set()
    for middle in np.argsort(weights, kind="stable")[::-1].tolist():
        around = set(range(max(0, middle - passage // 2), min(len(lines), middle + passage // 2 + 1))) - chosen
        if middle not in chosen and len(chosen) + len(around) <= n:
            chosen |= around
    return sorted(chosen) or list(range(min(n, len(lines))))


def _draw(width: int, parts: Sequence[Cell], counts: Sequence[int], n_pairs: int, n_lines: int) -> Figure:
    lines = wrap(parts, counts, n_pairs, int((width - 24) / COLUMN))
    shown = choose(lines, n_lines)
    gaps = sum(b > a + 1 for a, b in zip(shown, shown[1:]))
    height = (len(shown) + 0.6 * gaps) * LINE + 16
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    y, before = 8.0, None
    for number in shown:
        if before is not None and number > before + 1:
            axes.text(12, y + 0.3 * LINE, f"⋯ {number - before - 1} lines", fontsize=8.5, color=MUTED, va="center")
            y += 0.6 * LINE
        for run in lines[number]:
            left = 12 + run.column * COLUMN
            if run.level and run.text.strip():
                axes.add_patch(Rectangle((left - 0.3, y + 1.5), _columns(run.text) * COLUMN + 0.6, LINE - 3, facecolor=FILLS[run.level], linewidth=0))
            # Word by word, or character by character, so that what is wider than expected moves nothing else.
            for word in re.finditer(r"[!-~]+|\S", run.text):
                axes.text(
                    left + _columns(run.text[: word.start()]) * COLUMN, y + 0.68 * LINE, word[0], fontsize=COLUMN / 0.602, family="monospace",
                    color=INK if run.level else GONE,
                )  # fmt: skip
        y, before = y + LINE, number
    return figure


def _columns(text: str) -> int:
    return sum(0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
