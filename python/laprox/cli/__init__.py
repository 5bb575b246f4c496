"""The `laprox` command."""

from __future__ import annotations

import sys

from laprox import LaproxError, extras
from laprox.chat.decoding import printable
from laprox.cli import streams


def main() -> None:
    """Exit status: 0, 1 for what can't be done (one line on stderr says why), 2 for a command line that can't be followed, 130 after ctrl-C."""
    streams.tolerate()
    try:
        extras.need("cli", "laprox in the terminal")
        from laprox.cli.app import app

        app(prog_name="laprox")
    except KeyboardInterrupt:  # before a command has begun
        sys.exit(130)
    except (LaproxError, extras.MissingExtra, ValueError, OSError, RuntimeError, MemoryError) as error:
        print(f"laprox: {printable(str(error)) or type(error).__name__}", file=sys.stderr)
        sys.exit(1)
