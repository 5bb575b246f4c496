"""One question under one setting of the cache, and what it gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from laprox.eval.metrics import agreement, kl_divergence, score
from laprox.eval.reader import SHORTER, Reader, Setting, Turn
from laprox.eval.tasks import Question

ALONG = 64  # tokens of an answer along which distributions are compared: with 150,000 words in a vocabulary, 40 MB a question
FULL = {regime: Setting(None, "", regime) for regime in ("aware", "follow-up")}  # without compression, "agnostic" is "aware"


@dataclass(frozen=True)
class Prompt:
    """A question as tokens.

    Attributes:
        question: As text.
        tokens: What follows the document, up to where the model goes on.
        after: The same, if the first question and its answer stand between.
    """

    question: Question
    tokens: Sequence[int]
    after: Sequence[int] = ()


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
    _full: dict[tuple[int, str], Any] = field(default_factory=dict, repr=False)  # by question and regime: see _measure

    def whole(self, i: int, regime: str = "aware") -> dict[str, Any]:
        """Question i on the full cache: {"task", "answer", "score", "bytes", "entries", "read_ms"}."""
        return self.measure(i, FULL[regime]) | {"read_ms": round(1000 * self.reader.read_cpu_seconds, 1)}

    def measure(self, i: int, setting: Setting) -> dict[str, Any]:
        """Question i on a compressed cache.

        Returns:
            {"task", "answer", "score", "bytes", "entries", "kl", "agreement", "score_ms", "rest_ms"}. "kl" is the KL divergence
            from the full cache's distributions along the full cache's own answer, its first ALONG tokens and what comes after,
            the mean in nats; "agreement" the share of them whose likeliest token is the same. Milliseconds are processor time.
        """
        prompt, question = self.prompts[i], self.prompts[i].question
        follow_up = setting.regime == "follow-up"
        full = FULL["follow-up" if follow_up else "aware"]
        if setting.policy is not None and (i, full.regime) not in self._full:
            self.measure(i, full)
        first = Turn(tuple(self.prompts[0].tokens), self.prompts[0].question.predict) if follow_up else None
        start = self.reader.start(prompt.after if follow_up else prompt.tokens, setting, first)
        cost = start.cost
        assert cost is not None
        row: dict[str, Any] = {"task": question.task, "score": 0.0, "bytes": cost.kv_bytes, "entries": cost.entries_held}
        if setting.policy is None:
            along, answer = self.reader.answer(start, question.predict)
            self._full[i, full.regime] = answer[:ALONG], along[: ALONG + 1]
        else:
            told, along = self._full[i, full.regime]
            now, answer = self.reader.compare(start, told, question.predict)
            row["score_ms"] = round(1000 * cost.cpu_seconds * cost.score_share, 3)
            row["rest_ms"] = round(1000 * cost.cpu_seconds * (1 - cost.score_share), 3)
            row["kl"] = round(float(np.mean([kl_divergence(*pair) for pair in zip(along, now)])), 6)
            row["agreement"] = round(float(agreement(along, now).mean()), 6)
        row["answer"] = self.detokenize(answer)
        counts = row["answer"].lstrip("\n").partition("\n")[0] if question.first_line else row["answer"]
        row["score"] = score(question.metric, counts, question.references, question.classes)
        return row

    def order(self, regime: str, settings: Sequence[Setting]) -> Iterator[tuple[int, Setting]]:
        """Questions and settings in the order in which the reader has least to do. Follow-ups begin with the second."""
        first = int(regime == "follow-up")
        if regime == "aware":  # it keeps the cache with a question,
            yield from ((i, s) for i in range(len(self.prompts)) for s in settings if s.policy != SHORTER)
            settings = [s for s in settings if s.policy == SHORTER]
        yield from ((i, s) for s in settings for i in range(first, len(self.prompts)))  # or compressed
