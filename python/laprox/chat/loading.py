"""A model from the options of a command; what fails is told in one line."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import llama_cpp

from laprox._upstream import LlamaModel
from laprox.cache_types import CACHE_TYPES, Auto, Types
from laprox.chat import log
from laprox.config import KVConfig
from laprox.llama import Llama

T = TypeVar("T")


@dataclass(frozen=True)
class Loader:
    """How a model is to be loaded.

    Attributes:
        path: A GGUF file.
        verbose: Whether to show llama.cpp's log.
        threads: Number of CPU threads, of prompts and answers; 0 = llama.cpp's choice.
        gpu_layers: Number of layers on the GPU; -1 = all.
        batch_size: Number of tokens that are evaluated at once.
        type_k: Of the cached keys, as llama.cpp numbers types; None is F16, an Auto is chosen by the budget.
        type_v: Of the cached values.
    """

    path: Path
    verbose: bool = False
    threads: int = 0
    gpu_layers: int = 0
    batch_size: int = 512
    type_k: int | Auto | None = None
    type_v: int | Auto | None = None

    @cached_property
    def vocabulary(self) -> LlamaModel:
        """The model without its weights: enough to count tokens."""
        return load_vocabulary(self.path)

    def of(self, types: Types | None) -> Loader:
        """The same model with other types of cached keys and values; None: with these."""
        return self if types is None else replace(self, type_k=CACHE_TYPES[types.k].ggml, type_v=CACHE_TYPES[types.v].ggml)

    def reading(self, text: Auto) -> Loader:
        """The same, where types that are to be chosen are chosen for this text."""
        k, v = (text if isinstance(given, Auto) else given for given in (self.type_k, self.type_v))
        return replace(self, type_k=k, type_v=v)

    def open(self, n_ctx: int, kv: KVConfig | None, **more: Any) -> Llama:
        """The model with a context of so many tokens. `more` are keywords of laprox.Llama.

        Raises:
            ValueError: It can't be loaded; says why.
        """
        options: dict[str, Any] = {
            "kv": kv,
            "n_ctx": n_ctx,
            "n_batch": min(self.batch_size, n_ctx),  # a row of logits each
            "n_threads": self.threads or None,
            "n_threads_batch": self.threads or None,
            "n_gpu_layers": self.gpu_layers,
            "type_k": self.type_k,
            "type_v": self.type_v,
            "chat_format": "chatml",  # unused: prompts are made by Conversation, which tells of broken templates
        }
        return _explained(self.path, lambda: Llama(str(self.path), verbose=self.verbose, **(options | more)))


def load_vocabulary(model: Path) -> LlamaModel:
    """The model without its weights: enough to count tokens."""
    return load_weights(model, vocab_only=True)


def load_weights(model: Path, **params: Any) -> LlamaModel:
    """The model without a context. `params` are fields of llama_model_params."""
    settings = llama_cpp.llama_model_default_params()
    for name, value in params.items():
        setattr(settings, name, value)
    return _explained(model, lambda: LlamaModel(path_model=str(model), params=settings, verbose=False))


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C within raises KeyboardInterrupt at the end: one that is raised in a callback of llama.cpp's, such as its log's, is dropped."""
    if threading.current_thread() is not threading.main_thread() or (before := signal.getsignal(signal.SIGINT)) in (None, signal.SIG_IGN):
        yield
        return
    interrupted = False

    def hold(*_: object) -> None:
        nonlocal interrupted
        interrupted = True

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if interrupted:
            raise KeyboardInterrupt


def _explained(model: Path, make: Callable[[], T]) -> T:
    """Raises ValueError with llama.cpp's own reason, which llama_cpp leaves in the log."""
    if not model.is_file():
        raise ValueError(f"{model}: {'not a file' if model.exists() else 'no such file'}")
    log.forget()
    try:
        with interrupts_held():
            return make()
    except ValueError as error:
        if str(error).startswith("Failed to") and log.reason():
            raise ValueError(f"{model}: {log.reason()}") from None
        raise
