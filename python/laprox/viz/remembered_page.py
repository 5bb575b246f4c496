"""What is remembered of a text, as an HTML page."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from html import escape

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from laprox import __version__
from laprox.config import KVConfig
from laprox.viz.chart import Chart
from laprox.viz.charts import along, distributions, exchange, heat_map
from laprox.viz.page import Page, template
from laprox.viz.remembered import Cell, Remembered, cells, held_by, least, legend, levels, shade
from laprox.viz.text import allocated_without, size

AROUND = 12  # pieces of text shown beside those that much came back to


def page(
    remembered: Remembered, model: str, document: str = "", question: str = "", later: Sequence[tuple[str, Remembered]] = ()
) -> Page:
    """The page.

    Args:
        remembered: What to show.
        model: Its name, as people know it.
        document: The same of the document.
        question: What was asked about it; "" if nothing was, yet.
        later: Questions that were asked then, and what was remembered after each.
    """
    made = Page(*heading(remembered, model, document, question))
    made.facts(numbers(remembered))

    made.section("The text")
    made.text(
        f"Every token is shaded by how many of the {len(remembered.pairs)} pairs of a layer and a KV head still hold it. "
        "Point at one, or walk with the arrow keys, to see which."
    )
    parts = cells(remembered)
    held = held_by(remembered, parts)
    counts = held.sum(0)
    some = counts > 0
    bits = np.packbits(held[:, some], axis=1)
    box = template(
        "remembered.html",
        style=template("remembered.css"),
        text=Markup(_marked_up(parts, counts, len(held), remembered.marks)),
        bits=base64.b64encode(zlib.compress(bits.tobytes(), 9)).decode(),
        stride=bits.shape[1],
        n_pairs=len(held),
        pairs=remembered.pairs,
        entries=remembered.rows.sum(1).tolist(),
        layers=[[layer, len(heads)] for layer, heads in remembered.held.items()],
        starts=" ".join(str(cell.start) for cell, any_ in zip(parts, some) if any_),
        shades=legend(len(held)),
    )
    made.html(box, template("remembered.js"))

    pictures = charts_of(remembered)
    made.section("The numbers")
    made.figure(pictures["along"], "Above, the share of all entries at a position that are kept; below, of those of each layer.")
    made.figure(pictures["heads"], "Entries that each KV head kept. How uneven they are is for the policy to say.")
    if "scores" in pictures:
        made.figure(
            pictures["scores"],
            f"How the scores of {policy_name(remembered.config)} are spread in each layer: the kept entries in colour, in front "
            "of all that were scored; heights are square roots of counts. Scores are as the policy defines them. Pooling, and how "
            "heads and layers share the budget, come after, so a kept entry may score less than an evicted one.",
        )
    for asked, now in later:
        _brought_back(made, asked, now)
    made.details(settings(remembered))
    return made


def _brought_back(made: Page, question: str, now: Remembered) -> None:
    made.section(f"What “{question}” brought back")
    came = now.came
    made.figure(
        exchange(now.rows_before, now.rows, marks=now.marks),
        f"{came.sum():,} entries came back: of all that was seen, those that this question needs are held now, in place of others.",
    )
    if not came.any():
        return
    parts = cells(now)
    counts, shades = held_by(now, parts).sum(0), levels(now, parts)
    near = np.convolve(shades >= least(now, shades), np.ones(2 * AROUND + 1), "same") > 0
    made.html(
        template("came_back.html", text=Markup(_marked_up(parts, counts, len(came), now.marks, near)), shades=legend(len(came)), n_pairs=len(came))
    )


def heading(remembered: Remembered, model: str, document: str = "", question: str = "") -> tuple[str, str]:
    """What it is, and how it came about."""
    stats = remembered.stats
    when = f" with “{question}” in view" if question else " before any question" if document else ""
    return (
        f"What {model} remembers" + (f" of {document}" if document else ""),
        f"{stats.entries_held / stats.entries_full:.1%} of the entries, chosen by {policy_name(remembered.config)}{when}.",
    )


def charts_of(remembered: Remembered) -> dict[str, Chart]:
    """The charts that go with the text: "along" it, by "heads", and "scores" where there are any."""
    layers = list(remembered.held)
    made = {
        "along": along(
            [heads.mean(0) for heads in remembered.held.values()],
            title="Where in the text",
            layers=layers,
            marks=remembered.marks,
        ),
        "heads": heat_map(remembered.entries, layers=layers, title="Entries kept"),
    }
    if remembered.scores:
        made["scores"] = distributions(remembered.scores, remembered.held, title="Scores")
    return made


def numbers(remembered: Remembered) -> dict[str, str]:
    """The few numbers that everyone should see."""
    stats = remembered.stats
    return {
        "tokens seen": f"{stats.tokens_seen:,}",
        "entries held": f"{stats.entries_held:,} of {stats.entries_full:,}",
        "share": f"{stats.entries_held / stats.entries_full:.1%}",
        "KV cache": f"{size(stats.kv_bytes)}, not {size(allocated_without(stats, remembered.n_ctx))}",
    }


def settings(remembered: Remembered) -> dict[str, str]:
    """How the cache was set, and laprox's version."""
    config = remembered.config
    names = [field.name for field in fields(config) if field.name != "policy"]
    chosen = {name: str(getattr(config, name)) for name in names if getattr(config, name) is not None}
    return {"policy": policy_name(config), **chosen, "compressions": str(remembered.stats.compressions), "laprox": __version__}


def policy_name(config: KVConfig) -> str:
    """As the user named it; one of Python by its class."""
    return config.policy if isinstance(config.policy, str) else type(config.policy).__name__


def _marked_up(
    parts: Sequence[Cell],
    counts: npt.NDArray[np.int64],
    n_pairs: int,
    marks: Mapping[str, int],
    shown: npt.NDArray[np.bool_] | None = None,
) -> str:
    """HTML: one <i> for each cell that something holds, and plain text between. Most of the text is between: pages stay small.

    Of what isn't shown, "⋯" is left.
    """
    return "".join(_pieces(parts, counts, n_pairs, marks, np.ones(len(parts), bool) if shown is None else shown))


def _pieces(
    parts: Sequence[Cell], counts: npt.NDArray[np.int64], n_pairs: int, marks: Mapping[str, int], shown: npt.NDArray[np.bool_]
) -> Iterator[str]:
    waiting = sorted((at, name) for name, at in marks.items())
    before = True
    for cell, count, seen in zip(parts, counts.tolist(), shown.tolist()):
        if not seen:
            if before:
                yield " ⋯ "
            before = False
            continue
        before = True
        while waiting and waiting[0][0] < cell.stop:
            yield f"<em>{escape(waiting.pop(0)[1])}</em>"
        text = escape(cell.text)
        if cell.control:
            text = f"<b>{text}</b>"
        level = shade(count, n_pairs)
        yield f"<i class=l{level}>{text}</i>" if level else text
