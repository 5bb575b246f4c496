#!/usr/bin/env python3
"""What a document that is read once costs and keeps: the demo's text is read, probed, compressed and written, and asked eight questions.

    .venv/bin/python scripts/bench_documents.py [MODEL] [BUDGET[@TYPE]...]   # a GGUF file or a name of `laprox models`; 20% 10%@q8_0

One thread, a few minutes for each budget; seconds are the processor's. Every question is answered twice, by two Llamas, in opposite orders: the answers are the same.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from laprox import KVConfig, Llama, demo, hub
from laprox._upstream import model_of
from laprox.cache_types import CACHE_TYPES
from laprox.chat.conversation import Conversation
from laprox.chat.tokens import read
from laprox.read.document import Document
from laprox.read.probe import repeating
from laprox.read.writing import FOR_READING, write_document

MiB = 1 << 20
ANSWER = dict(max_tokens=32, temperature=0.0)


def open_llm(path: str, n_ctx: int, kv: KVConfig, types: tuple[int, int] = (1, 1)) -> Llama:
    return Llama(path, n_ctx=n_ctx, n_threads=1, n_threads_batch=1, verbose=False, kv=kv, type_k=types[0], type_v=types[1])


def right(question: demo.Question, answer: str) -> bool:
    return any(expected.lower() in answer.lower() for expected in question.answers)


def answers(path: str, file: Path, order: list[demo.Question]) -> tuple[dict[str, str], float]:
    """By question; and the milliseconds that loading took."""
    document = Document(file)
    llm = open_llm(path, len(document.tokens) + 512, document.kv, document.cache_types)
    began = time.perf_counter()
    document = llm.load_document(file)
    loading = 1000 * (time.perf_counter() - began)
    asked = {
        q.text: llm.create_completion(document.prompt(q.text), stop=document.stop, **ANSWER)["choices"][0]["text"] for q in order
    }
    llm.close()
    return asked, loading


def main() -> None:
    given = sys.argv[1:]
    name = given.pop(0) if given else "qwen2.5-coder-0.5b"
    path = name if name.endswith(".gguf") else str(hub.fetch(name))
    about = demo.load()
    questions = list(about.questions)

    llm = open_llm(path, 8192, KVConfig(policy="full", archive="off"))
    conversation = Conversation(model_of(llm), about.text)
    tokens = conversation.prompt("?")[: conversation.document_end()]
    n_ctx = repeating(conversation).context
    for _ in read(llm, tokens):
        pass
    state = llm.save_state()
    n_right = 0
    for question in questions:
        llm.load_state(state)
        answer: Any = llm.create_completion(conversation.prompt(question.text), **ANSWER)
        n_right += right(question, answer["choices"][0]["text"])
    llm.close()
    print(
        f"{Path(path).stem}, {len(tokens):,} tokens: full cache, {state.llama_state_size / MiB:.1f} MiB, {n_right} of {len(questions)} right",
        flush=True,
    )

    with tempfile.TemporaryDirectory() as folder:
        for text in given or ["20%", "10%@q8_0"]:
            budget, _, kind = text.partition("@")
            types = (CACHE_TYPES[kind or "f16"].ggml,) * 2
            marks: dict[str, tuple[float, float]] = {}
            llm = open_llm(path, n_ctx, replace(FOR_READING, budget=budget), types)
            file = Path(folder) / "text.kv"
            told = clock(marks)
            write_document(llm, about.text, file, progress=told)
            n_bytes = file.stat().st_size
            llm.close()
            times = {what: end - begin for what, (begin, end) in marks.items()}
            (first, loading), (second, _) = answers(path, file, questions), answers(path, file, questions[::-1])
            n_right = sum(right(q, first[q.text]) for q in questions)
            print(
                f"{budget} {kind or 'f16'}: {n_bytes / MiB:.1f} MiB, {n_right} of {len(questions)} right, "
                f"{'the same' if first == second else 'NOT the same'} in another order; reading {times['reading']:.1f} s, "
                f"probe {times['probing'] / times['reading']:.2f} and refit {times['compressing'] / times['reading']:.2f} of it; loaded in {loading:.0f} ms",
                flush=True,
            )


def clock(marks: dict[str, tuple[float, float]]) -> Callable[[str, int, int], None]:
    """A progress that notes when each step began, as the one before it ended, and ended, in seconds of this process."""
    last = time.process_time()

    def told(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.process_time()
        marks[what] = (marks[what][0] if what in marks else last, now)
        last = now

    return told


if __name__ == "__main__":
    main()
