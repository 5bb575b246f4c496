"""`laprox chat`: questions about documents."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from laprox import KVConfig, KVStats, LaproxError
from laprox.cache_types import Auto
from laprox.chat.conversation import Conversation
from laprox.chat.reading import read_documents
from laprox.chat.session import Session, context_size
from laprox.cli import asking, options, streams
from laprox.cli.progress import read
from laprox.cli.running import Answers, Running
from laprox.cli.show import allocated_without, notes, printable, remark, size, status, tell_choice
from laprox.cli.source import NO_MODEL, takes_model
from laprox.cli.streams import print_json
from laprox.cli.view import view_held
from laprox.extras import MissingExtra
from laprox.read.document import Document, is_document

HELP = """\
/stats          what the cache holds, and what compressing it cost
/view           the text, shaded by what is held; /view FILE.html writes a page
/budget 10%     keep at most this much; what is evicted stays so until /reread
/reread         read everything again with the last question in view, and answer it again
/reread TEXT    the same with a new question
/help           this
/quit           or ctrl-D; ctrl-C ends an answer"""

FEW = 128  # tokens held per KV head, below which a percentage of a short text is worth a warning


@takes_model(needed=False)
@options.takes_kv()
def chat(
    context: typer.Context,
    model: options.ModelIfNeeded,
    document: Annotated[
        list[Path] | None,
        typer.Option("--document", "-d", help="A text, Markdown, HTML, PDF, Word, PowerPoint, EPUB, RTF or e-mail file; repeatable. Or one that `laprox read` wrote, which names its MODEL.", show_default=False),
    ] = None,
    ask: Annotated[
        list[str] | None,
        typer.Option("--ask", help="Answer this and quit; repeatable. Without it, questions come from stdin.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per answer.")] = False,
    regime: Annotated[
        str,
        typer.Option(
            "--regime",
            help="When the documents are compressed. aware: with the first question in view; agnostic: before any question, once for "
            "many unrelated ones, each of which is answered for itself, at once, and worse.",
        ),
    ] = "aware",
    before_question: options.BeforeQuestion = False,
    ctx_size: options.ContextSize = 0,
    kv: KVConfig = KVConfig(),
    cache_type_k: options.BudgetedTypeK = "f16",
    cache_type_v: options.BudgetedTypeV = "f16",
    chat_template: options.ChatTemplate = None,
    answers: Answers = Answers(),
    running: Running = Running(),
) -> None:
    """Ask a model about documents, on a cache that is compressed when documents and first question are in.

    What a later question needs comes back from an archive (--kv-archive).
    """
    # Everything that can be wrong without the model is found before it is loaded.
    agnostic = options.regime(regime, before_question) == "agnostic"
    if agnostic and not kv.on:
        raise typer.BadParameter("--regime agnostic needs a --kv-policy")
    type_k, type_v = options.budgeted_types(cache_type_k, cache_type_v, kv)
    ask = [printable(question) for question in ask or []]
    template = options.chat_template(chat_template) if chat_template is not None else None
    if (was_read := _was_read(document or [])) is not None:
        questions = _questions(ask)
        if template is not None or (type_k, type_v) not in (was_read.cache_types, (1, 1)):
            raise ValueError(f"{was_read.path} has the chat template and the cache types that it was made with; accepted: no options for them")
        session = asking.load(was_read, model, options.for_document(context, kv), ask, ctx_size, answers, running)
        Chat(session, as_json, agnostic, was_read).run(questions)
        return
    if model is None:
        raise typer.BadParameter(NO_MODEL)
    text = read_documents(document, remark) if document else ""
    questions = _questions(ask)

    model_path = model.get()
    loader = running.loader(model_path, type_k, type_v)
    conversation = Conversation(loader.vocabulary, text, template=template, advice=options.OTHER_TEMPLATE)
    about = Auto(conversation.document_end() if text else 0, agnostic)
    llm = loader.reading(about).open(context_size(conversation, ask, answers.n_predict, ctx_size), kv if kv.on else None)
    tell_choice(llm)
    session = Session(llm, conversation, answers)
    ui = Chat(session, as_json, agnostic, texts=document or [])
    if text:
        read(session.llm, conversation.opening())
    if agnostic:
        ui.compress()
    ui.run(questions)


def _questions(asked: list[str]) -> Iterable[str] | None:
    """These, or those that come through a pipe; None: somebody types them. Raises BadParameter if there is none."""
    if asked:
        return asked
    return None if sys.stdin is not None and sys.stdin.isatty() else streams.questions()


def _was_read(documents: list[Path]) -> Document | None:
    """The document that `laprox read` wrote, if there is one: then it is alone."""
    opened = [Document(path) for path in documents if is_document(path)]
    if opened and len(documents) > 1:
        raise ValueError(
            f"{opened[0].path}: other documents can't be put beside one that was read, whose entries were computed without them; "
            "`laprox read MODEL FILE...` reads several as one"
        )
    return opened[0] if opened else None


class Chat:
    """A session at a terminal or in a pipe."""

    def __init__(self, session: Session, as_json: bool, unrelated: bool, document: Document | None = None, texts: Sequence[Path] = ()) -> None:
        """Prepare a chat.

        Args:
            session: A model that has read the documents.
            as_json: Whether answers are printed as JSON.
            unrelated: Whether each question is for itself.
            document: The one that was read before and loaded, if it is about that.
            texts: Else the files that were read, whose place nothing takes.
        """
        self._session = session
        self._as_json = as_json
        self._unrelated = unrelated
        self._document = document
        self._texts = texts
        self._talks = False  # with somebody who may want to go on after ctrl-C
        self._warned = document is not None  # that little is held, which its maker was told
        self._lost = 0  # tokens, of which was said that they are
        self._hopes = True  # that there is an archive: nobody was told otherwise

    def run(self, questions: Iterable[str] | None) -> None:
        """Answer these; None: those that are typed."""
        if questions is None:
            self.talk()
        else:
            self.answer_all(questions)

    def compress(self) -> None:
        """Compress the documents with no question in view, and say what that costs."""
        self._session.llm.kv.compress()
        stats = self._session.llm.kv.stats()
        outlook = (
            "What a question needs comes back from the archive."
            if stats.archived_entries
            else "They were chosen without knowing what will be asked, so expect worse answers than with the question in view, "
            "above all at small budgets."
        )
        notes.print(
            f"Compressed before any question: {stats.entries_held:,} of {stats.entries_full:,} entries held ({size(stats.kv_bytes)}). "
            + outlook
        )

    def answer_all(self, questions: Iterable[str]) -> None:
        """Answer questions that nobody waits to follow up."""
        for question in questions:
            self._answer(question)

    def talk(self) -> None:
        """Read questions and commands until the end."""
        self._talks = True
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
            f"{stats.archived_entries:,} entries in the archive, {size(stats.archived_bytes)}; {stats.entries_recalled:,} came back in "
            f"{stats.recalls} recalls; {stats.tokens_lost:,} tokens are in no archive\n"
            f"{stats.compressions} compressions in {seconds:.2f} s "
            f"(scoring {stats.score_seconds:.2f}, selecting {stats.select_seconds:.2f}, moving {stats.compact_seconds:.2f})",
            markup=False,
        )

    def _view(self, path: str) -> None:
        asked = self._unrelated or self._session.conversation.turns
        view_held(self._session.llm, notes, Path(path).expanduser() if path else None, bool(asked), self._texts)

    def _refuse_for_document(self, what: str) -> None:
        if self._document is not None:
            raise ValueError(f"{what}: every question starts from {printable(str(self._document.path))}, as it is; `laprox read` makes it anew")

    def _set_budget(self, text: str) -> None:
        if text:
            self._refuse_for_document("/budget")
        kv = self._session.llm.kv
        if text:
            kv.set(budget=text)
            kv.compress()
        stats = kv.stats()
        notes.print(
            f"budget {kv.config.budget}: {stats.entries_held:,} of {stats.entries_full:,} entries held, {size(stats.kv_bytes)}"
            + ("" if stats.archived_entries or stats.entries_held == stats.entries_full else "; /reread brings back what a larger budget allows"),
            markup=False,
        )

    def _reread(self, question: str) -> None:
        self._refuse_for_document("/reread")
        turns = self._session.conversation.turns
        before = list(turns)
        question = printable(question)
        if not question:
            if not turns:
                raise ValueError("there is no question yet: ask one first, or /reread QUESTION")
            question, _ = turns.pop()
        try:
            read(self._session.llm, self._session.conversation.prompt(question))
            self._answer(question)
        except BaseException:  # interrupted: the old answer stands
            turns[:] = before
            raise

    def _answer(self, question: str) -> None:
        if self._unrelated:
            self._session.conversation.turns.clear()
        answer = self._session.answer(printable(question), self._write, may_end=self._talks)
        if self._as_json:
            print_json(answer.as_dict())
            return
        print(flush=True)
        line = status(answer.stats, answer.tokens_seen, answer.tokens_per_s, self._session.llm.n_ctx(), answer.recalled)
        notes.print(line, style="dim", markup=False)
        if answer.stale and self._document is None:
            notes.print(
                "This answer rests on what was kept for an earlier question, which may not be what it needs: /reread reads the "
                "documents again for it.",
                style="yellow",
            )
        self._warn_if_lost(answer.stats)
        self._warn_if_little(answer.stats)

    def _warn_if_lost(self, stats: KVStats | None) -> None:
        if stats is None or stats.tokens_lost <= self._lost or not self._archives:
            return
        self._lost = stats.tokens_lost
        if stats.archived_entries:
            notes.print(
                f"The archive has no room for {self._lost:,} of these tokens: what was evicted of them can't come back, whatever is asked. "
                "--kv-archive-limit says how much it may take.",
                style="yellow",
            )
        elif self._hopes:
            self._hopes = False
            notes.print(
                "There is no room for an archive, so what is evicted can't come back, whatever is asked. --kv-archive FOLDER, or TMPDIR, "
                "says where it is, and --kv-archive-limit how much it may take.",
                style="yellow",
            )

    @property
    def _archives(self) -> bool:
        """Whether what is evicted is to be archived."""
        config = self._session.llm.kv.config
        return config.archive != "off" and config.recall > 0 and config.policy != "full"

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
