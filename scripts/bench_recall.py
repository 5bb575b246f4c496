#!/usr/bin/env python3
"""What it costs that entries come back: a model reads the demo's text and answers a question, then another one is asked.

    .venv/bin/python scripts/bench_recall.py [MODEL]      # a GGUF file or a name of `laprox models`; one thread, some minutes
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from laprox import KVConfig, Llama, demo, hub
from laprox._upstream import model_of
from laprox.chat.conversation import Conversation
from laprox.chat.tokens import read

QUESTIONS = "Who drove the wagon?", "To which city did they go?"


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "qwen2.5-coder-0.5b"
    path = str(hub.fetch(name)) if not name.endswith(".gguf") else name
    llm = Llama(path, n_ctx=8192, n_threads=1, n_threads_batch=1, verbose=False, kv=KVConfig(budget="20%"))
    conversation = Conversation(model_of(llm), demo.load().text)
    opening = conversation.opening()
    reading = seconds(lambda: list(read(llm, opening)))
    llm.eval(conversation.prompt(QUESTIONS[0])[len(opening) :])
    compressing = seconds(llm.kv.prompt_done)
    conversation.turns.append((QUESTIONS[0], "-"))
    llm.eval(conversation.next_turn(QUESTIONS[1]))
    recalling = seconds(llm.kv.prompt_done)
    stats = llm.kv.stats()
    print(f"{len(opening):,} tokens read in {reading:.1f} s; compressed in {compressing:.2f} s")
    print(f"{stats.entries_recalled:,} entries came back in {recalling:.2f} s, the question evaluated again: {recalling / reading:.1%} of reading")
    print(f"{stats.kv_bytes / 2**20:.1f} MiB held, {stats.archived_bytes / 2**20:.1f} MiB archived")


if __name__ == "__main__":
    main()
