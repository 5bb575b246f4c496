"""Shaded text in a terminal, or as a picture of one."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console, Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from laprox.files import replacing
from laprox.viz.remembered import Remembered, cells, least, legend, levels

# The dark scheme of the page for backgrounds, which all carry dark or light text of their own: right on any terminal.
_STYLES = (
    Style(dim=True),
    *(Style(color="#fbf3e4", bgcolor=b) for b in ("#33291a", "#47361c", "#5f451c", "#7d581d")),
    *(Style(color="#16130d", bgcolor=b) for b in ("#a9741f", "#d39127", "#f3ad3b", "#ffc966")),
)
_BARS = " ▁▂▃▄▅▆▇█"
LONG, AROUND = 60, 12  # tokens: forgotten stretches longer than this are cut down to so many at either end


def shaded(remembered: Remembered, colours: bool = True) -> Text:
    """The text, shaded by how many (layer, KV head) pairs hold each token, or have it back.

    Long stretches that nothing holds, or to which little came back, are left out, and counted. Without colours, as in a pipe, all of
    them are left out: "⋯" stands there.
    """
    parts = cells(remembered)
    shades = levels(remembered, parts)
    shown = shades >= least(remembered, shades)
    text = Text(no_wrap=False, overflow="fold")
    i = 0
    while i < len(parts):
        if shown[i]:
            text.append(parts[i].text, _STYLES[shades[i]])
            i += 1
            continue
        end = i
        while end < len(parts) and not shown[end]:
            end += 1
        _forgotten(text, [part.text for part in parts[i:end]], colours)
        i = end
    return text


def strip(rows: npt.NDArray[np.bool_], width: int) -> Text:
    """Where in the text these entries lie [pairs, tokens], in one line of so many columns. Heights are roots, as in the charts."""
    share = rows.mean(0)
    edges = np.linspace(0, len(share), min(width, len(share)) + 1).astype(int)
    means = np.add.reduceat(share, edges[:-1]) / np.diff(edges)
    top = means.max() or 1.0
    return Text("".join(_BARS[min(8, int(np.ceil(8 * np.sqrt(mean / top))))] for mean in means))


def heads(remembered: Remembered) -> Table:
    """The entries that each layer's heads kept."""
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("layer", justify="right")
    entries = remembered.entries
    for head in range(entries.shape[1]):
        table.add_column(f"head {head}" if entries.shape[1] <= 12 else str(head), justify="right")
    top = np.nanmax(entries) or 1.0
    for layer, row in zip(remembered.held, entries):
        table.add_row(str(layer), *("" if np.isnan(n) else Text(f"{n:,.0f}", _STYLES[1 + min(7, int(8 * n / top))]) for n in row))
    return table


def key(n_pairs: int, what: str = "held by") -> Text:
    """What the shades mean."""
    text = Text(f"{what} ")
    for level, counts in legend(n_pairs):
        text.append(f" {counts} ", _STYLES[level])
    return text.append(f" of {n_pairs} (layer, KV head) pairs")


def show(remembered: Remembered, console: Console, later: Sequence[tuple[str, Remembered]] = ()) -> None:
    """All of it, then what each later question brought back."""
    colours = console.color_system is not None
    console.print(shaded(remembered, colours))
    console.print()
    if colours:
        console.print(key(len(remembered.pairs)))
        console.print()
    console.print(Group(Text("Where in the text the kept entries lie:"), strip(remembered.rows, console.width)))
    console.print()
    if remembered.entries.shape[1] * 7 <= console.width:
        console.print(Group(Text("Entries kept:"), heads(remembered)))
    for question, now in later:
        console.print()
        _show_exchange(question, now, console)


def _show_exchange(question: str, now: Remembered, console: Console) -> None:
    """What a question brought back, and where in the text that was held, before and after."""
    colours, came = console.color_system is not None, now.came
    console.print(Text(f"What “{question}” brought back: {came.sum():,} entries", Style(bold=True)))
    console.print()
    if came.any():
        console.print(shaded(now, colours))
        console.print()
        if colours:
            console.print(key(came.shape[0], "came back to"))
            console.print()
    for name, rows in (("held before", now.rows_before), ("came back", came), ("held now", now.rows)):
        console.print(Text(f"{name:<13}").append_text(strip(rows, console.width - 13)))


def save(
    remembered: Remembered, path: Path, title: str, later: Sequence[tuple[str, Remembered]] = (), columns: int = 110
) -> None:
    """The same as a picture, an .svg file. Raises OSError if it can't be written."""
    console = Console(record=True, file=io.StringIO(), width=columns, force_terminal=True, color_system="truecolor", legacy_windows=False)
    show(remembered, console, later)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title=title), flags=re.DOTALL)  # they are from the network
    with replacing(path) as unfinished:
        unfinished.write_text(svg, "utf-8")


def _forgotten(text: Text, pieces: list[str], colours: bool) -> None:
    if not colours:
        text.append(" ⋯ " if any(piece.strip() for piece in pieces) else "".join(pieces))
    elif len(pieces) <= LONG:
        text.append("".join(pieces), _STYLES[0])
    else:
        text.append("".join(pieces[:AROUND]), _STYLES[0])
        text.append(f" ⋯ {len(pieces) - 2 * AROUND:,} more ⋯ ", Style(italic=True, dim=True))
        text.append("".join(pieces[-AROUND:]), _STYLES[0])
