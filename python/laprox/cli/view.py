"""`laprox view`: what is remembered of a document."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from laprox import KVConfig, Llama, extras
from laprox.chat.conversation import Conversation
from laprox.chat.reading import read_documents
from laprox.chat.session import context_size
from laprox.cli import options
from laprox.cli.progress import read
from laprox.cli.running import Running
from laprox.cli.show import notes, printable, remark, size
from laprox.cli.source import takes_model
from laprox.files import check_writable
from laprox.viz import terminal

if TYPE_CHECKING:
    from laprox.viz.remembered import Remembered


@takes_model(rest="document")
@options.takes_kv()
def view(
    model: options.Model,
    document: Annotated[
        list[Path], typer.Argument(metavar="DOCUMENT", help="Text, Markdown, HTML or PDF.", show_default=False)
    ],
    question: Annotated[
        str,
        typer.Option(
            "--question", "-q", help="Compress with this question in view; without it, before any question.", show_default=False
        ),
    ] = "",
    html: Annotated[Path | None, typer.Option("--html", help="Write a page to look at in a browser.", show_default=False)] = None,
    svg: Annotated[Path | None, typer.Option("--svg", help="Write a picture of what the terminal would show.", show_default=False)] = None,
    ctx_size: options.ContextSize = 0,
    kv: KVConfig = KVConfig(),
    cache_type_k: options.CacheTypeK = "f16",
    cache_type_v: options.CacheTypeV = "f16",
    running: Running = Running(),
) -> None:
    """Show what is remembered of a document: its text, shaded by how many layers and heads still hold each token.

    In the terminal, or as a page or a picture.
    """
    # Everything that can be wrong without the model is found before it is loaded.
    if not kv.on:
        raise ValueError("--kv-policy off keeps everything, so there is nothing to show")
    type_k, type_v = options.cache_types(cache_type_k, cache_type_v)
    if html is not None:
        extras.need("report", "laprox view --html")
    for path in filter(None, (html, svg)):
        check_writable(path)
    if svg is not None and svg.suffix.lower() != ".svg":
        raise ValueError(f"{svg}: the picture is an .svg file")
    model_path = model.get()
    loader = running.loader(model_path, type_k.ggml, type_v.ggml)
    text, name = read_documents(document, remark), ", ".join(path.name for path in document)
    conversation, question = Conversation(loader.vocabulary, text), printable(question)
    tokens = conversation.prompt(question) if question else conversation.opening()
    llm = loader.open(context_size(conversation, [question] if question else [], 1, ctx_size), kv)
    read(llm, tokens)

    from laprox.viz.remembered import look, score_all

    scores = score_all(llm)  # of everything that is in, before something goes
    llm.kv.compress()
    remembered = look(llm, scores, {"question": len(conversation.opening())} if question else None)
    show(remembered, Console(highlight=False), model_path.name, name, question, html, svg)


def view_held(llm: Llama, console: Console, html: Path | None) -> None:
    """Show what a Llama in use holds, scored as it is now.

    Raises:
        ValueError: The page can't be written, or nothing was read yet.
        LaproxError: The cache is not compressed.
    """
    from laprox.viz.remembered import look

    if html is not None:
        extras.need("report", "the page")
        check_writable(html)
    show(look(llm), console, Path(llm.model_path).name, "", "", html)


def show(
    remembered: Remembered,
    console: Console,
    model: str,
    document: str,
    question: str,
    html: Path | None,
    svg: Path | None = None,
) -> None:
    """Into the files, or else into the terminal."""
    if html is None and svg is None:
        terminal.show(remembered, console)
    stats = remembered.stats
    notes.print(
        f"{stats.tokens_seen:,} tokens seen · {stats.entries_held:,} of {stats.entries_full:,} entries held "
        f"({stats.entries_held / stats.entries_full:.1%}) · "
        f"{size(stats.kv_bytes)} now, {size(stats.kv_bytes_full)} without laprox",
        markup=False,
    )
    if stats.entries_held == stats.entries_full:
        notes.print(
            f"Nothing was evicted: the text is within the budget ({remembered.config.budget}), or within "
            f"min_tokens ({remembered.config.min_tokens})."
        )
    if html is not None:
        from laprox.viz.remembered_page import page  # matplotlib takes its time

        page(remembered, model, document, question).save(html)
        notes.print(printable(str(html)), markup=False)
    if svg is not None:
        terminal.save(remembered, svg, f"What {model} remembers of {document}")
        notes.print(printable(str(svg)), markup=False)
