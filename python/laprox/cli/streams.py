"""Standard streams that lose no answer, whatever their encoding, and what may be written to them."""

from __future__ import annotations

import io
import json
import sys
from typing import Any


def tolerate() -> None:
    """From now on, what an output's encoding has no character for is escaped, and what is no text on the input is replaced."""
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def print_json(data: Any) -> None:
    """A line of JSON on standard output: in its own escapes where that can't be written as it is."""
    encoding = (sys.stdout.encoding or "").lower()
    print(json.dumps(data, ensure_ascii=not encoding.startswith(("utf", "cp65001"))), flush=True)
