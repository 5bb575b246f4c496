"""What we take of llama-cpp-python that has no public name there. No other file does.

`scripts/bump_audit` looks for each of these names in another release: PRIVATE has them all.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp._internals import LlamaContext, LlamaModel
from llama_cpp.llama import LlamaState
from llama_cpp.llama_grammar import LlamaGrammar

__all__ = ["LlamaContext", "LlamaModel", "LlamaState", "Parent", "loaded_library", "model_of"]

# By module and class of llama_cpp. LlamaModel and LlamaContext are private themselves, and so is all that we ask of them.
PRIVATE = {
    "llama.Llama": "_batch _ctx _init_sampler _logits_all _model _requires_eval _stack tokenizer_",
    "llama_cpp": "_lib",
    "llama_grammar.LlamaGrammar": "_grammar _root",
    "_internals.LlamaModel": (
        "add_bos_token detokenize metadata model n_ctx_train n_params size token_bos token_eos token_get_text tokenize"
    ),
    "_internals.LlamaContext": "ctx",
}

MOST_THREADS = 512  # GGML_MAX_N_THREADS
MOST_TOKENS = 1 << 24  # of a context: far more than a model is trained for, and few enough for llama.cpp to count
MOST = {"n_ctx": MOST_TOKENS, "n_batch": MOST_TOKENS, "n_ubatch": MOST_TOKENS, "n_threads": MOST_THREADS, "n_threads_batch": MOST_THREADS}


class Native:
    """An attribute that points into the library's memory, for as long as that is there.

    After close(), and in a process forked after loading, reading it raises LaproxError: llama.cpp would follow the pointer, and
    crash or, where its threads are missing, wait forever.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, llm: Any, owner: type | None = None) -> Any:
        if llm is None:
            return self
        llm._check_usable()
        try:
            return llm.__dict__[self._name]
        except KeyError:
            raise AttributeError(self._name) from None

    def __set__(self, llm: Any, value: Any) -> None:
        llm.__dict__[self._name] = value


class Parent(llama_cpp.Llama):
    """llama_cpp.Llama, with names for what a subclass of it has to know, and four of its defects mended."""

    # Until the parent has made its own, so that close() works on an instance whose settings were refused.
    _stack = contextlib.ExitStack()

    _ctx: Any = Native()
    _batch: Any = Native()
    _loaded_model: Any = Native()
    tokenizer_: Any = Native()

    def __init__(self, model_path: str, **kwargs: Any) -> None:
        """As the parent, which would hand on numbers that are too large for llama.cpp as others, or have it crash. Raises ValueError."""
        for name, most in MOST.items():
            if isinstance(value := kwargs.get(name), int) and value > most:
                raise ValueError(f"{name} is {value}; accepted: up to {most}")
        super().__init__(model_path, **kwargs)

    def _check_usable(self) -> None:
        """Raises if this instance must not be used any more."""

    def _before_context(self, model: LlamaModel) -> None:
        """Called when the model is loaded and its context not yet made."""

    @property
    def _model(self) -> LlamaModel:
        return self._loaded_model

    @_model.setter
    def _model(self, model: LlamaModel) -> None:
        self._loaded_model = model
        self._before_context(model)

    def _forget_logits(self) -> None:
        """The latest logits are not of the last token: generate() has to evaluate it again."""
        self._requires_eval = True

    def _forget_scores(self, n: int) -> None:
        """The first n tokens were evaluated elsewhere, so that nothing is known of their logits."""
        if self._logits_all:
            self.scores[:n] = np.nan

    def _fit_arrays(self) -> None:
        """llama.cpp rounds n_ctx up, and a draft model needs the logits of all tokens: the parent's arrays can be too short."""
        n_ctx = self.n_ctx()
        if len(self.input_ids) < n_ctx:
            self.input_ids = np.zeros(n_ctx, dtype=np.intc)
        if self._logits_all and len(self.scores) < n_ctx:
            self.scores = np.ndarray((n_ctx, self.n_vocab()), dtype=np.single)  # memory as rows are written

    @contextlib.contextmanager
    def _only_written_scores(self) -> Iterator[None]:
        """For states: without logits_all nothing is ever written to `scores`, n_batch rows of a whole vocabulary that the parent copies."""
        scores = self.scores
        if not self._logits_all:
            self.scores = scores[:0]
        try:
            yield
        finally:
            self.scores = scores

    def _fitted(self, state: LlamaState) -> LlamaState:
        """The same, in arrays of this context's sizes: the parent's belong to one with the same n_ctx and n_batch."""
        n = state.n_tokens
        input_ids = np.zeros_like(self.input_ids)
        input_ids[:n] = state.input_ids[:n]
        scores = np.full((min(n, len(self.scores)), self.n_vocab()), np.nan, dtype=np.single)  # where it has none
        rows = min(len(scores), len(state.scores))
        if state.scores.shape[1:] == scores.shape[1:]:  # of another vocabulary, the engine refuses it
            scores[:rows] = state.scores[:rows]
        return LlamaState(input_ids, scores, n, state.llama_state, state.llama_state_size, state.seed)

    def _check_sampling(self, *args: Any, **kwargs: Any) -> None:
        """Raises what generate() would for what it is given beside the tokens, which finds out when the cache was cut."""
        given = inspect.signature(super().generate).bind([], *args, **kwargs).arguments
        wanted = inspect.signature(super()._init_sampler).parameters  # type: ignore[misc]
        self._init_sampler(**{name: given[name] for name in wanted if name in given})

    def _init_sampler(self, *args: Any, grammar: LlamaGrammar | None = None, **kwargs: Any) -> Any:
        if grammar is not None:  # the parent would add to its samplers what isn't one, and llama.cpp follow the null pointer
            vocab = llama_cpp.llama_model_get_vocab(self.model)
            parsed = llama_cpp.llama_sampler_init_grammar(vocab, grammar._grammar.encode(), grammar._root.encode())
            if not parsed:
                raise ValueError(f"the grammar can't be parsed; accepted: GBNF with a rule {grammar._root!r}")
            llama_cpp.llama_sampler_free(parsed)
        return super()._init_sampler(*args, grammar=grammar, **kwargs)  # type: ignore[misc] # not among the positional ones


def model_of(llm: llama_cpp.Llama) -> LlamaModel:
    """What a Llama has loaded: it tokenizes, and knows the file's metadata."""
    return llm._model


def loaded_library() -> Path:
    """The libllama that llama_cpp has loaded."""
    return Path(sys.modules["llama_cpp.llama_cpp"]._lib._name)
