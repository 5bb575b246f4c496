"""Standard streams that lose no answer, whatever their encoding, and what may be written to them."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from itertools import chain
from typing import Any


def tolerate() -> None:
    """From now on, what an output's encoding has no character for is escaped, and what is no text on the input is replaced."""
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def questions() -> Iterator[str]:
    """The lines of standard input, as they come; it waits for the first. Raises BadParameter if there is none."""
    lines = (line.strip() for line in sys.stdin or () if line.strip())
    try:
        return chain([next(lines)], lines)
    except StopIteration:
        import typer  # which this file is read without, where it isn't installed

        raise typer.BadParameter("no question: give one, or put one in each line of stdin") from None


def print_json(data: Any) -> None:
    """A line of JSON on standard output: in its own escapes where that can't be written as it is."""
    encoding = (sys.stdout.encoding or "").lower()
    print(json.dumps(data, ensure_ascii=not encoding.startswith(("utf", "cp65001"))), flush=True)
