"""One question under one setting of the cache, and what it gave."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from laprox.eval.metrics import agreement, kl_divergence, score
from laprox.eval.reader import SHORTER, Cost, Decoding, Reader, Setting, Turn
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
        told: Not a question, but the document's own next tokens: what the model expects of each is compared with the full cache.
    """

    question: Question
    tokens: Sequence[int]
    after: Sequence[int] = ()
    told: Sequence[int] = ()

    @property
    def room(self) -> int:
        """Tokens that come after the prompt, at most."""
        return max(len(self.told), self.question.predict)


@dataclass
class Trials:
    """The questions about one document, which a reader has in its cache.

    Attributes:
        reader: Has read the document, or as much of it as fits.
        prompts: The questions.
        detokenize: The text of tokens.
        along: How many tokens of the full cache's own answer are compared with; 0: none, the answer alone counts.
        full: What others are compared with, by question and regime: tokens, and the full cache's log-probabilities of them. Made
            when it is needed, or given where another context has read the whole document.
    """

    reader: Reader
    prompts: Sequence[Prompt]
    detokenize: Callable[[Sequence[int]], str]
    along: int = ALONG
    full: dict[tuple[int, str], Any] = field(default_factory=dict, repr=False)

    def whole(self, i: int, regime: str = "aware") -> dict[str, Any]:
        """Question i on the full cache."""
        return self.measure(i, FULL[regime])

    def measure(self, i: int, setting: Setting) -> dict[str, Any]:
        """Question i on a compressed cache.

        Returns:
            {"task", "answer", "score"}; of a compressing context {"bytes", "entries"}; of a compressed cache {"score_ms",
            "rest_ms"}, or of one that isn't {"read_ms"}, in processor time.
            "kl" is the KL divergence from the full cache's distributions along the full cache's own answer, its first `along`
            tokens and what comes after, the mean in nats; "agreement" the share of them whose likeliest token is the same.
            For what is told: {"task", "kl", "agreement", "nll"} are lists, one value for each token but the first, which meets
            the full cache everywhere; and what it took, see _told().

        Raises:
            LaproxError: The engine refuses this policy or this budget; says why.
        """
        prompt, question = self.prompts[i], self.prompts[i].question
        if prompt.told:
            return self._told(i, setting)
        follow_up = setting.regime == "follow-up"
        full = FULL["follow-up" if follow_up else "aware"]
        is_full = setting.policy is None and not setting.coarse
        if self.along and not is_full and (i, full.regime) not in self.full:
            if setting.coarse:
                raise ValueError("the full cache comes first: there is nothing to compare with")
            self.measure(i, full)
        first = Turn(tuple(self.prompts[0].tokens), self.prompts[0].question.predict) if follow_up else None
        start = self.reader.start(prompt.after if follow_up else prompt.tokens, setting, first)
        row: dict[str, Any] = {"task": question.task, "score": 0.0, **_held(start.cost)}
        if setting.policy is not None and start.cost is not None:
            row["score_ms"] = round(1000 * start.cost.cpu_seconds * start.cost.score_share, 3)
            row["rest_ms"] = round(1000 * start.cost.cpu_seconds * (1 - start.cost.score_share), 3)
        elif not follow_up:
            row["read_ms"] = round(1000 * self.reader.read_cpu_seconds, 1)
        if not self.along:
            answer = self.reader.greedy(start, question.predict)
        elif is_full:
            along, answer = self.reader.answer(start, question.predict)
            self.full[i, full.regime] = answer[: self.along], along[: self.along + 1]
        else:
            told, along = self.full[i, full.regime]
            now, answer = self.reader.compare(start, told, question.predict)
            row["kl"] = round(float(np.mean([kl_divergence(*pair) for pair in zip(along, now)])), 6)
            row["agreement"] = round(float(agreement(along, now).mean()), 6)
        row["answer"] = self.detokenize(answer)
        row["score"] = score(question.metric, question.counted(row["answer"]), question.references, question.classes)
        return row

    def _told(self, i: int, setting: Setting) -> dict[str, Any]:
        """How far what the model expects of the document's next tokens is from the full cache's.

        Beside the values: "read", tokens of the document; "read_s" and "compress_s", seconds, the latter part of the former;
        "decode_tps", tokens per second one by one; "rss", bytes of this process but for copies of the cache.
        """
        reader, told = self.reader, self.prompts[i].told
        reader.decoding = Decoding()
        start = reader.start([], setting)
        memory = resident_bytes()
        full, met, kl, same, nll = self.full.get((i, "")), [], [], [], []
        if full is None and setting.policy is not None:
            raise ValueError("the full cache comes first: there is nothing to compare with")
        for j, (now, token) in enumerate(zip(reader.force(start, told), told)):
            if not j:
                continue
            met.append(now.astype(np.float32) if full is None else full[j - 1])
            kl.append(float(kl_divergence(met[-1], now)))
            same.append(bool(agreement(met[-1], now)))
            nll.append(-float(now[token]))
        if full is None:
            self.full[i, ""] = np.array(met)
        speed, seconds = reader.decoding, start.cost.seconds if start.cost is not None and setting.policy is not None else 0.0
        return {
            "task": self.prompts[i].question.task, **_held(start.cost), "kl": kl, "agreement": same, "nll": nll,
            "read": len(reader.document), "read_s": reader.read_seconds + seconds, "compress_s": seconds,
            "decode_tps": speed.tokens / speed.seconds if speed.seconds else None,
            "rss": memory - reader.state_bytes if memory else None,
        }  # fmt: skip


def order(n: int, settings: Sequence[Setting]) -> Iterator[tuple[int, Setting]]:
    """Questions and settings of one regime in the order in which the reader has least to do. Follow-ups begin with the second."""
    asked = [s for s in settings if s.regime == "aware" and s.policy != SHORTER]
    yield from ((i, s) for i in range(n) for s in asked)  # it keeps the cache with a question,
    yield from ((i, s) for s in settings if s not in asked for i in range(s.regime == "follow-up", n))  # or compressed


def resident_bytes() -> int | None:
    """Of this process's memory, what is in RAM now. None where the system doesn't say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        pass
    try:
        return 1024 * int(subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, check=True).stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _held(cost: Cost | None) -> dict[str, int]:
    return {} if cost is None else {"bytes": cost.kv_bytes, "entries": cost.entries_held, "entries_full": cost.entries_full}
