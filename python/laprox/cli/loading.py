"""Loading models so that what fails is told in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import llama_cpp
from llama_cpp._internals import LlamaModel

from laprox import Llama
from laprox.cli import log

T = TypeVar("T")


def load(model: Path, verbose: bool, **kwargs: Any) -> Llama:
    """The model, with a context. `kwargs` are those of laprox.Llama."""
    kwargs.setdefault("chat_format", "chatml")  # unused: prompts are made by Conversation, which tells of broken templates
    return _explained(model, lambda: Llama(str(model), verbose=verbose, **kwargs))


def load_vocabulary(model: Path) -> LlamaModel:
    """The model without its weights: enough to count tokens."""
    return load_weights(model, vocab_only=True)


def load_weights(model: Path, **params: Any) -> LlamaModel:
    """The model without a context. `params` are fields of llama_model_params."""
    settings = llama_cpp.llama_model_default_params()
    for name, value in params.items():
        setattr(settings, name, value)
    return _explained(model, lambda: LlamaModel(path_model=str(model), params=settings, verbose=False))


def _explained(model: Path, make: Callable[[], T]) -> T:
    """Raises ValueError with llama.cpp's own reason, which llama_cpp leaves in the log."""
    if not model.is_file():
        raise ValueError(f"{model}: {'not a file' if model.exists() else 'no such file'}")
    log.forget()
    try:
        return make()
    except ValueError as error:
        if str(error).startswith("Failed to") and log.reason():
            raise ValueError(f"{model}: {log.reason()}") from None
        raise
