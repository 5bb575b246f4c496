"""Downloads, as people see them: one bar at a terminal, plain lines elsewhere, all on stderr."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from laprox import hub
from laprox.cli.progress import progress
from laprox.cli.show import notes, printable

T = TypeVar("T")
STEP = 10  # percent between two lines where there is no terminal


def fetch(name: str) -> Path:
    """A known model, downloaded if it isn't here. Raises what hub.fetch raises; SystemExit after ctrl-C."""
    return _shown(lambda progress, note: hub.fetch(name, progress, note))


def fetch_from_repository(repo: str, file: str | None, offline: bool = False) -> Path:
    """A GGUF of a repository. Raises what hub.fetch_from_repository raises; SystemExit after ctrl-C."""
    return _shown(lambda progress, note: hub.fetch_from_repository(repo, file, progress, note, offline))


def verify(name: str) -> bool:
    """hub.verify, with the bar."""
    return _shown(lambda progress, note: hub.verify(name, progress), label=name)


def _shown(work: Callable[[hub.Progress, hub.Note], T], label: str = "") -> T:
    try:
        with progress(label, unit="bytes") as update:
            told = 0

            def advance(done: int, total: int) -> None:
                nonlocal told
                update(completed=done, total=total)
                percent = 100 * done // max(total, 1) // STEP * STEP
                if not notes.is_terminal and percent > told and not label:
                    told = percent
                    notes.print(f"{percent}% of {total / 1e6:,.0f} MB", markup=False)

            return work(advance, lambda line: notes.print(printable(line), markup=False))
    except KeyboardInterrupt:
        notes.print("Stopped; the same command goes on where it was." if not label else "Stopped.")
        raise SystemExit(130) from None
