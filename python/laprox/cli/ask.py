"""`laprox ask`: questions about a document that was read before, each answered for itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from laprox import KVConfig
from laprox.cli import asking, options, streams
from laprox.cli.chat import Chat
from laprox.cli.groups import grouped
from laprox.cli.running import Answers, Running
from laprox.cli.show import printable
from laprox.cli.source import HfFile, HfRepo, find_source
from laprox.read.document import Document


@grouped
@options.takes_kv(only=("budget", "policy", "min_tokens", "gates"), policy="full")
def ask(
    context: typer.Context,
    document: Annotated[Path, typer.Argument(metavar="DOCUMENT", help="What `laprox read` wrote.", show_default=False)],
    question: Annotated[
        list[str] | None, typer.Argument(metavar="QUESTION", help="Without one, they come from stdin.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="MODEL", rich_help_panel="Model", show_default=False,
            help="A GGUF file, or a name of `laprox models`, instead of the model that the document names.",
        ),
    ] = None,
    hf_repo: HfRepo = None,
    hf_file: HfFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per answer.")] = False,
    ctx_size: options.ContextSize = 0,
    kv: KVConfig = KVConfig(),
    answers: Answers = Answers(),
    running: Running = Running(),
) -> None:  # fmt: skip
    """Answer questions about a document that `laprox read` wrote, each from the same state. Nothing is read again."""
    if not question and sys.stdin is not None and sys.stdin.isatty():
        raise typer.BadParameter("ask something: QUESTION, after the document (`laprox chat -d DOCUMENT` is a conversation)")
    questions = [printable(q) for q in question or streams.questions()]
    source = find_source(model, hf_repo, hf_file) if (model, hf_repo, hf_file) != (None, None, None) else None
    opened = Document(document)
    session = asking.load(opened, source, options.for_document(context, kv), questions, ctx_size, answers, running)
    Chat(session, as_json, unrelated=True, document=opened).answer_all(questions)
