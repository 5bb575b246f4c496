"""Descriptions of functions in a chat's prompt, which are protected from eviction: a model that has lost a part of them writes calls
of its own invention."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import llama_cpp

from laprox import _core

if TYPE_CHECKING:
    from laprox.llama import Llama


class Rendered(Exception):
    """Raised in place of a completion: it has the prompt."""

    def __init__(self, prompt: str | list[int]) -> None:
        self.prompt = prompt


class _Renderer:
    """Stands for a Llama before a chat handler, and evaluates nothing."""

    def __init__(self, llm: Llama) -> None:
        self._llm = llm

    def __getattr__(self, name: str) -> Any:
        if name in ("eval", "generate", "reset"):  # of handlers that evaluate while they write the prompt, those of images
            raise TypeError(f"this chat handler calls {name}() itself")
        return getattr(self._llm, name)

    def create_completion(self, prompt: str | list[int], **kwargs: Any) -> None:
        raise Rendered(prompt)


def prompt_without(llm: Llama, arguments: dict[str, Any]) -> bytes | None:
    """The prompt that a chat's template writes without functions.

    Args:
        llm: Whose template it is.
        arguments: Of `create_chat_completion`.

    Returns:
        Its text, as its tokens have it; None where there are no functions, or it can't be told (which is warned of).
    """
    if not (arguments.get("tools") or arguments.get("functions")):
        return None
    others = {**arguments, "tools": None, "tool_choice": None, "functions": None, "function_call": None}
    try:
        llama_cpp.Llama.create_chat_completion(_Renderer(llm), **others)  # type: ignore[arg-type]
    except Rendered as rendered:
        prompt = rendered.prompt
        if isinstance(prompt, str):
            prompt = llm.tokenize(prompt.encode(), add_bos=False, special=True)
        return b"".join(_pieces(llm, prompt))
    except Exception as error:  # whatever a template raises
        _warn(f"they can't be told from one without them: {error}")
    return None


def protected(llm: Llama, prompt: Sequence[int], without: bytes) -> list[tuple[int, int]]:
    """Where a prompt says of functions, first position and first position behind, ascending.

    Args:
        llm: Evaluates it.
        prompt: Its tokens.
        without: What `prompt_without` found.
    """
    pieces = _pieces(llm, prompt)
    text = b"".join(pieces)
    inserted = _core.find_inserted(text, without)
    if not without or (not inserted and text != without):
        _warn("the chat template then writes another prompt")
        return []
    ends = list(itertools.accumulate(map(len, pieces)))
    ranges = [(_token_at(ends, first), _token_at(ends, end - 1) + 1) for first, end in inserted]
    unit, budget = _core.parse_budget(str(llm.kv.config.budget))
    n_tokens = sum(end - first for first, end in ranges)
    if unit == "bytes" and not _core.may_protect(llm.ctx, n_tokens, budget):
        _warn(f"they are {n_tokens} tokens, more than a third of the budget of {llm.kv.config.budget}")
        return []
    return ranges


def _token_at(ends: list[int], byte: int) -> int:
    return next(i for i, end in enumerate(ends) if byte < end)


def _pieces(llm: Llama, tokens: Sequence[int]) -> list[bytes]:
    """The text of each token; a first one that only says that it begins here has none."""
    return [b"" if i == 0 and token == llm.token_bos() else llm.detokenize([token], special=True) for i, token in enumerate(tokens)]


def _warn(reason: str) -> None:
    warnings.warn(f"what the prompt says of functions may be evicted: {reason}", RuntimeWarning, stacklevel=4)
