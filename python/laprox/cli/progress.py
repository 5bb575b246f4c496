"""The progress bar of all commands: on stderr, and at a terminal only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from laprox import Llama
from laprox.chat.tokens import read as in_batches
from laprox.cli.show import notes


@contextmanager
def progress(what: str, total: float | None = None, unit: str = "", done: int = 0) -> Iterator[Callable[..., None]]:
    """A bar, within.

    Args:
        what: Is being done.
        total: Of it all; None: unknown yet.
        unit: What is counted, "tokens" or "bytes" say; "" shows percent.
        done: What an earlier run did.

    Yields:
        Changes the bar: rich's `Progress.update`, for its task (`advance=`, `completed=`, `total=`, `description=`).
    """
    counted: list[ProgressColumn]
    if unit == "bytes":
        counted = [DownloadColumn(), TransferSpeedColumn()]
    elif unit:
        counted = [MofNCompleteColumn(), TextColumn(unit)]
    else:
        counted = [TaskProgressColumn(), TimeElapsedColumn()]
    columns = (TextColumn("{task.description}"), BarColumn(), *counted, TimeRemainingColumn())
    shown = Progress(*columns, console=notes, disable=not notes.is_terminal, transient=True, speed_estimate_period=600)
    with shown:
        yield partial(shown.update, shown.add_task(what, total=total, completed=done))


def read(llm: Llama, tokens: list[int]) -> None:
    """Have a prompt evaluated from its start. Nothing is evicted: that comes when a question follows, which finds it in the cache."""
    with progress("reading", len(tokens), "tokens") as update:
        for n in in_batches(llm, tokens):
            update(completed=n)
