"""`laprox demo`: a real model answers about a real text, from all of its cache and from a part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from laprox import KVConfig
from laprox import demo as material
from laprox.chat.conversation import Conversation
from laprox.chat.session import Sampling, Session
from laprox.cli import options
from laprox.cli.groups import grouped
from laprox.cli.progress import read
from laprox.cli.running import Running
from laprox.cli.show import allocated_without, notes, printable, size
from laprox.cli.source import ModelSource, check_model
from laprox.demo import BRIEFLY, Question
from laprox.eval.metrics import contains_any

MODEL = "qwen2.5-coder-0.5b"
LONGEST_ANSWER = 32
BUDGET = "50%"  # of the 8 questions, each by itself, 7 are right here, 6 at 30%, and 5 at 20%, the default of everything else


@dataclass
class Column:
    """One of the caches that answer, and how it did.

    Attributes:
        label: As it is shown.
        session: The model and its conversation.
        right: How many answers were right, by part of the demo.
        speeds: Of answers, in tokens per second.
        held: The most bytes that answers came from.
    """

    label: str
    session: Session
    right: list[int] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)
    held: int = 0


@grouped
@options.takes_kv(only=("budget",), budget=BUDGET)
def demo(
    model: Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help="A GGUF file, or a name from `laprox models`.")] = MODEL,
    kv: KVConfig = KVConfig(),
    n_questions: Annotated[int, typer.Option("--questions", min=1, max=8, help="Ask only the first N questions.")] = 8,
    running: Running = Running(),
) -> None:
    """Ask a real model about a real text: stock llama.cpp beside laprox on a part of the cache."""
    about = material.load()
    questions = about.questions[:n_questions]
    check_model(model)
    path = ModelSource(model).get()
    loader = running.loader(path)
    console = Console(highlight=False, soft_wrap=True)

    def open_session(of: KVConfig | None) -> Session:
        conversation = Conversation(loader.vocabulary, about.text)
        asked = sum(len(conversation.next_turn(q.text + BRIEFLY)) + LONGEST_ANSWER for q in questions)
        llm = loader.open(len(conversation.opening()) + asked + 64, of)
        return Session(llm, conversation, Sampling(n_predict=LONGEST_ANSWER, temperature=0.0))

    stock = Column("llama.cpp", open_session(None))
    small = Column(f"laprox {kv.budget}", open_session(kv))
    n_tokens = len(stock.session.conversation.opening())
    console.print(
        f"[bold]{path.name}[/] reads {n_tokens:,} tokens: [italic]{about.title}[/] by {about.author}.\n"
        f"Stock llama.cpp answers from all of its KV cache, laprox from {kv.budget} of the entries."
    )
    console.print()
    for column in (stock, small):
        notes.print(f"{column.label} reads the text ...", style="dim", markup=False)
        read(column.session.llm, column.session.conversation.opening())
    whole = [column.session.llm.save_state() for column in (stock, small)]

    def from_the_start() -> None:
        for column, state in zip((stock, small), whole):
            column.session.conversation.turns.clear()
            column.session.llm.load_state(state)
            column.right.append(0)

    console.rule("[bold]Each question by itself", align="left")
    console.print("laprox compresses the text with the question in view.\n", style="dim")
    from_the_start()
    for i, question in enumerate(questions, 1):
        for column, state in zip((stock, small), whole):
            column.session.conversation.turns.clear()
            column.session.llm.load_state(state)
        _ask(console, i, question, (stock, small))

    console.rule("[bold]All questions in one conversation", align="left")
    console.print("laprox compressed the text for the first question; what the others need comes back from its archive.\n", style="dim")
    from_the_start()
    for i, question in enumerate(questions, 1):
        _ask(console, i, question, (stock, small))
    _summarise(console, stock, small, len(questions))


def _ask(console: Console, number: int, question: Question, columns: Sequence[Column]) -> None:
    """One question to every cache, the answers streamed."""
    console.print(f"{number}. {question.text}", style="bold", markup=False)
    for column in columns:
        console.print(f"   {column.label:<12} ", end="", style="dim", markup=False)
        answer = column.session.answer(question.text + BRIEFLY, lambda text: _stream(console, text))
        right = contains_any(answer.text, question.answers)
        column.right[-1] += bool(right)
        column.speeds.append(answer.tokens_per_s)
        if answer.stats is not None:
            column.held = max(column.held, answer.stats.kv_bytes)
        console.print(" [green]✓[/]" if right else " [red]✗[/]")
    console.print()


def _stream(console: Console, text: str) -> None:
    console.print(printable(text).replace("\n", " "), end="", markup=False)


def _summarise(console: Console, stock: Column, small: Column, n: int) -> None:
    stats = small.session.stats()
    assert stats is not None
    table = Table("", stock.label, small.label, box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name, one, other in (
        ("KV cache", size(allocated_without(stats, small.session.llm.n_ctx())), size(small.held)),
        ("right, each question by itself", f"{stock.right[0]} of {n}", f"{small.right[0]} of {n}"),
        ("right, all in one conversation", f"{stock.right[1]} of {n}", f"{small.right[1]} of {n}"),
        ("tokens per second", f"{median(stock.speeds):.0f}", f"{median(small.speeds):.0f}"),
    ):
        table.add_row(name, one, other)
    console.rule(align="left")
    console.print(table)
