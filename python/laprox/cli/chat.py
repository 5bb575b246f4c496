"""`laprox chat`: questions about documents."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from laprox import KVConfig, KVStats, LaproxError
from laprox.cli import log, options
from laprox.cli.conversation import Conversation
from laprox.cli.loading import load, load_vocabulary
from laprox.cli.session import Sampling, Session
from laprox.cli.show import allocated_without, notes, printable, read, remark, size, status
from laprox.cli.streams import print_json
from laprox.cli.source import takes_model
from laprox.extras import MissingExtra
from laprox.reading import read_documents

HELP = """\
/stats          what the cache holds, and what compressing it cost
/view           the text, shaded by what is held; /view FILE.html writes a page
/budget 10%     keep at most this much; what is evicted stays so until /reread
/reread         read everything again with the last question in view, and answer it again
/reread TEXT    the same with a new question
/help           this
/quit           or ctrl-D; ctrl-C ends an answer"""

ROOM = 2048  # tokens of context for questions and answers, at least
FEW = 128  # tokens held per KV head, below which a percentage of a short text is worth a warning


@takes_model()
@options.takes_kv()
def chat(
    model: options.Model,
    document: Annotated[
        list[Path] | None,
        typer.Option("--document", "-d", help="A text, Markdown, HTML, PDF, Word, PowerPoint, EPUB, RTF or e-mail file; repeatable.", show_default=False),
    ] = None,
    ask: Annotated[
        list[str] | None,
        typer.Option("--ask", help="Answer this and quit; repeatable. Without it, questions come from stdin.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per answer.")] = False,
    before_question: Annotated[
        bool,
        typer.Option(
            "--compress-before-question",
            help="Compress the documents once, for many unrelated questions: each is answered for itself, at once, and "
            "worse than with the question in view.",
        ),
    ] = False,
    ctx_size: options.ContextSize = 0,
    kv: KVConfig = KVConfig(),
    cache_type_k: options.CacheTypeK = "f16",
    cache_type_v: options.CacheTypeV = "f16",
    threads: options.Threads = 0,
    gpu_layers: options.GPULayers = 0,
    batch_size: options.BatchSize = 512,
    chat_template: options.ChatTemplate = None,
    n_predict: options.Predict = Sampling.n_predict,
    temperature: options.Temperature = Sampling.temperature,
    top_k: options.TopK = Sampling.top_k,
    top_p: options.TopP = Sampling.top_p,
    seed: options.Seed = Sampling.seed,
    verbose: options.Verbose = False,
) -> None:
    """Ask a model about documents, on a cache that is compressed when documents and first question are in.

    Follow-up questions are answered from what is held; /reread reads again with the current question in view.
    """
    # Everything that can be wrong without the model is found before it is loaded.
    if before_question and not kv.on:
        raise typer.BadParameter("--compress-before-question needs a --kv-policy")
    type_k, type_v = options.cache_types(cache_type_k, cache_type_v)
    ask = [printable(question) for question in ask or []]
    template = options.chat_template(chat_template) if chat_template is not None else None
    text = read_documents(document, remark) if document else ""

    model_path = model.get()
    log.record(verbose)
    conversation = Conversation(load_vocabulary(model_path), text, template=template)
    n_ctx = context_size(conversation, ask, n_predict, ctx_size)
    llm = load(
        model_path,
        verbose,
        kv=kv if kv.on else None,
        n_ctx=n_ctx,
        n_batch=batch_size,
        n_threads=threads or None,
        n_gpu_layers=gpu_layers,
        type_k=type_k.ggml,
        type_v=type_v.ggml,
    )
    session = Session(llm, conversation, Sampling(n_predict, temperature, top_k, top_p, seed))
    ui = Chat(session, as_json, before_question)
    if text:
        read(session, conversation.opening())
    if before_question:
        ui.compress()
    if ask:
        ui.answer_all(ask)
    elif sys.stdin.isatty():
        ui.talk()
    else:
        ui.answer_all(line.strip() for line in sys.stdin if line.strip())


def context_size(conversation: Conversation, questions: list[str], n_predict: int, wanted: int) -> int:
    """Room for documents, questions and answers, within what the model was trained for unless it is told otherwise."""
    asked = max([len(conversation.prompt(q)) for q in questions], default=len(conversation.opening()))
    least = asked + min(n_predict, 256)
    if wanted:
        if wanted < least:
            raise ValueError(f"documents and question are {asked:,} tokens, too many for -c {wanted} (at least {least})")
        return wanted
    trained = conversation.trained_for
    if trained and trained < least:
        raise ValueError(
            f"documents and question are {asked:,} tokens, but the model was trained for {trained:,}: "
            f"ask about less of it (or insist: -c {least})"
        )
    room = max(ROOM, 2 * n_predict * max(1, len(questions)))
    return min(asked + room, trained or asked + room)


class Chat:
    """A session at a terminal or in a pipe."""

    def __init__(self, session: Session, as_json: bool, unrelated: bool) -> None:
        self._session = session
        self._as_json = as_json
        self._unrelated = unrelated
        self._warned = False  # that little is held

    def compress(self) -> None:
        """Compress the documents with no question in view, and say what that costs."""
        self._session.llm.kv.compress()
        stats = self._session.llm.kv.stats()
        notes.print(
            f"Compressed before any question: {stats.entries_held:,} of {stats.entries_full:,} entries held "
            f"({size(stats.kv_bytes)}). They were chosen without knowing what will be asked, so expect worse answers "
            "than with the question in view, above all at small budgets."
        )

    def answer_all(self, questions: Iterable[str]) -> None:
        """Answer questions that nobody waits to follow up."""
        for question in questions:
            self._answer(question)

    def talk(self) -> None:
        """Read questions and commands until the end."""
        notes.print("Ask away. /help lists the commands, ctrl-D quits.")
        while True:
            try:
                line = notes.input("[bold]> [/]").strip()
            except EOFError:
                notes.print()
                return
            except KeyboardInterrupt:
                notes.print("  (ctrl-D quits)")
                continue
            if line in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/"):
                    self._obey(line)
                elif line:
                    self._answer(line)
            except KeyboardInterrupt:
                notes.print("\n(stopped)")
            except (LaproxError, MissingExtra, ValueError, RuntimeError) as error:
                notes.print(printable(str(error)), style="red", markup=False)

    def _obey(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if command == "/help":
            notes.print(HELP, markup=False)
        elif command == "/stats":
            self._show_stats()
        elif command == "/view":
            self._view(argument)
        elif command == "/budget":
            self._set_budget(argument)
        elif command == "/reread":
            self._reread(argument)
        else:
            raise ValueError(f"unknown command {command}; /help lists them")

    def _show_stats(self) -> None:
        stats = self._session.llm.kv.stats()
        seconds = stats.score_seconds + stats.select_seconds + stats.compact_seconds
        notes.print(
            f"{stats.tokens_seen:,} tokens seen\n"
            f"{stats.entries_held:,} of {stats.entries_full:,} entries held\n"
            f"{size(stats.kv_bytes)} of cache, {size(allocated_without(stats, self._session.llm.n_ctx()))} without laprox; "
            f"{size(stats.window_bytes)} more for the last queries\n"
            f"{stats.compressions} compressions in {seconds:.2f} s "
            f"(scoring {stats.score_seconds:.2f}, selecting {stats.select_seconds:.2f}, moving {stats.compact_seconds:.2f})",
            markup=False,
        )

    def _view(self, path: str) -> None:
        from laprox.cli.view import view_held  # it takes chat's options

        view_held(self._session.llm, notes, Path(path).expanduser() if path else None)

    def _set_budget(self, text: str) -> None:
        kv = self._session.llm.kv
        if text:
            kv.set(budget=text)
            kv.compress()
        stats = kv.stats()
        notes.print(
            f"budget {kv.config.budget}: {stats.entries_held:,} of {stats.entries_full:,} entries held, {size(stats.kv_bytes)}; "
            "/reread brings back what a larger budget allows",
            markup=False,
        )

    def _reread(self, question: str) -> None:
        turns = self._session.conversation.turns
        before = list(turns)
        question = printable(question)
        if not question:
            if not turns:
                raise ValueError("there is no question yet: ask one first, or /reread QUESTION")
            question, _ = turns.pop()
        try:
            read(self._session, self._session.conversation.prompt(question))
            self._answer(question)
        except BaseException:  # interrupted: the old answer stands
            turns[:] = before
            raise

    def _answer(self, question: str) -> None:
        if self._unrelated:
            self._session.conversation.turns.clear()
        answer = self._session.answer(printable(question), self._write)
        if self._as_json:
            print_json(answer.as_dict())
            return
        print(flush=True)
        line = status(answer.stats, answer.tokens_seen, answer.tokens_per_s, self._session.llm.n_ctx())
        notes.print(line, style="dim", markup=False)
        self._warn_if_little(answer.stats)

    def _warn_if_little(self, stats: KVStats | None) -> None:
        if self._warned or not stats or not stats.compressions:
            return
        held = stats.entries_held * stats.tokens_seen // stats.entries_full
        if held < FEW:
            self._warned = True
            notes.print(f"Only {held} tokens per KV head are held, little to answer from. --kv-budget 512 keeps so many tokens.", style="yellow")

    def _write(self, text: str) -> None:
        if not self._as_json:
            print(printable(text), end="", flush=True)
