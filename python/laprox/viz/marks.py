"""How the lines of a chart are told apart: the same for a policy in every chart."""

from __future__ import annotations

import re
import zlib
from typing import Any, NamedTuple

from laprox.viz.chart import ACCENT, INK, QUIET


class Mark(NamedTuple):
    """How one line is told from the others, by more than its colour."""

    colour: str
    marker: str
    dash: Any


_BLUE, _GREEN, _ROSE, _INDIGO, _BROWN, _TEAL, _RED, _OLIVE = (
    "#1f7ac0", "#0f9467", "#c25a97", "#7568d8", "#94701d", "#1b8f9e", "#cf4a4a", "#6f8722",
)  # fmt: skip
SOLID, DASHED, DOTTED, MIXED = "-", (0, (5, 2)), (0, (1.4, 1.6)), (0, (6, 2, 1.4, 2))
_MARKS = {
    "full": Mark(INK, "*", DASHED),
    "off": Mark(INK, "*", DASHED),
    "laprox": Mark(ACCENT, "o", SOLID),
    "lukv": Mark(_RED, "D", SOLID),
    "retention": Mark(_ROSE, "h", SOLID),
    "snapkv": Mark(_BLUE, "s", SOLID),
    "pyramidkv": Mark(_BLUE, "^", DASHED),
    "adakv": Mark(_GREEN, "^", SOLID),
    "criticalkv": Mark(_INDIGO, "D", SOLID),
    "defensivekv": Mark(_INDIGO, "v", DASHED),
    "cake": Mark(_TEAL, "P", SOLID),
    "lava": Mark(_TEAL, "X", DASHED),
    "rkv": Mark(_BROWN, "p", SOLID),
    "tova": Mark(_BROWN, "<", DASHED),
    "expected": Mark(_OLIVE, "h", SOLID),
    "kvzip": Mark(_GREEN, "D", SOLID),
    "energy": Mark(ACCENT, "P", SOLID),
    "keydiff": Mark(_GREEN, "v", DASHED),
    "knorm": Mark(_OLIVE, ">", DASHED),
    "streaming": Mark(QUIET, "s", SOLID),
    "random": Mark(QUIET, "x", DOTTED),
    "q8_0": Mark(_ROSE, "P", DOTTED),
    "q4_0": Mark(_ROSE, "X", DOTTED),
    "shorter": Mark(_BROWN, "v", DOTTED),
}
_COLOURS = [ACCENT, _BLUE, _GREEN, _ROSE, _INDIGO, _BROWN, _TEAL, _RED, _OLIVE]
_SHAPES = "os^DvPXph<>"


def mark(name: str) -> Mark:
    """The colour, marker and dash of a policy or other contender: the same in every chart, whatever else is in it.

    Known are the named policies, "full", "q8_0", "q4_0" and "shorter" (context), and these followed by more: "laprox q8_0" and
    "laprox:uniform" have laprox's colour and dashes of their own. Any other name always gets the same mark, too.
    """
    if name in _MARKS:
        return _MARKS[name]
    first, rest = re.match(r"([\w.-]*)(.*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
    number = zlib.crc32(rest.encode()) if rest else 0
    if first in _MARKS:
        base = _MARKS[first]
        return base._replace(dash=(DOTTED, MIXED)[number % 2], marker=_SHAPES[number % len(_SHAPES)])
    number = zlib.crc32(name.encode())
    return Mark(_COLOURS[number % 9], _SHAPES[number // 9 % 11], (SOLID, DASHED, DOTTED, MIXED)[number // 99 % 4])
