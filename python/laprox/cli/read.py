"""`laprox read`: documents are read and compressed once, into a file that questions are answered from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from laprox import KVConfig, LaproxError
from laprox.cache_types import Auto
from laprox.chat.conversation import Conversation
from laprox.chat.decoding import printable
from laprox.chat.reading import read_documents
from laprox.chat.tokens import check_context
from laprox.cli import options
from laprox.cli.progress import progress
from laprox.cli.running import Running
from laprox.cli.show import notes, remark, size, tell_choice
from laprox.cli.source import takes_model
from laprox.files import check_writable
from laprox.read.document import check_replaceable, is_document
from laprox.read.probe import check, check_share
from laprox.read.writing import FOR_READING, REPEAT, make_probe, write_document

ANSWER = 256  # tokens that a question and its answer take at least: a document that leaves no room for them is of no use


@takes_model(rest="document")
@options.takes_kv(
    without=("window", "archive", "archive_limit", "recall", "recall_tokens"),
    window=FOR_READING.window, policy=FOR_READING.policy, recent=FOR_READING.recent, archive=FOR_READING.archive,
)  # fmt: skip
def read(
    model: options.Model,
    document: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE", help="Text, Markdown, HTML, PDF, Word, PowerPoint, EPUB, RTF or e-mail; several are read as one.", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The document to write: report.kv.", show_default=False)],
    probe: Annotated[
        str | None,
        typer.Option(
            "--probe", metavar="WHAT",
            help="What stands for the questions to come: repeat (the model repeats the text: about twice the time of reading), a file "
            "with a question per line, or none (the text's own end). By default repeat, where policy and model allow it.",
            show_default=False,
        ),
    ] = None,
    refit: Annotated[
        bool, typer.Option("--refit/--no-refit", help="With a probe: refit the values of what is kept to what it reads from all.")
    ] = True,
    probe_share: Annotated[
        float, typer.Option("--probe-share", help="Share of the probe's tokens that score, for less time: 0.25 is every fourth.")
    ] = 1.0,
    archive: Annotated[
        bool, typer.Option("--archive", help="Write what is evicted, too, so that a question can choose anew: larger than the full cache.")
    ] = False,
    ctx_size: options.ContextSize = 0,
    kv: KVConfig = FOR_READING,
    cache_type_k: options.BudgetedTypeK = "f16",
    cache_type_v: options.BudgetedTypeV = "f16",
    chat_template: options.ChatTemplate = None,
    running: Running = Running(),
) -> None:
    """Read documents, compress them before any question, and write a file that `laprox ask` answers from."""
    # Everything that can be wrong is found before the long work starts.
    if not kv.on:
        raise ValueError("--kv-policy off has nothing to write; accepted: full, which evicts nothing, or another policy")
    kv = replace(kv, archive="auto") if archive else kv
    type_k, type_v = options.budgeted_types(cache_type_k, cache_type_v, kv)
    template = options.chat_template(chat_template) if chat_template is not None else None
    for path in filter(is_document, document):
        raise ValueError(f"{path}: it is a GGUF; what was read can't be read again, so give the files that it was made of")
    check_writable(output)
    check_replaceable(output)
    check_share(probe_share, "--probe-share")
    asked = _asked(probe)
    text = read_documents(document, remark)

    model_path = model.get()
    loader = running.loader(model_path, type_k, type_v)
    conversation = Conversation(loader.vocabulary, text, template=template, advice=options.OTHER_TEMPLATE)
    n_tokens = conversation.document_end()
    if asked is not None:
        try:
            check(kv.policy)
        except LaproxError as refusal:
            if probe is not None:
                raise ValueError(f"--probe {probe}: {refusal} (none)") from None
            asked = None
            if kv.policy != "full":
                notes.print(f"Without a probe, the end of the text chooses what is held, which questions may not need: {refusal}.", markup=False)
    needed = max(n_tokens + ANSWER, looks.context if (looks := make_probe(conversation, asked)) else 0)
    check_context("documents and their probe" if looks else "documents", needed, ctx_size, conversation.trained_for, "read less of it")
    llm = loader.reading(Auto(n_tokens, unseen=True)).open(ctx_size or needed, kv)
    tell_choice(llm)
    with progress("reading", n_tokens, "tokens") as update:
        made = write_document(
            llm, text, output, ", ".join(printable(path.name) for path in document),
            template=template, archive=archive, probe=asked, refit=refit, probe_share=probe_share, model=str(model_path) if model.from_repository else model.given,
            progress=lambda what, done, total: update(description=what, completed=done, total=total),
        )  # fmt: skip
    held, full = made.settings["entries_held"], made.settings["entries_full"]
    notes.print(
        f"{output}: {n_tokens:,} tokens, {held:,} of {full:,} entries ({held / full:.1%}), "
        f"{size(made.n_bytes)} of {size(made.settings['full_bytes'])}",
        markup=False,
    )


def _asked(probe: str | None) -> str | list[str] | None:
    """write_document()'s probe. Raises ValueError if that is neither a word nor a file with questions."""
    if probe is None or probe == REPEAT:
        return REPEAT
    if probe == "none":
        return None
    try:
        questions = [line.strip() for line in Path(probe).read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(f"--probe is {probe!r} ({reason}); accepted: {REPEAT}, none, or a file with a question per line") from None
    if not questions:
        raise ValueError(f"--probe {probe}: there is no question in it")
    return questions
