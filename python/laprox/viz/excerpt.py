"""Shaded text as a chart: for pictures, where nobody can scroll."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.patches import Rectangle

from laprox.viz.chart import INK, MUTED, RULE, Chart
from laprox.viz.remembered import SHADES, Cell, Remembered, cells, held_by, legend, shade
from laprox.viz.text import shortened

# Those of the page in its light scheme (templates/remembered.css).
FILLS = ("none", "#fff1cf", "#ffe5ab", "#ffd684", "#ffc45e", "#ffae42", "#f9962c", "#ee7f1c", "#e06a0f")
GONE = "#6c727d"

# For what DejaVu doesn't have, where they are installed; boxes elsewhere. The HTML page has the browser's fonts.
FALLBACKS = (
    "Noto Sans Mono CJK SC",
    "Noto Sans CJK SC",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Noto Sans",
    "Noto Emoji",
)

COLUMN, LINE = 6.9, 19.0  # pixels of a character


class Run(NamedTuple):
    """A piece of one line."""

    column: int
    text: str
    level: int


def excerpt(remembered: Remembered, n_lines: int, title: str = "", lead: str = "") -> Chart:
    """The text in lines, shaded; of a long text the `n_lines` of which most is kept, in their order."""
    parts = cells(remembered)
    counts = held_by(remembered, parts).sum(0).tolist()
    n_pairs = len(remembered.pairs)
    return Chart("The text, shaded by what is kept", lambda width: _draw(width, parts, counts, n_pairs, n_lines, title, lead))


def wrap(parts: Sequence[Cell], counts: Sequence[int], n_pairs: int, columns: int) -> list[list[Run]]:
    """Lines of at most so many columns, broken at spaces where there are any."""
    text = [(c, shade(count, n_pairs)) for cell, count in zip(parts, counts) for c in cell.text.replace("\t", "    ")]
    lines: list[list[Run]] = []
    start = 0
    while start < len(text):
        end, used, space = start, 0, None
        while end < len(text) and text[end][0] != "\n" and (used + _columns(text[end][0]) <= columns or text[end][0] == " "):
            used += _columns(text[end][0])
            end += 1
            if text[end - 1][0] == " ":
                space = end
        whole = end == len(text) or text[end][0] == "\n"
        if not whole and space is not None:
            end = space
        end = max(end, start + (not whole))  # a character wider than a line
        lines.append(_runs(text[start:end]))
        start = end + (end < len(text) and text[end][0] == "\n")
    return lines


def _runs(characters: Sequence[tuple[str, int]]) -> list[Run]:
    runs: list[Run] = []
    at = 0
    for level, group in itertools.groupby(characters, key=lambda pair: pair[1]):
        text = "".join(c for c, _ in group)
        runs.append(Run(at, text, level))
        at += _columns(text)
    return runs


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


def _draw(width: int, parts: Sequence[Cell], counts: Sequence[int], n_pairs: int, n_lines: int, title: str, lead: str) -> Figure:
    lines = wrap(parts, counts, n_pairs, int((width - 16) / COLUMN))
    shown = choose(lines, n_lines)
    gaps = sum(b > a + 1 for a, b in zip([-1, *shown], [*shown, len(lines)]))
    height = 34 + 26 * bool(title) + 22 * bool(lead) + (len(shown) + 0.75 * gaps) * LINE + 8
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    installed = set(fontManager.get_font_names())
    families = ["DejaVu Sans Mono", "DejaVu Sans", *(name for name in FALLBACKS if name in installed)]
    y = 0.0
    if title:
        axes.text(6, y + 15, shortened(title, width // 9), fontsize=14, fontweight="bold", color=INK)
        y += 26
    if lead:
        axes.text(6, y + 12, shortened(lead, width // 8), fontsize=12, color=MUTED)
        y += 22
    _draw_legend(axes, y + 4, n_pairs)
    y += 34
    for before, number in zip([-1, *shown], [*shown, len(lines)]):
        if number > before + 1:
            left_out = number - before - 1
            axes.text(6, y + 0.37 * LINE, f"⋯ {left_out} more line{'s' * (left_out > 1)}", fontsize=9.5, color=MUTED, va="center")
            y += 0.75 * LINE
        if number < len(lines):
            _draw_line(axes, y, lines[number], families)
            y += LINE
    return figure


def _draw_line(axes: Axes, y: float, line: Sequence[Run], families: list[str]) -> None:
    for run in line:
        left = 6 + run.column * COLUMN
        if run.level and run.text.strip():
            axes.add_patch(
                Rectangle(
                    (left - 0.3, y + 1.5), _columns(run.text) * COLUMN + 0.6, LINE - 3, facecolor=FILLS[run.level], linewidth=0
                )
            )
        # Word by word, or character by character, so that what is wider than expected moves nothing else.
        for word in re.finditer(r"[!-~]+|\S", run.text):
            axes.text(
                left + _columns(run.text[: word.start()]) * COLUMN, y + 0.68 * LINE, word[0],
                fontsize=COLUMN / 0.602, family=families, color=INK if run.level else GONE,
            )  # fmt: skip


def _draw_legend(axes: Axes, y: float, n_pairs: int) -> None:
    axes.text(6, y + 13, "held by", fontsize=11, color=MUTED)
    x = 62.0
    for level, counts in legend(n_pairs):
        width = 18 + 7 * len(counts)
        axes.add_patch(Rectangle((x, y), width, 18, facecolor=FILLS[level], linewidth=0 if level else 0.8, edgecolor=RULE))
        axes.text(x + width / 2, y + 13, counts, fontsize=11, color=INK if level else GONE, ha="center")
        x += width
    axes.text(x + 8, y + 13, f"of {n_pairs} pairs of a layer and a KV head", fontsize=11, color=MUTED)


def _columns(text: str) -> int:
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )
