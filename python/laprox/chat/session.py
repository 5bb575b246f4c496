"""One model and one conversation: reading, answering, and the numbers of both."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from laprox import KVStats, Llama
from laprox.chat.conversation import Conversation
from laprox.chat.tokens import check_context

ROOM = 2048  # tokens of context for questions and answers, at least


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    n_predict: int = 512
    temperature: float = 0.2
    top_k: int = 40
    top_p: float = 0.95
    seed: int = -1


@dataclass(frozen=True)
class Answer:
    """An answer, and the cache after it. Without the compressing cache there are no numbers of it."""

    question: str
    text: str
    tokens_seen: int
    tokens_per_s: float
    stats: KVStats | None
    recalled: int = 0  # entries that came back for it
    stale: bool = False  # answered from what was kept for an earlier question alone

    def as_dict(self) -> dict[str, Any]:
        """What --json prints."""
        names = ("entries_held", "entries_full", "kv_bytes", "kv_bytes_full")
        stats = asdict(self.stats) if self.stats else {}
        return {
            "question": self.question,
            "answer": self.text,
            "tokens_seen": self.tokens_seen,
            **{name: stats.get(name) for name in names},
            "entries_recalled": self.recalled,
            "decode_tokens_per_s": round(self.tokens_per_s, 2),
        }


class Session:
    """Asks a model about a document."""

    def __init__(self, llm: Llama, conversation: Conversation, sampling: Sampling) -> None:
        self.llm = llm
        self.conversation = conversation
        self._sampling = sampling

    def answer(self, question: str, write: Callable[[str], None], may_end: bool = False) -> Answer:
        """Answer a question and pass the text on as it comes. With `may_end` an interrupt (ctrl-C) ends the answer, which counts."""
        sampling, before = self._sampling, self.stats()
        chunks: Iterator[Any] = self.llm.create_completion(  # type: ignore[assignment]
            self.conversation.ask(question),
            max_tokens=sampling.n_predict,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=None if sampling.seed < 0 else sampling.seed,
            stop=self.conversation.stop,
            stream=True,
        )
        pieces: list[str] = []
        first_token, n_before = 0.0, 0
        try:
            for chunk in chunks:
                if not pieces:  # the prompt is in
                    first_token, n_before = time.perf_counter(), self.llm.n_tokens
                pieces.append(chunk["choices"][0]["text"])
                write(pieces[-1])
        except KeyboardInterrupt:
            if not pieces or not may_end:
                raise
        seconds = time.perf_counter() - first_token
        decoded = self.llm.n_tokens - n_before

        text = "".join(pieces).strip()
        self.conversation.turns.append((question, text))
        stats = self.stats()
        speed = decoded / seconds if decoded else 0.0
        if stats is None or before is None:
            return Answer(question, text, self.llm.n_tokens, speed, None)
        again = stats.tokens_reread > 0 or self.llm._resumed  # from its start, or a document's end
        recalled = stats.entries_recalled - (0 if again else before.entries_recalled)
        evicted_before = before.entries_held < before.entries_full and not again
        return Answer(question, text, stats.tokens_seen, speed, stats, recalled, evicted_before and not stats.archived_entries)

    def stats(self) -> KVStats | None:
        """None without the compressing cache."""
        return self.llm.kv.stats() if self.llm.kv_config else None


def context_size(conversation: Conversation, questions: list[str], n_predict: int, wanted: int) -> int:
    """Room for documents, questions and answers, within what the model was trained for unless it is told otherwise."""
    asked = max([len(conversation.prompt(q)) for q in questions], default=len(conversation.opening()))
    least = asked + min(n_predict, 256)
    trained = conversation.trained_for
    check_context("documents and question", least, wanted, trained, "ask about less of it")
    room = max(ROOM, 2 * n_predict * max(1, len(questions)))
    return wanted or min(asked + room, trained or asked + room)
