"""The long work of `laprox eval` and `laprox compare`, as people see it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import typer

from laprox._upstream import LlamaModel
from laprox.cli.progress import progress
from laprox.cli.show import notes
from laprox.eval.bench import Reading, run
from laprox.eval.rows import Rows
from laprox.eval.trials import ALONG


def split(text: str, option: str) -> list[str]:
    """What a list with commas names, each once. Raises ValueError if that is nothing."""
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise ValueError(f"{option} is empty: name at least one")
    return found


def measure(
    readings: Sequence[Reading], rows: Rows, vocabulary: LlamaModel, along: int = ALONG, window: int | None = None, restart: bool = False
) -> None:
    """Measure, with a bar at a terminal, and a line for each reading elsewhere. Ctrl-C ends the command."""
    begin, shown = time.monotonic(), ""
    try:
        with progress("", sum(reading.work for reading in readings)) as update:

            def told(label: str, n: float) -> None:
                nonlocal shown
                update(advance=n, description=label)
                if not notes.is_terminal and label != shown:
                    shown = label
                    notes.print(f"{label}: read after {time.monotonic() - begin:.0f} s", markup=False)

            run(readings, rows, vocabulary, told, along, window)
    except KeyboardInterrupt:
        again = " without --restart" if restart else ""
        notes.print(f"Stopped. What is finished is in {rows.path}; the same command{again} goes on with it.", markup=False)
        raise typer.Exit(130) from None
