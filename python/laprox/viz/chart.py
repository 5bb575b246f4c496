"""A chart as such: drawn at any width, in one look, as an SVG for pages or as a PNG."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from laprox import extras
from laprox.viz.text import visible

extras.need("report", "laprox.viz")

import matplotlib  # noqa: E402
from matplotlib.colors import LinearSegmentedColormap  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

WIDE, NARROW = 720, 344  # pixels of a chart on a screen and on a phone

# In a page these become CSS variables, which follow the reader's light or dark scheme; colours of data are the same in both.
INK, MUTED, RULE, PAPER = "#1b1e24", "#5b626e", "#dcdfe4", "#fffffe"
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)", PAPER: "var(--paper)"}

ACCENT = "#d06a00"
QUIET = "#8b919b"

# The page's shades of text and the maps of numbers go from "nothing" to "everything" in the same order: dark blue to yellow
# is read alike by everyone, in grey too, and shows on white and on black.
MAP = LinearSegmentedColormap.from_list("laprox", ["#22305e", "#4a5580", "#83828a", "#b79f72", "#e3bd4f", "#ffe16b"])

_STYLE: dict[str, Any] = {
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "text.color": INK,
    "text.parse_math": False,  # names come from the user: a $ is a $
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 12,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "lines.linewidth": 2.0,
    "lines.markersize": 6.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "laprox",  # the same chart is the same file
}


@dataclass(frozen=True)
class Chart:
    """A picture that can be drawn at any width.

    Attributes:
        alt: What it shows, in a sentence, for those who don't see it.
        draw: Makes the figure, so many pixels wide. Units are pixels at 72 per inch.
    """

    alt: str
    draw: Callable[[int], Figure]

    def svg(self, width: int = WIDE) -> str:
        """An `<svg>` element for a page that defines the CSS variables --ink, --muted, --rule, --paper and --font."""
        file = io.StringIO()
        with _look():
            self.draw(width).savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        return _for_a_page(file.getvalue(), self.alt)

    def save(self, path: str | Path, width: int = WIDE, scale: float = 2.0) -> None:
        """Write a PNG, light, `width * scale` pixels wide (or an SVG or PDF, by the suffix).

        Raises:
            OSError: It can't be written.
            ValueError: matplotlib doesn't know the suffix.
        """
        with _look({"svg.fonttype": "path"}):
            self.draw(width).savefig(path, dpi=72 * scale, facecolor="white")


@contextlib.contextmanager
def _look(changes: Mapping[str, Any] | None = None) -> Iterator[None]:
    style: Any = {**_STYLE, **(changes or {})}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # names and documents are in any script
        yield


def _for_a_page(svg: str, alt: str) -> str:
    """matplotlib's SVG file as an element of an HTML page: scheme colours, the page's font, ids of its own."""
    svg = visible(svg[svg.index("<svg") :])
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r"font: ([^;\"]*?px) '[^;\"]*", r"font: \1 var(--font)", svg)
    prefix = f"c{zlib.crc32(svg.encode()):08x}-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\g<1>{prefix}", svg)
    opening = re.compile(r'<svg ([^>]*?)width="[^"]*"([^>]*?)height="[^"]*"|<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"')
    return opening.sub(
        lambda m: f'<svg role="img" aria-label="{escape(visible(alt))}" ' + "".join(g for g in m.groups() if g), svg, count=1
    )
