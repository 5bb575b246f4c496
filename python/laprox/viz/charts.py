"""The charts: accuracy against bytes, heat maps, distributions. They look alike wherever they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from laprox.viz.chart import ACCENT, INK, MAP, MUTED, PAPER, QUIET, RULE, Chart
from laprox.viz.marks import DOTTED, mark
from laprox.viz.text import shortened, size

_GIVEN_UP = "#4a5580"


@dataclass(frozen=True)
class Line:
    """What one policy or other contender reached.

    Attributes:
        name: Shown, and decides the colour (see `mark`).
        bytes: Of cache, one per measurement; or whatever else the budget is counted in. All above 0.
        values: What was reached with them.
        errors: Standard errors of the values; None shows none. NaN for a value without one.
    """

    name: str
    bytes: Sequence[float]
    values: Sequence[float]
    errors: Sequence[float] | None = None


def against_bytes(
    lines: Sequence[Line],
    reference: Line | None = None,
    *,
    title: str = "",
    y: str = "right answers",
    x: str = "KV cache",
    percent: bool = True,
    log_y: bool = False,
    share: bool = False,
    height: int = 380,
) -> Chart:
    """What is reached with how many bytes: a line per policy, with standard errors. The x axis is logarithmic.

    Args:
        lines: One per policy. A single point (a q8_0 cache) is a marker.
        reference: The full cache, a single point: a dashed line from side to side that the others are to reach.
        title: Over the chart.
        y: What the values are; its axis.
        x: What the bytes are of; its axis.
        percent: Values are shares, 0 to 1, and shown as 0 to 100%.
        log_y: Logarithmic values (KL divergence); values of 0 or less are then left out.
        share: "bytes" are shares of the full cache, 0 to 1, shown in percent.
        height: In pixels, of the axes; the legend comes on top.
    """
    names = ", ".join(line.name for line in lines)
    alt = f"{title or y}: {y} against {x} for {names}"
    return Chart(alt, lambda width: _draw_against_bytes(width, lines, reference, title, y, x, percent, log_y, share, height))


def heat_map(
    values: npt.ArrayLike,
    *,
    title: str = "",
    unit: str = "entries",
    layers: Sequence[int] | None = None,
    percent: bool = False,
) -> Chart:
    """Layers (down) x KV heads (across).

    Args:
        values: [layers, heads]; NaN where there is no such head.
        title: Over the chart.
        unit: What is counted, at the colour bar.
        layers: The model's number of each row; None counts from 0.
        percent: Values are shares, 0 to 1, and shown as 0 to 100%.
    """
    array = np.asarray(values, np.float64)
    numbers = list(range(len(array))) if layers is None else list(layers)
    return Chart(
        f"{title or unit} of each layer and KV head", lambda width: _draw_heat_map(width, array, title, unit, numbers, percent)
    )


def along(
    held: npt.ArrayLike,
    *,
    title: str = "",
    layers: Sequence[int] | None = None,
    marks: Mapping[str, int] | None = None,
) -> Chart:
    """Where in a text the kept entries lie: their share along the positions, over all heads and by layer.

    Args:
        held: [layers, tokens]: the share, 0 to 1, of a layer's KV heads that hold a token.
        title: Over the chart.
        layers: The model's number of each row; None counts from 0.
        marks: Positions to mark, by name: {"question": 2013}.
    """
    array = np.asarray(held, np.float64)
    numbers = list(range(len(array))) if layers is None else list(layers)
    return Chart(
        "Share of the entries kept, by position in the text",
        lambda width: _draw_along(width, array, title, numbers, dict(marks or {})),
    )


def exchange(before: npt.ArrayLike, now: npt.ArrayLike, *, title: str = "", marks: Mapping[str, int] | None = None) -> Chart:
    """Where in a text the entries lie that came back, beside those that stayed; and below the axis, those that went for them.

    Args:
        before: bool [pairs, tokens]: what was held.
        now: The same of what is held.
        title: Over the chart.
        marks: Positions to mark, by name: {"question": 2013}.
    """
    was, is_ = np.asarray(before, bool), np.asarray(now, bool)
    stayed, came, went = (part.mean(0) for part in (was & is_, is_ & ~was, was & ~is_))
    return Chart(
        "Share of the entries that stayed, came back and went, by position in the text",
        lambda width: _draw_exchange(width, stayed, came, went, title, dict(marks or {})),
    )


def distributions(
    scores: Mapping[int, npt.ArrayLike],
    kept: Mapping[int, npt.ArrayLike] | None = None,
    *,
    title: str = "",
    x: str = "score",
) -> Chart:
    """How values are spread, one ridge per layer: all of them, and among them those of a part. Heights are roots of counts.

    Args:
        scores: {layer: values of any shape}. A logarithmic axis where none is negative. What is not finite is left out.
        kept: {layer: bool of the same shape}: the part to show in colour, at the same scale.
        title: Over the chart.
        x: What the values are.
    """
    values = {layer: np.asarray(v).ravel() for layer, v in scores.items()}
    masks = {} if kept is None else {layer: np.asarray(k, bool).ravel() for layer, k in kept.items()}
    ridges = _count(values, masks)
    return Chart(f"Distribution of the {x} in each layer", lambda width: _draw_distributions(width, ridges, title, x))


# --- Drawing ---------------------------------------------------------------------------------------------------------


def _figure(width: int, height: float) -> Figure:
    return Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")


def _titles(figure: Figure, axes: Axes, title: str, y: str) -> None:
    """The title, and over the axis what it is of: turned by 90 degrees it would take width that a phone doesn't have."""
    axes.set_title(y, fontsize=11, fontweight="normal", color=MUTED)
    if title:
        title = shortened(title, int(figure.get_figwidth() * 72) // 8)
        figure.suptitle(title, x=0.004, ha="left", fontsize=13, fontweight="bold", color=INK)


def _draw_against_bytes(
    width: int,
    lines: Sequence[Line],
    reference: Line | None,
    title: str,
    y: str,
    x: str,
    percent: bool,
    log_y: bool,
    share: bool,
    height: int,
) -> Figure:
    columns = 4 if width >= 560 else 2
    entries = len(lines) + (reference is not None)
    figure = _figure(width, height + 19 * math.ceil(entries / columns) + 24 * bool(title))
    axes = figure.add_subplot()
    axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    scale = 100 if percent else 1
    if reference is not None:
        look = mark(reference.name)
        value = reference.values[0] * scale
        axes.axhline(value, color=look.colour, linestyle=look.dash, linewidth=1.4, zorder=1.5)
        axes.plot(
            reference.bytes,
            [value],
            color=look.colour,
            marker=look.marker,
            markersize=10,
            linestyle=look.dash,
            label=reference.name,
        )
        if reference.errors is not None and np.isfinite(reference.errors[0]):
            error = reference.errors[0] * scale
            axes.axhspan(value - error, value + error, color=RULE, alpha=0.55, linewidth=0)
    for line in lines:
        look = mark(line.name)
        order = np.argsort(line.bytes, kind="stable")
        at, values = np.asarray(line.bytes, float)[order], np.asarray(line.values, float)[order] * scale
        errors = None if line.errors is None else np.nan_to_num(np.asarray(line.errors, float)[order] * scale)
        if log_y:
            values = np.where(values > 0, values, np.nan)
        if errors is not None:
            axes.errorbar(at, values, errors, color=look.colour, linestyle="none", elinewidth=1.2, alpha=0.55)
        crossed = look.marker == "x"  # has no inside to paint
        axes.plot(
            at, values, label=shortened(line.name, 36), color=look.colour,
            marker=look.marker, linestyle=look.dash if len(at) > 1 else "none",
            markersize=10 if len(at) == 1 else 6.5 if look.marker in "osDx" else 8.5,
            markeredgecolor=look.colour if crossed else PAPER, markeredgewidth=1.8 if crossed else 0.9,
        )  # fmt: skip
    _ticks_of_sizes(
        axes, [b for line in [*lines, *([reference] if reference else [])] for b in line.bytes], share, 8 if width >= 560 else 4
    )
    axes.set_xlabel(x)
    if percent and not log_y:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if axes.get_ylim()[0] < 25 else None)
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -3.0), min(high, 103.0))
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}%"))
    elif log_y:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    _titles(figure, axes, title, y)
    figure.legend(loc="outside lower center", ncols=columns, handlelength=2.6, columnspacing=1.4)
    return figure


def _ticks_of_sizes(axes: Axes, at: Sequence[float], share: bool, most: int) -> None:
    """Round numbers: powers of two of bytes, or 1, 2, 5, 10 percent."""
    low, high = min(at), max(at)
    if share:
        candidates = [m * 10.0**e for e in range(-6, 1) for m in (1, 2, 5)]
    else:
        candidates = [2.0**e for e in range(0, 48)]
    inside = [c for c in candidates if low / 1.3 <= c <= high * 1.3] or [low]
    axes.xaxis.set_major_locator(FixedLocator(inside[:: math.ceil(len(inside) / most)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%" if share else size(value)))


def _draw_heat_map(
    width: int, values: npt.NDArray[np.float64], title: str, unit: str, layers: list[int], percent: bool
) -> Figure:
    n_layers, n_heads = values.shape
    row = max(7.0, min(26.0, 460 / n_layers))
    figure = _figure(width, row * n_layers + 84 + 24 * bool(title))
    axes = figure.add_subplot()
    axes.grid(False)
    top = np.nanmax(values) if np.isfinite(values).any() else 1.0
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(values), cmap=MAP, vmin=0, vmax=top or 1.0, edgecolors=PAPER, linewidth=1.2 if row > 14 else 0.4
    )
    axes.invert_yaxis()
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)
    every = math.ceil(13 / row)
    axes.set_yticks(np.arange(0, n_layers, every) + 0.5, [str(n) for n in layers[::every]])
    every = math.ceil(n_heads / (width / 24))
    axes.set_xticks(np.arange(0, n_heads, every) + 0.5, [str(n) for n in range(0, n_heads, every)])
    axes.set_xlabel("KV head")
    _titles(figure, axes, title, "layer")

    def written(value: float) -> str:
        return f"{100 * value:.3g}%" if percent else f"{value:,.0f}" if top >= 10 else f"{value:.2g}"

    longest = max((len(written(v)) for v in values[np.isfinite(values)]), default=1)
    if row >= 17 and (width - 110) / n_heads > 7 * longest + 6:
        for i, j in np.argwhere(np.isfinite(values)):
            light = values[i, j] < 0.5 * top
            axes.text(
                j + 0.5,
                i + 0.5,
                written(values[i, j]),
                ha="center",
                va="center",
                fontsize=10.5,
                color="#f6f6f4" if light else "#16181d",
            )
    bar = figure.colorbar(
        mesh, ax=axes, fraction=0.04, pad=0.02, aspect=32, format=FuncFormatter(lambda value, _: written(value))
    )
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(5)
    bar.update_ticks()
    bar.ax.tick_params(length=0)
    bar.ax.set_title(unit, fontsize=11, fontweight="normal", color=MUTED, loc="right")
    return figure


def _bins(width: int, n_tokens: int) -> npt.NDArray[np.int64]:
    """Edges of the columns that a text is drawn in."""
    return np.linspace(0, n_tokens, max(1, min(n_tokens, width // 4)) + 1).round().astype(int)


def _binned(shares: npt.NDArray[np.float64], edges: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The mean of each column, in percent: [..., columns]."""
    return 100 * np.add.reduceat(shares, edges[:-1], axis=-1) / np.diff(edges)


def _positions(axes: Axes, width: int) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(7 if width >= 560 else 4, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("position in tokens")


def _mark(axes: Axes, marks: Mapping[str, int], n_tokens: int) -> None:
    for name, at in marks.items():
        axes.axvline(at, color=INK, linewidth=1.0, linestyle=DOTTED)
        left = at > n_tokens / 2
        axes.annotate(
            name, (at, 1), xycoords=("data", "axes fraction"), xytext=(-4 if left else 4, -3), textcoords="offset points",
            ha="right" if left else "left", va="top", fontsize=11, color=INK,
        )  # fmt: skip


def _draw_exchange(width: int, stayed: Any, came: Any, went: Any, title: str, marks: dict[str, int]) -> Figure:
    edges = _bins(width, len(stayed))
    figure = _figure(width, 260 + 24 * bool(title))
    axes = figure.add_subplot()
    for part, colour in ((stayed + came, ACCENT), (stayed, QUIET), (-went, _GIVEN_UP)):
        axes.stairs(_binned(part, edges), edges, fill=True, color=colour, linewidth=0)
    axes.axhline(0, color=RULE, linewidth=0.8)
    # on an even scale there would be little to see beside the end, as in along()
    axes.set_yscale("function", functions=(lambda v: np.sign(v) * np.sqrt(np.abs(v)), lambda v: np.sign(v) * np.square(v)))
    lowest = 1.15 * max(1.0, float(_binned(went, edges).max()))
    axes.set_xlim(0, len(stayed))
    axes.set_ylim(-lowest, 100)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):.3g}%"))
    axes.yaxis.set_major_locator(FixedLocator([at for at in (-50, -20, -5, 0, 5, 20, 50, 100) if at >= -lowest]))
    _mark(axes, marks, len(stayed))
    _positions(axes, width)
    _titles(figure, axes, title, "share of the entries: held now; below, given up")
    figure.legend(
        handles=[Patch(color=colour, label=name) for name, colour in (("stayed", QUIET), ("came back", ACCENT), ("given up", _GIVEN_UP))],
        loc="outside lower center",
        ncols=3,
    )
    return figure


def _draw_along(width: int, held: npt.NDArray[np.float64], title: str, layers: list[int], marks: dict[str, int]) -> Figure:
    n_layers, n_tokens = held.shape
    edges = _bins(width, n_tokens)
    binned = _binned(held, edges)
    row = max(3.0, min(18.0, 300 / n_layers))
    figure = _figure(width, 150 + row * n_layers + 84 + 24 * bool(title))
    over, below = figure.subplots(2, 1, sharex=True, height_ratios=(150, max(40.0, row * n_layers)))
    over.stairs(binned.mean(0), edges, fill=True, color=ACCENT, alpha=0.85, linewidth=0)
    # The end of a text is always kept, whole: on an even scale little else would be seen.
    over.set_yscale("function", functions=(lambda v: np.sqrt(np.maximum(v, 0)), np.square))
    over.set_ylim(0, 100)
    over.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}%"))
    over.yaxis.set_major_locator(FixedLocator([1, 5, 20, 50, 100]))
    _titles(figure, over, title, "share of the entries that are kept")
    _mark(over, marks, n_tokens)
    for at in marks.values():
        below.axvline(at, color=INK, linewidth=1.0, linestyle=DOTTED)
    below.grid(False)
    # One picture: a rectangle for each would be thousands.
    below.imshow(
        binned, aspect="auto", extent=(0, n_tokens, n_layers, 0), cmap=MAP, norm=PowerNorm(0.5, 0, 100), interpolation="nearest"
    )
    for side in below.spines.values():
        side.set_visible(False)
    every = math.ceil(13 / row)
    below.set_yticks(np.arange(0, n_layers, every) + 0.5, [str(n) for n in layers[::every]])
    below.tick_params(length=0)
    _positions(below, width)
    _titles(figure, below, "", "by layer: dark, no KV head holds it; yellow, all do")
    return figure


class _Ridges(NamedTuple):
    """Counts between edges, which are powers of ten where the axis is logarithmic."""

    edges: npt.NDArray[np.float64]
    logarithmic: bool
    everything: dict[int, npt.NDArray[np.int64]]
    kept: dict[int, npt.NDArray[np.int64]]


def _count(values: dict[int, npt.NDArray[Any]], kept: dict[int, npt.NDArray[np.bool_]]) -> _Ridges:
    everything = np.concatenate([v[np.isfinite(v)] for v in values.values()] or [np.zeros(0)])
    logarithmic = everything.size > 0 and everything.min() >= 0 and everything.max() > 0
    usable = everything[everything > 0] if logarithmic else everything
    if not usable.size:
        usable = np.array([0.0, 1.0])
    some = usable[:: max(1, usable.size // 200_000)]
    if logarithmic:
        high = float(usable.max())
        low, high = math.log10(max(float(np.quantile(some, 0.01)), high * 1e-8)), math.log10(high)
    else:
        low, high = np.quantile(some, (0.001, 0.999)).tolist()
    if not high > low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, 73)

    def count(part: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        # What lies beyond the ends is counted at the ends: every entry is in the picture.
        with np.errstate(divide="ignore"):
            return np.histogram(np.clip(np.log10(part) if logarithmic else part, low, high), edges)[0]

    fine = {layer: np.isfinite(v) for layer, v in values.items()}
    return _Ridges(
        edges, logarithmic, {layer: count(v[fine[layer]]) for layer, v in values.items()},
        {layer: count(values[layer][fine[layer] & kept[layer]]) for layer in values if layer in kept},
    )  # fmt: skip


def _draw_distributions(width: int, ridges: _Ridges, title: str, x: str) -> Figure:
    edges, logarithmic, everything, kept = ridges
    low, high = float(edges[0]), float(edges[-1])
    n = len(everything)
    row = max(11.0, min(34.0, 560 / max(1, n)))
    figure = _figure(width, row * (n + 1.4) + 96 + 24 * bool(title))
    axes = figure.add_subplot()
    axes.grid(False, axis="y")
    for i, (layer, counts) in enumerate(everything.items()):
        base = n - 1 - i
        # Roots: a part of a hundredth would be a line on the ground.
        scale = 1.45 / math.sqrt(counts.max() or 1)
        heights = base + scale * np.sqrt(counts)
        axes.stairs(heights, edges, baseline=base, fill=True, facecolor=QUIET, alpha=0.45, linewidth=0, zorder=2 + i)
        axes.stairs(heights, edges, baseline=None, color=QUIET, linewidth=0.9, zorder=2 + i)
        if layer in kept:
            axes.stairs(
                base + scale * np.sqrt(kept[layer]), edges, baseline=base, fill=True, color=ACCENT, linewidth=0, zorder=2.2 + i
            )
        axes.axhline(base, color=RULE, linewidth=0.8, zorder=1.5)
    every = math.ceil(13 / row)
    axes.set_yticks([n - 1 - i for i in range(0, n, every)], [str(layer) for layer in list(everything)[::every]])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(-0.08, n + 0.55)
    axes.set_xlim(low, high)
    if logarithmic:
        step = max(1, math.ceil((high - low) / (8 if width >= 560 else 4)))
        axes.xaxis.set_major_locator(FixedLocator(list(range(math.ceil(low), math.floor(high) + 1, step)) or [low, high]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(7 if width >= 560 else 4))
    axes.set_xlabel(x)
    _titles(figure, axes, title, "layer")
    if kept:
        figure.legend(
            handles=[Patch(color=ACCENT, label="kept"), Patch(facecolor=QUIET, alpha=0.45, label="all")],
            loc="outside lower center",
            ncols=2,
        )
    return figure


def _power(exponent: float) -> str:
    if abs(exponent) <= 3:
        return f"{10.0**exponent:.3g}"
    return f"{10.0**exponent:.0e}".replace("e-0", "e-").replace("e+0", "e+")
