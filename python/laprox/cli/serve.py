"""`laprox serve` and `laprox-server`: llama-server, with a KV cache that keeps only the entries that matter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import typer

import laprox


def server_path() -> Path:
    """Where the patched llama-server is.

    Raises:
        FileNotFoundError: This build has none.
    """
    path = Path(laprox.__file__).parent / "bin" / ("llama-server.exe" if os.name == "nt" else "llama-server")
    if not path.exists():
        raise FileNotFoundError(
            f"{path} doesn't exist: laprox was built without its server. Build it with -DLAPROX_BUILD_SERVER=ON "
            "(in a checkout: scripts/build --server)"
        )
    return path


def serve(arguments: list[str]) -> None:
    """Become llama-server. Everything it needs it finds beside itself; the environment stays as it is."""
    command = [str(server_path()), *arguments]
    if os.name == "nt":  # has no exec
        sys.exit(subprocess.run(command).returncode)
    sys.stdout.flush()
    os.execv(command[0], command)


def command(context: typer.Context) -> None:
    """Start llama-server: all of its options, and --kv-budget, --kv-policy, ... (laprox serve --help)."""
    serve(context.args)


def main() -> None:
    """The `laprox-server` program."""
    try:
        serve(sys.argv[1:])
    except OSError as error:
        print(f"laprox-server: {error}", file=sys.stderr)
        sys.exit(1)
