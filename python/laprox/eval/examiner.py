"""One contender on one document: what it still knows, how far it is from the full cache, what it takes.

* recall: facts were put into the document (laprox.eval.facts); does the greedy answer contain the value, as whole words?
* fidelity: the document's own last tokens were held back. The cache is compressed on what precedes them, and they are forced
  upon the model one by one: KL divergence and top-1 agreement against the full cache, and perplexity. What the first of them
  meets comes from the full cache everywhere, so it is left out.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from laprox.eval.facts import Question
from laprox.eval.metrics import agreement, kl_divergence
from laprox.eval.reader import Decoding, Reader, Setting

Logprobs = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Material:
    """A document as tokens.

    Attributes:
        name: For messages.
        prefix: What the chat template puts before it; may be empty.
        body: The document with the facts, without its end.
        continuation: Its end, held back.
        questions: About the facts,
        asked: and what follows the body when each is asked.
    """

    name: str
    prefix: list[int]
    body: list[int]
    continuation: list[int]
    questions: list[Question]
    asked: list[list[int]]

    @property
    def n_read(self) -> int:
        """Tokens that a full cache reads before anything is asked."""
        return len(self.prefix) + len(self.body)

    def last(self, n: int) -> list[int]:
        """Of n tokens, the prefix and as many of the body's last tokens as there is room for: what a shorter context sees."""
        return [*self.prefix, *self.body[len(self.body) - max(0, n - len(self.prefix)) :]]

    def context_size(self, n_read: int, predict: int) -> int:
        """Tokens that a context must hold if it reads so many of the document."""
        return n_read + max(len(self.continuation), max(len(tokens) for tokens in self.asked) + predict)


def reference(reader: Reader, material: Material, advance: Callable[[], None] = lambda: None) -> Logprobs:
    """What the full cache expects of the continuation: log-probabilities, float32 [tokens - 1, vocabulary]."""
    start = reader.start([])
    rows = []
    for i, logprobs in enumerate(reader.force(start, material.continuation)):
        if i:
            rows.append(logprobs.astype(np.float32))
        advance()
    return np.array(rows)


@dataclass(frozen=True)
class Examiner:
    """Examines readers that have read a document.

    Attributes:
        material: The document.
        detokenize: Tokens as text.
        stop: Where an answer ends, if not at an end-of-turn token.
        predict: Longest answer in tokens.
        regime: Of the questions: "aware" or "agnostic".
    """

    material: Material
    detokenize: Callable[[Sequence[int]], str]
    stop: Sequence[str]
    predict: int
    regime: str

    @property
    def steps(self) -> int:
        """How often examine() calls `advance`."""
        return len(self.material.continuation) + len(self.material.asked) * self.predict

    def examine(
        self,
        reader: Reader,
        full: Logprobs,
        policy: str | None = None,
        budget: str = "5%",
        advance: Callable[[int], None] = lambda n: None,
    ) -> dict[str, Any]:
        """One row, without what is allocated where stock llama.cpp allocates it.

        Args:
            reader: It has read the material, or as much of it as fits.
            full: What reference() gives.
            policy: None is stock llama.cpp.
            budget: Of the policy.
            advance: Called as the work goes on; `steps` altogether.

        Raises:
            LaproxError: The engine refuses this policy or this budget; says why.
        """
        fidelity, cost, resident = self._continue(reader, full, policy, budget, advance)
        speed = reader.decoding
        answers = [self._answer(reader, tokens, policy, budget, advance) for tokens in self.material.asked]
        right = [q.answered_by(answer) for answer, q in zip(answers, self.material.questions)]
        row: dict[str, Any] = {"answers": answers, "right": right, **fidelity}
        if cost is not None:
            row |= {"allocated": cost.kv_bytes, "entries": cost.entries_held, "entries_full": cost.entries_full}
        compress = cost.seconds if cost is not None and policy is not None else 0.0
        return row | {
            "timings": {
                "prefill_s": reader.read_seconds + compress,
                "compress_s": compress,
                "decode_tps": speed.tokens / speed.seconds if speed.seconds else None,
                "rss": resident,
            }
        }

    def _continue(self, reader: Reader, full: Logprobs, policy: str | None, budget: str, advance: Callable[[int], None]) -> Any:
        reader.decoding = Decoding()
        start = reader.start([], Setting(policy, budget, "agnostic"))
        memory = resident_bytes()
        resident = memory - reader.state_bytes if memory else None
        kl, same, nll = [], [], []
        for i, (now, token) in enumerate(zip(reader.force(start, self.material.continuation), self.material.continuation)):
            if i:
                kl.append(float(kl_divergence(full[i - 1], now)))
                same.append(bool(agreement(full[i - 1], now)))
                nll.append(-float(now[token]))
            advance(1)
        return {"kl": kl, "agreement": same, "nll": nll}, start.cost, resident

    def _answer(
        self, reader: Reader, tokens: Sequence[int], policy: str | None, budget: str, advance: Callable[[int], None]
    ) -> str:
        start = reader.start(tokens, Setting(policy, budget, self.regime))
        text = self.detokenize(reader.greedy(start, self.predict))
        for stop in self.stop:
            text = text.partition(stop)[0]
        advance(self.predict)
        return text.strip()


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
