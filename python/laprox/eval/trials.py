"""One question under one setting of the cache, and what it gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import llama_cpp
import numpy as np

from laprox.eval.metrics import agreement, kl_divergence, score
from laprox.eval.reader import Reader, Setting
from laprox.eval.tasks import Question
from laprox.llama import Llama

FULL = Setting()


@dataclass(frozen=True)
class Prompt:
    """A question as tokens.

    Attributes:
        question: As text.
        tokens: What follows the document, up to where the model goes on.
        reply: The reference, to be forced; of the metric "right" only.
        ends: Whether the model has to end its reply after that: with a chat template it can be expected to.
    """

    question: Question
    tokens: Sequence[int]
    reply: Sequence[int] = ()
    ends: bool = True


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
    _full: dict[int, Any] = field(default_factory=dict, repr=False)  # log-probabilities along the reply, by question

    def whole(self, i: int) -> dict[str, Any]:
        """Question i on the full cache: {"task", "score", "bytes", "entries", "read_ms"}, and "answer" if it wasn't forced."""
        return self._measure(i, FULL) | {"read_ms": round(1000 * self.reader.read_cpu_seconds, 1)}

    def measure(self, i: int, setting: Setting) -> dict[str, Any]:
        """Question i on a compressed cache.

        Returns:
            {"task", "score", "bytes", "entries", "score_ms", "rest_ms"}, and "answer", or of a forced reply "kl" (the mean
            over its tokens, in nats) and "agreement" (the share of its tokens at which the full cache's likeliest one is
            the likeliest, too). Milliseconds are processor time.
        """
        return self._measure(i, setting)

    def order(self, regime: str, settings: Sequence[Setting]) -> Iterator[tuple[int, Setting]]:
        """Questions and settings in the order in which the reader has least to do."""
        if regime == "aware":  # it keeps the cache with a question,
            yield from ((i, setting) for i in range(len(self.prompts)) for setting in settings)
        else:  # or compressed
            yield from ((i, setting) for setting in settings for i in range(len(self.prompts)))

    def _measure(self, i: int, setting: Setting) -> dict[str, Any]:
        prompt, question = self.prompts[i], self.prompts[i].question
        forced = question.metric == "right"
        if forced and setting.policy is not None and i not in self._full:
            self._measure(i, FULL)
        start = self.reader.start(prompt.tokens, setting)
        cost = start.cost
        assert cost is not None
        row: dict[str, Any] = {"task": question.task, "score": 0.0, "bytes": cost.kv_bytes, "entries": cost.entries_held}
        if setting.policy is not None:
            row["score_ms"] = round(1000 * cost.cpu_seconds * cost.score_share, 3)
            row["rest_ms"] = round(1000 * cost.cpu_seconds * (1 - cost.score_share), 3)
        if not forced:
            row["answer"] = self.detokenize(self.reader.greedy(start, question.predict))
            counts = row["answer"].lstrip("\n").partition("\n")[0] if question.first_line else row["answer"]
            row["score"] = score(question.metric, counts, question.references, question.classes)
            return row

        # One distribution after the reply's last token, too: where it should end.
        now = np.array(list(self.reader.force(start, [*prompt.reply, -1])))
        likeliest = now.argmax(-1)
        right = (likeliest[:-1] == np.asarray(prompt.reply)).all()
        row["score"] = float(right and (not prompt.ends or _is_end(self.reader.llm, int(likeliest[-1]))))
        if setting.policy is None:
            self._full[i] = now
        else:
            n = len(now) if prompt.ends else -1
            row["kl"] = float(kl_divergence(self._full[i][:n], now[:n]).mean())
            row["agreement"] = float(agreement(self._full[i][:n], now[:n]).mean())
        return row


def _is_end(llm: Llama, token: int) -> bool:
    return bool(llama_cpp.llama_vocab_is_eog(llm._model.vocab, token))
