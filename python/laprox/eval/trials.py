"""One question under one setting of the cache, and what it gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import llama_cpp
import numpy as np

from laprox.eval.metrics import agreement, kl_divergence, score
from laprox.eval.reader import SHORTER, Reader, Setting, Turn
from laprox.eval.tasks import Question
from laprox.llama import Llama

FULL = {regime: Setting(None, "", regime) for regime in ("aware", "follow-up")}  # without compression, "agnostic" is "aware"


@dataclass(frozen=True)
class Prompt:
    """A question as tokens.

    Attributes:
        question: As text.
        tokens: What follows the document, up to where the model goes on.
        after: The same, if the first question and its answer stand between.
        reply: The reference, to be forced; of the metric "right" only.
        ends: Whether the model has to end its reply after that: with a chat template it can be expected to.
    """

    question: Question
    tokens: Sequence[int]
    reply: Sequence[int] = ()
    ends: bool = True
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
        """Question i on the full cache: {"task", "score", "bytes", "entries", "read_ms"}, and "answer" if it wasn't forced."""
        return self._measure(i, FULL[regime]) | {"read_ms": round(1000 * self.reader.read_cpu_seconds, 1)}

    def measure(self, i: int, setting: Setting) -> dict[str, Any]:
        """Question i on a compressed cache.

        Returns:
            {"task", "score", "bytes", "entries", "score_ms", "rest_ms", "kl", "agreement"}, and "answer" if it wasn't forced.
            "kl" is the mean over the tokens of the full cache's greedy answer (of a forced reply, its own) and the one that
            ends it, in nats; "agreement" the share of them at which the full cache's likeliest one is the likeliest, too.
            Milliseconds are processor time.
        """
        return self._measure(i, setting)

    def order(self, regime: str, settings: Sequence[Setting]) -> Iterator[tuple[int, Setting]]:
        """Questions and settings in the order in which the reader has least to do. Follow-ups begin with the second."""
        first = int(regime == "follow-up")
        if regime == "aware":  # it keeps the cache with a question,
            yield from ((i, s) for i in range(len(self.prompts)) for s in settings if s.policy != SHORTER)
            settings = [s for s in settings if s.policy == SHORTER]
        yield from ((i, s) for s in settings for i in range(first, len(self.prompts)))  # or compressed

    def _measure(self, i: int, setting: Setting) -> dict[str, Any]:
        prompt, question = self.prompts[i], self.prompts[i].question
        forced = question.metric == "right"
        follow_up = setting.regime == "follow-up"
        full = FULL["follow-up" if follow_up else "aware"]
        if setting.policy is not None and (i, full.regime) not in self._full:
            self._measure(i, full)
        first = Turn(tuple(self.prompts[0].tokens), self.prompts[0].question.predict) if follow_up else None
        start = self.reader.start(prompt.after if follow_up else prompt.tokens, setting, first)
        cost = start.cost
        assert cost is not None
        row: dict[str, Any] = {"task": question.task, "score": 0.0, "bytes": cost.kv_bytes, "entries": cost.entries_held}
        if setting.policy is not None:
            row["score_ms"] = round(1000 * cost.cpu_seconds * cost.score_share, 3)
            row["rest_ms"] = round(1000 * cost.cpu_seconds * (1 - cost.score_share), 3)

        answer: list[int] = list(prompt.reply)
        if forced:
            # One distribution after the reply's last token, too: where it should end.
            now = np.array(list(self.reader.force(start, [*answer, -1])), np.float32)
        elif setting.policy is None:
            now, answer = self.reader.answer(start, question.predict)
        else:
            now, answer = self.reader.compare(start, self._full[i, full.regime][0], question.predict)
        if setting.policy is None:
            self._full[i, full.regime] = answer, now
        else:
            along = self._full[i, full.regime][1]
            n = len(now) if prompt.ends or not forced else -1
            row["kl"] = round(float(kl_divergence(along[:n], now[:n]).mean()), 6)
            row["agreement"] = round(float(agreement(along[:n], now[:n]).mean()), 6)
        if forced:
            likeliest = now.argmax(-1)
            right = (likeliest[:-1] == np.asarray(answer)).all()
            row["score"] = float(right and (not prompt.ends or _is_end(self.reader.llm, int(likeliest[-1]))))
        else:
            row["answer"] = self.detokenize(answer)
            counts = row["answer"].lstrip("\n").partition("\n")[0] if question.first_line else row["answer"]
            row["score"] = score(question.metric, counts, question.references, question.classes)
        return row


def _is_end(llm: Llama, token: int) -> bool:
    return bool(llama_cpp.llama_vocab_is_eog(llm._model.vocab, token))
