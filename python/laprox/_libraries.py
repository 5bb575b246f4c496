"""Make llama_cpp load our libraries, which are its own with the compressing cache inside.

llama_cpp reads LLAMA_CPP_LIB_PATH once, when it is first imported, so everything that can be wrong is checked before.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

LLAMA_CPP_VERSION = "0.3.36"
INSTALL_LLAMA_CPP = (
    f'CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" pip install --no-cache-dir llama-cpp-python=={LLAMA_CPP_VERSION}'
)

_VARIABLE = "LLAMA_CPP_LIB_PATH"


def load() -> None:
    """Import llama_cpp with our libraries. Raises ImportError, which says what to do."""
    directory = _directory()
    _check_version()
    if "llama_cpp.llama_cpp" in sys.modules:
        _check_loaded(directory)
    else:
        _import_with(directory)
    _load_backends(directory)


def _import_with(directory: Path) -> None:
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = str(directory)
    try:
        import llama_cpp  # noqa: F401
    finally:  # a child process may want llama_cpp without us
        if before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = before


def _directory() -> Path:
    """The libraries lie beside the extension module, which an editable install keeps away from the sources."""
    core = importlib.util.find_spec("laprox._core")
    if core is None or core.origin is None:
        raise ImportError("laprox is not built: run `pip install .` in its repository")
    directory = Path(core.origin).parent / "lib"
    if not any(directory.glob("*llama.*")):
        raise ImportError(f"laprox has no libllama in {directory}: run `pip install --force-reinstall .` in its repository")
    return directory


def _check_version() -> None:
    try:
        version = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"laprox needs llama-cpp-python {LLAMA_CPP_VERSION}: run `{INSTALL_LLAMA_CPP}`") from None
    if version != LLAMA_CPP_VERSION:
        raise ImportError(
            f"laprox is built for llama-cpp-python {LLAMA_CPP_VERSION}, but {version} is installed: "
            f"run `{INSTALL_LLAMA_CPP}`"
        )


def _check_loaded(directory: Path) -> None:
    from laprox._upstream import loaded_library  # it imports llama_cpp

    loaded = loaded_library()
    if loaded.parent.resolve() != directory.resolve():
        raise ImportError(
            f"llama_cpp was imported before laprox and has loaded {loaded}: "
            "start Python again and import laprox before llama_cpp"
        )


def _load_backends(directory: Path) -> None:
    """In a build with GGML_BACKEND_DL backends are modules, which lie where llama-server finds them. Otherwise they are there already."""
    from laprox import _core

    folder = directory.parent / "bin"
    if _core.load_backends(str(folder)) == 0:
        raise ImportError(f"laprox finds no backend of ggml in {folder}: install laprox again")
