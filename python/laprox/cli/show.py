"""What people see: numbers, progress, and text that is safe to print."""

from __future__ import annotations

from rich.console import Console

from laprox import KVStats, Llama
from laprox.chat.decoding import printable
from laprox.viz.text import allocated_without, size

# Answers go to stdout and everything else here, so that a pipe gets answers only.
notes = Console(stderr=True, highlight=False, soft_wrap=True)


def status(stats: KVStats | None, tokens_seen: int, tokens_per_s: float, n_ctx: int, recalled: int = 0) -> str:
    """The line under an answer."""
    parts = [f"{tokens_seen:,} tokens seen"]
    if stats is not None:
        share = stats.entries_held / stats.entries_full if stats.entries_full else 1.0
        parts.append(f"{stats.entries_held:,} of {stats.entries_full:,} entries held ({share:.1%})")
        parts.append(f"{size(stats.kv_bytes)} now, {size(allocated_without(stats, n_ctx))} without laprox")
        if recalled:
            parts.append(f"{recalled:,} entries came back")
        if stats.tokens_reread:
            parts.append(f"{stats.tokens_reread:,} tokens read again")
    parts.append(f"{tokens_per_s:.1f} tokens/s")
    return " · ".join(parts)


def remark(text: str) -> None:
    """What a user should know before reading on, on stderr."""
    notes.print(printable(text), style="yellow", markup=False)


def tell_choice(llm: Llama) -> None:
    """Which types a budget is spent on, if it chose them."""
    if llm.kv_config is not None and (choice := llm.kv.choice) is not None:
        notes.print(f"{llm.kv_config.budget}: {choice}", markup=False)
