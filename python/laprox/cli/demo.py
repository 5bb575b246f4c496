"""`laprox demo`: the shipped model on a document of ours, on all of the cache and on a part of it."""

from __future__ import annotations

from statistics import median
from typing import Annotated

import typer
from llama_cpp._internals import LlamaModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from laprox import KVConfig, models
from laprox.cli import log, options
from laprox.cli.conversation import Conversation
from laprox.cli.loading import load, load_vocabulary
from laprox.cli.session import Answer, Sampling, Session
from laprox.cli.show import printable, read, size
from laprox.documents import Document, Question, make_document

LONGEST_ANSWER = 64
LENGTH = 2000


def demo(
    kv_budget: options.KVBudget = str(options.DEFAULT.budget),
    n_questions: Annotated[int, typer.Option("--questions", min=1, max=12, help="Ask so many.")] = 6,
    n_tokens: Annotated[int, typer.Option("--tokens", min=600, max=12000, help="Length of the document; the longer, the more the toy itself misses.")] = LENGTH,
    threads: options.Threads = 0,
    verbose: options.Verbose = False,
) -> None:
    """Answer questions about a document from the full cache and from 5% of it, side by side."""
    compressed = KVConfig(budget=kv_budget)
    log.record(verbose)
    vocabulary = load_vocabulary(models.demo_model())
    document = make_example(vocabulary, n_tokens)
    questions = document.questions[:n_questions]

    def make_session(kv: KVConfig) -> Session:
        conversation = Conversation(vocabulary, document.text)
        n_ctx = max(len(conversation.prompt(q.text)) for q in questions) + LONGEST_ANSWER
        llm = load(models.demo_model(), verbose, kv=kv, n_ctx=n_ctx, n_threads=threads or None)
        return Session(llm, conversation, Sampling(n_predict=LONGEST_ANSWER, temperature=0.0))

    full, small = make_session(KVConfig(policy="full")), make_session(compressed)
    console = Console(highlight=False)
    console.print(
        f"{models.demo_model().name}, a toy, reads a document of {len(full.conversation.opening()):,} tokens and answers from its cache.\n",
        markup=False,
    )
    read(full, full.conversation.opening())
    document_read = full.llm.save_state()  # both start each question from here, so the document is read once

    table = Table("question", "from the full cache", f"from {kv_budget} of it", box=None, pad_edge=False, padding=(0, 2, 1, 0))
    speeds: list[tuple[float, float]] = []
    for question in questions:
        # Each is asked for itself, with itself in view when the cache is compressed.
        full.conversation.turns.clear()
        small.conversation.turns.clear()
        small.llm.load_state(document_read)
        pair = full.answer(question.text, _ignore), small.answer(question.text, _ignore)
        speeds.append((pair[0].tokens_per_s, pair[1].tokens_per_s))
        table.add_row(Text(question.text), *(_marked(answer, question) for answer in pair))
    console.print(table)

    for label, session, speed in zip(("full", kv_budget), (full, small), zip(*speeds)):
        stats = session.llm.kv.stats()
        console.print(
            f"{label:>5}: {stats.entries_held:,} of {stats.entries_full:,} entries, {size(stats.kv_bytes)} of cache, "
            f"{median(speed):.0f} tokens/s",
            markup=False,
        )


def make_example(vocabulary: LlamaModel, n_tokens: int = LENGTH) -> Document:
    """A document and twelve questions about it, of names, attributes and wordings that the toy was not trained on."""
    return make_document(
        "demo f", n_tokens, questions=12, share=0.35, split="eval", kinds=("single", "unanswerable"), rephrased=0.0,
        count=lambda text: len(vocabulary.tokenize(text.encode(), add_bos=False, special=False)),
    )


def _marked(answer: Answer, question: Question) -> Text:
    return Text(f"{printable(answer.text)} {'✓' if question.value in answer.text else '✗'}")


def _ignore(_text: str) -> None:
    """The answer is printed when it is complete."""
