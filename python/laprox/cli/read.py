"""`laprox read`: documents are read and compressed once, into a file that questions are answered from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from laprox import KVConfig
from laprox.chat.conversation import Conversation
from laprox.chat.decoding import printable
from laprox.chat.reading import read_documents
from laprox.chat.tokens import check_context
from laprox.cli import options
from laprox.cli.progress import progress
from laprox.cli.running import Running
from laprox.cli.show import notes, remark, size
from laprox.cli.source import takes_model
from laprox.files import check_writable
from laprox.read.document import is_document
from laprox.read.writing import write_document

ANSWER = 256  # tokens that a question and its answer take at least: a document that leaves no room for them is of no use


@takes_model(rest="document")
@options.takes_kv(without=("archive", "archive_limit", "recall", "recall_tokens"), archive="off")
def read(
    model: options.Model,
    document: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE", help="Text, Markdown, HTML, PDF, Word, PowerPoint, EPUB, RTF or e-mail; several are read as one.", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The document to write: report.kv.", show_default=False)],
    archive: Annotated[
        bool, typer.Option("--archive", help="Write what is evicted, too, so that a question can choose anew: larger than the full cache.")
    ] = False,
    ctx_size: options.ContextSize = 0,
    kv: KVConfig = KVConfig(),
    cache_type_k: options.CacheTypeK = "f16",
    cache_type_v: options.CacheTypeV = "f16",
    chat_template: options.ChatTemplate = None,
    running: Running = Running(),
) -> None:
    """Read documents, compress them before any question, and write a file that `laprox ask` answers from."""
    # Everything that can be wrong is found before the long work starts.
    if not kv.on:
        raise ValueError("--kv-policy off has nothing to write; accepted: full, which evicts nothing, or another policy")
    kv = replace(kv, archive="auto") if archive else kv
    type_k, type_v = options.cache_types(cache_type_k, cache_type_v)
    template = options.chat_template(chat_template) if chat_template is not None else None
    for path in filter(is_document, document):
        raise ValueError(f"{path}: it is a GGUF; what was read can't be read again, so give the files that it was made of")
    check_writable(output)
    text = read_documents(document, remark)

    model_path = model.get()
    loader = running.loader(model_path, type_k.ggml, type_v.ggml)
    conversation = Conversation(loader.vocabulary, text, template=template)
    n_tokens = conversation.document_end()
    check_context("documents", n_tokens + ANSWER, ctx_size, conversation.trained_for, "read less of it")
    llm = loader.open(ctx_size or n_tokens + ANSWER, kv)
    with progress("reading", n_tokens, "tokens") as update:
        made = write_document(
            llm, text, output, ", ".join(printable(path.name) for path in document),
            template=template, archive=archive, model=str(model_path) if model.from_repository else model.given,
            progress=lambda what, done, total: update(description=what, completed=done, total=total),
        )  # fmt: skip
    held, full = made.settings["entries_held"], made.settings["entries_full"]
    notes.print(
        f"{output}: {n_tokens:,} tokens, {held:,} of {full:,} entries ({held / full:.1%}), "
        f"{size(made.n_bytes)} of {size(made.settings['full_bytes'])}",
        markup=False,
    )
