"""`laprox --version`: ours, llama.cpp's, and the backends that are built in."""

from __future__ import annotations

import typer

from laprox import __version__, _core
from laprox._libraries import LLAMA_CPP_VERSION


def show(wanted: bool) -> None:
    """Print it and end the program, if it is `wanted`."""
    if not wanted:
        return
    print(f"laprox {__version__}")
    print(f"llama.cpp {_core.llama_version()} of llama-cpp-python {LLAMA_CPP_VERSION}, ggml {_core.ggml_version()}")
    for name, devices in _core.backends():
        print(f"{name}: {', '.join(devices) or 'no device'}")
    raise typer.Exit()
