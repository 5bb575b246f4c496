"""Reading a text into a Llama, compressing it before any question, and writing what is held."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import laprox
from laprox import _core
from laprox._upstream import model_of
from laprox.cache_types import Types, name_of
from laprox.chat.conversation import Conversation
from laprox.chat.tokens import read
from laprox.config import OPTIONS, KVConfig
from laprox.files import check_writable
from laprox.llama import Llama
from laprox.read.document import Document, lora_of
from laprox.read.probe import Probe, asking, check, check_share, look, repeating
from laprox.sizes import shape_of

REPEAT = "repeat"
FOR_READING = KVConfig(policy="energy", window=256, recent=8, archive="off")
"""Settings of a Llama that reads: what a probe finds, as it is, and what suits it. Its budget is the usual one."""

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
    probe: str | Sequence[str] | None = REPEAT,
    refit: bool = True,
    probe_share: float = 1.0,
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
        probe: What stands for the questions to come: REPEAT, the text itself, as the model repeats it; questions of your own; or
            None, the end of the text, as when a prompt is in.
        refit: With a probe: whether the values of what is kept are refitted to what the probe reads from all.
        probe_share: Of the probe's tokens, how many score: 0.25 is every fourth.
        progress: Called as work goes on.

    Raises:
        ValueError: The text is empty or doesn't fit into the context with its probe, text or title have characters that a file can't
            hold, the chat template leaves the text out, or no file can be made there.
        LaproxError: The Llama's cache is not compressed, its policy can't be probed, or writing fails, on a full disk say.
    """
    kv = llm.kv
    _check_text("the text", text)
    _check_text("the title", title)
    check_writable(Path(output))
    conversation = Conversation(model_of(llm), text, template=template)
    tokens = conversation.prompt("?")[: conversation.document_end()]
    if len(tokens) == conversation.document_begin():
        raise ValueError("there is no text to read")
    check_share(probe_share, "probe_share")
    looks = make_probe(conversation, probe)
    if looks is not None:
        check(llm.kv.config.policy)
        if looks.context > llm.n_ctx():
            raise ValueError(f"a text of {len(tokens)} tokens takes a context of {looks.context} with its probe, and has {llm.n_ctx()}")
    for n in read(llm, tokens):
        progress("reading", n, len(tokens))
    compress(llm, looks, refit, progress, probe_share)

    stats = kv.stats()
    settings: dict[str, Any] = {name: kv.config.params().get(name) for name in OPTIONS} | {
        "probe": probe if probe is None or isinstance(probe, str) else list(probe),
        "refit": refit and looks is not None,
        "probe_share": probe_share,
        "archive": archive and stats.archived_entries > 0,
        "cache_type_k": name_of(llm.context_params.type_k),
        "cache_type_v": name_of(llm.context_params.type_v),
        "lora": lora_of(llm),
        "chat_template": template,
        "model": llm.model_path if model is None else model,
        "laprox": laprox.__version__,
        "entries_held": stats.entries_held,
        "entries_full": stats.entries_full,
        "full_bytes": full_bytes(llm, len(tokens)),
    }
    texts = {"title": title, "text": text, "text_sha256": hashlib.sha256(text.encode()).hexdigest(), "settings": json.dumps(settings)}
    with llm._in_use:
        _core.set_archive_in_states(llm.ctx, settings["archive"])
        try:
            _core.document_save(llm.ctx, os.fsencode(output), tokens, texts)
        except _core.LaproxError as error:
            raise _core.LaproxError(f"{output}: {error}") from None
        finally:
            _core.set_archive_in_states(llm.ctx, False)
    return Document(Path(output))


def _check_text(name: str, text: str) -> None:
    """Raises ValueError for what would be found out when all is read."""
    try:
        text.encode()
        at = text.find("\0")
    except UnicodeEncodeError as error:  # half of a surrogate pair
        at = error.start
    if at >= 0:
        raise ValueError(f"{name} has the character {text[at]!r} at {at}; accepted: what UTF-8 can hold, without NUL")


def make_probe(conversation: Conversation, probe: str | Sequence[str] | None) -> Probe | None:
    """The probe that write_document() makes of its argument. Raises ValueError if it is none."""
    if probe is None:
        return None
    if isinstance(probe, str):
        if probe != REPEAT:
            raise ValueError(f"probe is {probe!r}; accepted: {REPEAT!r}, a list of questions, or None")
        return repeating(conversation)
    return asking(conversation, probe)


def compress(llm: Llama, probe: Probe | None, refit: bool, progress: Progress, probe_share: float = 1.0) -> None:
    """Choose what is held of a text that was just read, with no question in view.

    Args:
        llm: Which holds the text, and nothing behind it, before and afterwards.
        probe: What is evaluated first, to see what it looks at; None: the text's own end decides.
        refit: See write_document().
        progress: Called as work goes on.
        probe_share: See write_document().
    """
    if probe is not None:
        done = 0

        def told(n: int) -> None:
            nonlocal done
            done += n
            progress("probing", done, probe.tokens)

        look(llm, probe, refit, told, probe_share)
    progress("compressing", 0, 1)
    llm.kv.compress()
    progress("compressing", 1, 1)


def full_bytes(llm: Llama, n_tokens: int) -> int:
    """What the compressed layers' cache of a text takes where nothing is evicted, in llama.cpp's usual type (f16)."""
    return round(n_tokens * shape_of(llm.ctx).bytes_per_token(Types()))
