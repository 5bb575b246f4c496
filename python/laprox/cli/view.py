"""`laprox view`: what is remembered of a document."""

from __future__ import annotations

from collections.abc import Sequence
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
from laprox.cli.show import allocated_without, notes, printable, remark, size
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
        list[str] | None,
        typer.Option(
            "--question",
            "-q",
            help="Compress with this question in view; without it, before any question. Repeatable: for each further one, what "
            "comes back from the archive when it is asked instead.",
            show_default=False,
        ),
    ] = None,
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
        _check_page(html, [*document, model.here])
    if svg is not None:
        if svg.suffix.lower() != ".svg":
            raise ValueError(f"{svg}: the picture is an .svg file")
        check_writable(svg, [*document, model.here])
    model_path = model.get()
    loader = running.loader(model_path, type_k.ggml, type_v.ggml)
    text, name = read_documents(document, remark), ", ".join(path.name for path in document)
    conversation, questions = Conversation(loader.vocabulary, text), [printable(q) for q in question or []]
    first = questions[0] if questions else ""
    llm = loader.open(context_size(conversation, questions, 1, ctx_size), kv)
    read(llm, conversation.prompt(first) if first else conversation.opening())

    from laprox.viz.remembered import look, score_all

    marks = {"question": len(conversation.opening())} if questions else {}
    scores = score_all(llm)  # of everything that is in, before something goes
    llm.kv.compress()
    remembered = now = look(llm, scores, marks)
    later = []
    for asked in questions[1:]:
        next(llm.generate(conversation.prompt(asked), temp=0.0))
        now = look(llm, {}, marks, now)
        later.append((asked, now))
    show(remembered, Console(highlight=False), model_path.name, name, first, html, svg, later)


def _check_page(html: Path, inputs: Sequence[Path | None]) -> None:
    if html.suffix.lower() != ".html":
        raise ValueError(f"{html}: the page is an .html file")
    check_writable(html, inputs)


def view_held(llm: Llama, console: Console, html: Path | None, asked: bool, documents: Sequence[Path] = ()) -> None:
    """Show what a Llama in use holds, scored as it is now.

    Args:
        llm: Whose cache is compressed.
        console: Where it is shown, without a page.
        html: The page to write instead.
        asked: Whether there was a question yet, or a compression without one.
        documents: What was read, which no page takes the place of.

    Raises:
        ValueError: The page can't be written, or nothing was read yet.
        LaproxError: The cache is not compressed.
    """
    from laprox.viz.remembered import look

    if html is not None:
        extras.need("report", "the page")
        _check_page(html, documents)
    show(look(llm), console, Path(llm.model_path).name, "", "", html, asked=asked)


def show(
    remembered: Remembered,
    console: Console,
    model: str,
    document: str,
    question: str,
    html: Path | None,
    svg: Path | None = None,
    later: Sequence[tuple[str, Remembered]] = (),
    asked: bool = True,
) -> None:
    """Into the files, or else into the terminal."""
    if html is None and svg is None:
        terminal.show(remembered, console, later)
    stats = remembered.stats
    notes.print(
        f"{stats.tokens_seen:,} tokens seen · {stats.entries_held:,} of {stats.entries_full:,} entries held "
        f"({stats.entries_held / stats.entries_full:.1%}) · "
        f"{size(stats.kv_bytes)} now, {size(allocated_without(stats, remembered.n_ctx))} without laprox",
        markup=False,
    )
    if stats.entries_held == stats.entries_full:
        notes.print(_why_all(remembered.config, asked), markup=False)
    for other, now in later:
        came = now.came.sum()
        notes.print(f"“{other}”: {came:,} entries came back ({came / now.stats.entries_held:.1%} of those held)", markup=False)
    if html is not None:
        from laprox.viz.remembered_page import page  # matplotlib takes its time

        page(remembered, model, document, question, later).save(html)
        notes.print(printable(str(html)), markup=False)
    if svg is not None:
        terminal.save(remembered, svg, f"What {model} remembers of {document}", later)
        notes.print(printable(str(svg)), markup=False)


def _why_all(config: KVConfig, asked: bool) -> str:
    if config.policy == "full":
        return "Nothing is evicted: the policy is full."
    if not asked:
        return "Nothing has been compressed yet: that comes with the first question."
    return f"Nothing was evicted: the text is within the budget ({config.budget}), or within min_tokens ({config.min_tokens})."
