"""One question under one setting of the cache, and what it gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from laprox.eval.metrics import agreement, kl_divergence, score
from laprox.eval.reader import Reader, Setting, Start
from laprox.eval.tasks import Question

FULL = Setting()
ALONG = 64  # tokens of an answer along which distributions are compared: with 150,000 words in a vocabulary, 40 MB a question


@dataclass(frozen=True)
class Prompt:
    """A question as tokens.

    Attributes:
        question: As text.
        tokens: What follows the document, up to where the model goes on.
    """

    question: Question
    tokens: Sequence[int]


@dataclass(frozen=True)
class Answer:
    """A greedy answer.

    Attributes:
        tokens: Without the end of turn.
        logprobs: What the first ALONG of them were taken from, and the end where it comes before that: float32 [n, vocabulary].
    """

    tokens: list[int]
    logprobs: npt.NDArray[np.float32]

    @property
    def compared(self) -> list[int]:
        """The tokens after each of which a distribution is compared, but for the last distribution's: one fewer than those."""
        return self.tokens[: len(self.logprobs) - 1]


@dataclass
class Trials:
    """The questions about one document, which a reader has in its cache.

    Attributes:
        reader: Has read the document.
        prompts: The questions.
        detokenize: The text of tokens.
    """

    reader: Reader
    prompts: Sequence[Prompt]
    detokenize: Callable[[Sequence[int]], str]
    _full: dict[int, Answer] = field(default_factory=dict, repr=False)  # the full cache's, by question

    def whole(self, i: int) -> dict[str, Any]:
        """Question i on the full cache: {"task", "answer", "score", "bytes", "entries", "read_ms"}."""
        start = self.reader.start(self.prompts[i].tokens, FULL)
        self._full[i] = self._answer(i, start)
        return self._row(i, start, self._full[i]) | {"read_ms": round(1000 * self.reader.read_cpu_seconds, 1)}

    def measure(self, i: int, setting: Setting) -> dict[str, Any]:
        """Question i on a compressed cache.

        Returns:
            {"task", "answer", "score", "bytes", "entries", "kl", "agreement", "score_ms", "rest_ms"}. "kl" is the KL divergence
            from the full cache's distributions along the full cache's own answer, its first ALONG tokens and its end, the mean
            in nats; "agreement" the share of them whose likeliest token is the same. Milliseconds are processor time.
        """
        if i not in self._full:
            self.whole(i)
        full, tokens = self._full[i], self.prompts[i].tokens
        start = self.reader.start(tokens, setting)
        answer = self._answer(i, start)
        now = answer.logprobs
        if answer.compared[: len(full.compared)] != full.compared:  # it went another way, so it is led along the full cache's
            along = self.reader.force(self.reader.start(tokens, setting), [*full.compared, -1])
            now = np.array([logprobs.astype(np.float32) for logprobs in along])
        pairs = list(zip(full.logprobs, now))
        cost = start.cost
        assert cost is not None
        return self._row(i, start, answer) | {
            "kl": float(np.mean([kl_divergence(*pair) for pair in pairs])),
            "agreement": float(np.mean([agreement(*pair) for pair in pairs])),
            "score_ms": round(1000 * cost.cpu_seconds * cost.score_share, 3),
            "rest_ms": round(1000 * cost.cpu_seconds * (1 - cost.score_share), 3),
        }

    def order(self, regime: str, settings: Sequence[Setting]) -> Iterator[tuple[int, Setting]]:
        """Questions and settings in the order in which the reader has least to do."""
        if regime == "aware":  # it keeps the cache with a question,
            yield from ((i, setting) for i in range(len(self.prompts)) for setting in settings)
        else:  # or compressed
            yield from ((i, setting) for setting in settings for i in range(len(self.prompts)))

    def _answer(self, i: int, start: Start) -> Answer:
        tokens: list[int] = []
        logprobs: list[npt.NDArray[np.float32]] = []
        for token, row in self.reader.steps(start, self.prompts[i].question.predict):
            if token is not None:
                tokens.append(token)
            if len(logprobs) < ALONG:
                logprobs.append(row.astype(np.float32))
        return Answer(tokens, np.array(logprobs))

    def _row(self, i: int, start: Start, answer: Answer) -> dict[str, Any]:
        question, cost = self.prompts[i].question, start.cost
        assert cost is not None
        text = self.detokenize(answer.tokens)
        counts = text.lstrip("\n").partition("\n")[0] if question.first_line else text
        value = score(question.metric, counts, question.references, question.classes)
        return {"task": question.task, "answer": text, "score": value, "bytes": cost.kv_bytes, "entries": cost.entries_held}
