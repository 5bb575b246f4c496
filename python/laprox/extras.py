"""Packages that only a part of laprox needs: pip install "laprox[...]". They are imported where they are used."""

from __future__ import annotations

import importlib.util

# Extra -> {module: package that has it}. pyproject.toml has the versions.
PACKAGES = {
    "cli": {"typer": "typer", "rich": "rich"},
    "documents": {
        "selectolax": "selectolax",
        "pypdf": "pypdf",
        "charset_normalizer": "charset-normalizer",
        "mammoth": "mammoth",
        "pptx": "python-pptx",
        "striprtf": "striprtf",
    },
    "hub": {"huggingface_hub": "huggingface_hub"},
    "report": {"jinja2": "jinja2", "matplotlib": "matplotlib"},
    "eval": {"rouge": "rouge", "rapidfuzz": "rapidfuzz"},
    "gates": {"gguf": "gguf"},
    "train": {"torch": "torch", "transformers": "transformers", "gguf": "gguf"},
}


class MissingExtra(ImportError):
    """Packages of an extra are not installed. The message is one line that says which, and how to install them."""


def need(extra: str, who: str) -> None:
    """Make sure that an extra is installed, before work that comes to nothing without it.

    Args:
        extra: One of PACKAGES.
        who: What needs it, as users know it: "laprox compare".

    Raises:
        MissingExtra: A package is missing.
    """
    missing = [package for module, package in PACKAGES[extra].items() if not _importable(module)]
    if missing:
        raise MissingExtra(f'{who} needs {" and ".join(missing)}: pip install "laprox[{extra}]"')


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # an import hook refuses it; half of it is loaded
        return False
