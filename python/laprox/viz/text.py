"""Text from anywhere, made safe to show, and numbers of bytes as text."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from laprox.kv import KVStats

# What turns the reading direction of its surroundings around. Left-to-right and Arabic letters need none of it.
_REORDERING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def visible(text: str) -> str:
    """Text that can be shown: no control characters but line breaks and tabs, nothing that reorders its surroundings."""
    return "".join(_visible(c) for c in text.replace("\r\n", "\n"))


def size(n_bytes: float) -> str:
    """1536 -> "1.5 KiB"."""
    unit = 0
    while n_bytes >= 1024 and unit < 3:
        n_bytes, unit = n_bytes / 1024, unit + 1
    return f"{n_bytes:.{min(unit, 1)}f}".removesuffix(".0") + f" {('B', 'KiB', 'MiB', 'GiB')[unit]}"


def allocated_without(stats: KVStats, n_ctx: int) -> float:
    """Bytes that llama.cpp allocates for the same layers: for all of a context of `n_ctx` tokens, whatever is in it."""
    return stats.kv_bytes_full / stats.tokens_seen * n_ctx if stats.tokens_seen else 0.0


def shortened(text: str, n: int) -> str:
    """In one line, of at most n characters."""
    text = " ".join(text.split())
    return text if len(text) <= n else text[: n - 1].rstrip() + "…"


def _visible(c: str) -> str:
    if c in "\n\t" or c.isprintable():
        return c
    category = unicodedata.category(c)
    if ord(c) < 0x20:
        return chr(0x2400 + ord(c))  # a picture of it
    if c == "\x7f":
        return "\u2421"
    if category in ("Cc", "Cs", "Co", "Cn") or unicodedata.bidirectional(c) in _REORDERING or c in "\u2028\u2029":
        return "\ufffd"
    return c  # other spaces, joiners
