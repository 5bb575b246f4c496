"""A model that has loaded a document, for the commands that ask about it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from laprox import KVConfig, LaproxError, hub
from laprox.chat.conversation import Conversation
from laprox.chat.loading import Loader, load_weights
from laprox.chat.session import Session, context_size
from laprox.cli.running import Answers, Running
from laprox.cli.show import notes, printable, size
from laprox.cli.source import ModelSource
from laprox.read.document import Document


def load(
    document: Document,
    model: ModelSource | None,
    kv: KVConfig | None,
    questions: Sequence[str],
    ctx_size: int,
    answers: Answers,
    running: Running,
) -> Session:
    """The model that made a document, or the one that is named, with the document in it.

    Args:
        document: A file that was read.
        model: None: the one that the document names.
        kv: Settings of the context; None: the document's, which evict nothing more from it.
        questions: The context has room for each of them, and an answer.
        ctx_size: The value of -c.
        answers: How they are drawn.
        running: How the model runs.

    Raises:
        ValueError: The model isn't here or can't be loaded, or the context is too small.
        LaproxError: It is another model.
    """
    kv = document.kv if kv is None else kv
    if not kv.on:
        raise ValueError("--kv-policy off can't hold a document that was read; accepted: full, which evicts nothing, or another policy")
    loader = running.loader((model or _its_model(document)).get(), *document.cache_types)
    conversation = _conversation(document, loader)
    llm = loader.open(context_size(conversation, list(questions), answers.n_predict, ctx_size), kv)
    start = time.perf_counter()
    llm.load_document(document)
    seconds = time.perf_counter() - start
    notes.print(
        f"{printable(document.title)}: {len(document.tokens):,} tokens, {size(document.n_bytes)} of {size(document.settings['full_bytes'])}, "
        f"loaded in {1000 * seconds:.0f} ms",
        style="dim",
        markup=False,
    )
    return Session(llm, conversation, answers)


def _conversation(document: Document, loader: Loader) -> Conversation:
    try:
        return document.conversation(loader.vocabulary)
    except LaproxError:
        with closing(load_weights(loader.path, use_extra_bufts=False)) as weights:  # mapped, but neither read nor repacked
            document.check_model(weights)  # says more, if that is why
        raise


def _its_model(document: Document) -> ModelSource:
    # Whoever wrote the file chose this: nothing is downloaded on its word but what laprox knows by checksum.
    name = document.settings["model"]
    if hub.is_known(name) or Path(name).is_file():
        return ModelSource(name)
    raise ValueError(f"{document.path}: it was made with the model {printable(name)}, which isn't here; -m MODEL says where it is")
