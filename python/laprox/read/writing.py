"""Reading a text into a Llama, compressing it before any question, and writing what is held."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import laprox
from laprox import _core
from laprox.chat.conversation import Conversation
from laprox.chat.tokens import read
from laprox.config import CACHE_TYPES, OPTIONS
from laprox.llama import Llama
from laprox.read.document import Document

Progress = Callable[[str, int, int], None]  # what is being done, how much of it, of how much


def write_document(
    llm: Llama,
    text: str,
    output: str | os.PathLike[str],
    title: str = "",
    *,
    template: str | None = None,
    archive: bool = False,
    model: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Document:
    """Read a text, compress it to the Llama's budget, and write what is held to a file.

    Args:
        llm: With the policy, budget and cache types that the document is to have, and a context that the text fits into.
        text: Of one document or of several, which are one from then on.
        output: The file; what was there is replaced when all is written.
        title: What people call it.
        template: A chat template instead of the model's.
        archive: Whether to write what was evicted, too. Where the Llama has no archive, there is none.
        model: How people who use the document name the model; its path by default.
        progress: Called as work goes on.

    Raises:
        ValueError: The text is empty or doesn't fit into the context, or the chat template leaves it out.
        LaproxError: The file can't be written, or the Llama's cache is not compressed.
    """
    kv = llm.kv
    conversation = Conversation(llm._model, text, template=template)
    tokens = conversation.prompt("?")[: conversation.document_end()]
    if len(tokens) == conversation.document_begin():
        raise ValueError("there is no text to read")
    for n in read(llm, tokens):
        progress("reading", n, len(tokens))
    compress(llm, tokens, progress)

    stats = kv.stats()
    settings: dict[str, Any] = {name: kv.config.params().get(name) for name in OPTIONS} | {
        "archive": archive and stats.archived_entries > 0,
        "cache_type_k": _name_of_type(llm.context_params.type_k),
        "cache_type_v": _name_of_type(llm.context_params.type_v),
        "chat_template": template,
        "model": llm.model_path if model is None else model,
        "laprox": laprox.__version__,
        "entries_held": stats.entries_held,
        "entries_full": stats.entries_full,
        "full_bytes": full_bytes(llm, len(tokens)),
    }
    texts = {"title": title, "text": text, "text_sha256": hashlib.sha256(text.encode()).hexdigest(), "settings": json.dumps(settings)}
    _core.set_archive_in_states(llm._ctx.ctx, settings["archive"])
    try:
        _core.document_save(llm._ctx.ctx, os.fsencode(output), tokens, texts)
    except _core.LaproxError as error:
        raise _core.LaproxError(f"{output}: {error}") from None
    finally:
        _core.set_archive_in_states(llm._ctx.ctx, False)
    return Document(Path(output))


def compress(llm: Llama, tokens: list[int], progress: Progress) -> None:
    """Choose what is held of a text that was just read, with no question in view.

    Args:
        llm: Which holds the text, and nothing behind it, before and afterwards.
        tokens: Of all that is in.
        progress: Called as work goes on.
    """
    progress("compressing", 0, 1)
    llm.kv.compress()
    progress("compressing", 1, 1)


def full_bytes(llm: Llama, n_tokens: int) -> int:
    """What the compressed layers' cache of a text takes where nothing is evicted, in llama.cpp's usual type (f16)."""
    shapes = [(n_head_kv, *_core.head_shape(llm._ctx.ctx, layer)[1:]) for layer, n_head_kv in llm.kv.layers.items()]
    return n_tokens * sum(n_head_kv * (d_k + d_v) * 2 for n_head_kv, d_k, d_v in shapes)


def _name_of_type(number: int) -> str:
    return next(name for name, ggml_type in CACHE_TYPES.items() if ggml_type == number)
