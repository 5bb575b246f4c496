"""Prompts as tokens: the few rules that chats, profiles and benchmarks share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import llama_cpp
import numpy as np
import numpy.typing as npt

from laprox._upstream import LlamaModel
from laprox.llama import Llama
from laprox.reuse import common_prefix


def tokens_of(vocabulary: LlamaModel, text: str) -> list[int]:
    """A text that is part of a prompt; nothing in it is a control token."""
    return vocabulary.tokenize(text.encode(), add_bos=False, special=False) if text else []


def text_of(vocabulary: LlamaModel, tokens: Sequence[int]) -> str:
    """What tokens say, control tokens left out."""
    return vocabulary.detokenize(list(tokens)).decode(errors="replace")


def n_shared(first: Sequence[int], *others: Sequence[int]) -> int:
    """How many tokens all of them begin with."""
    return min((common_prefix(np.asarray(first), other) for other in others), default=len(first))


def read(llm: Llama, tokens: Sequence[int]) -> Iterator[int]:
    """Evaluate tokens from the start, batch by batch; yields how many are in."""
    llm.reset()
    for start in range(0, len(tokens), llm.n_batch):
        batch = tokens[start : start + llm.n_batch]
        llm.eval(batch)
        yield start + len(batch)


def last_logits(llm: Llama) -> npt.NDArray[np.float64]:
    """Of the token after those evaluated: [vocabulary]."""
    row = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    return np.ctypeslib.as_array(row, shape=(llm.n_vocab(),)).astype(np.float64)


def trained_for(vocabulary: LlamaModel) -> int:
    """The model's training context in tokens, 0 if it doesn't say."""
    metadata = vocabulary.metadata()
    return int(metadata.get(f"{metadata.get('general.architecture')}.context_length", 0))


def check_context(what: str, n_tokens: int, wanted: int, trained: int, instead: str, option: str = "-c") -> None:
    """Raises ValueError unless so many tokens fit into a context.

    Args:
        what: What they are: "documents and question".
        n_tokens: How many, with room for an answer.
        wanted: The size that was asked for; 0: what the model was trained for.
        trained: What the model was trained for; 0: it doesn't say.
        instead: What to do: "ask about less of it".
        option: The one that says the size.
    """
    takes = f"{what}: {n_tokens:,} tokens, with room for an answer"
    if wanted and wanted < n_tokens:
        raise ValueError(f"{takes}, too many for {option} {wanted} (at least {n_tokens})")
    if not wanted and trained and trained < n_tokens:
        raise ValueError(f"{takes}, but the model was trained for {trained:,}: {instead} (or insist: {option} {n_tokens})")
