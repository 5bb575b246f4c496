"""Where a model's heads need their entries: LU-KV's table, measured on the engine (arXiv 2602.08585).

For every (context, question) pair: the context is read alone and its entries get the scores by which they will be chosen
at run time. Then the question is asked, and what an entry was worth is what it added, at most, at any step of the answer:
max over the steps and the query heads of a KV head of A[t, i] * |v_i W_h|, divided by the sum of |v W_h| over the layer.
The solver in cpp/core turns both into the share of each head's entries to evict at 1% ... 99% overall; the table is the
mean over the pairs.

The choices where the paper leaves one: steps of the answer are the queries of drawn tokens only, never the question's;
pairs are solved one by one and then averaged; layers are made comparable by their value norms alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import llama_cpp
import numpy as np
import numpy.typing as npt

from laprox import _core
from laprox.chat.tokens import last_logits
from laprox.config import KVConfig
from laprox.llama import Llama

Floats = npt.NDArray[np.float64]

TEMPERATURE = 0.7
SEED = 42
STEPS = 64
LEAST_SHARE = 0.01  # of its entries that a head keeps whatever is asked: the last row of the table
_NEVER = 2**30  # the largest min_tokens


def check_scorer(scorer: str) -> None:
    """Raises ValueError unless a table can be made for it: none for yours, nor for criticalkv's, which chooses in two stages."""
    accepted = [name for name in _core.scorers() if name in _core.policies() and name not in ("custom", "criticalkv")]
    if scorer not in accepted:
        raise ValueError(f"--scorer is {scorer!r}; accepted: {', '.join(accepted)}")


@dataclass(frozen=True)
class Sample:
    """A context and questions about it, as tokens: what the prompts share, and what follows in each."""

    name: str
    context: list[int]
    questions: list[list[int]]


def observing(config: KVConfig, steps: int) -> KVConfig:
    """Settings for a Llama that evicts nothing and remembers the queries of a whole answer."""
    return replace(config, window=max(config.window, steps), min_tokens=_NEVER, prefill="dense")


def min_keep(config: KVConfig, n_tokens: int) -> int:
    """Entries that every head keeps of a context."""
    return max(round(LEAST_SHARE * n_tokens), config.sink + config.recent)


class Profiler:
    """Reads contexts and asks about them."""

    def __init__(self, llm: Llama, scorer: str, config: KVConfig, steps: int = STEPS) -> None:
        """`llm` has the settings of observing(); those of `config` are the ones that entries will be chosen with."""
        self._llm = llm
        self._scorer = scorer
        self._config = config
        self._steps = steps
        self._groups = {}  # query heads per KV head, by layer
        for layer, n_head_kv in llm.kv.layers.items():
            n_head, _, _ = _core.head_shape(llm.ctx, layer)
            self._groups[layer] = n_head // n_head_kv

    def read(self, context: Sequence[int]) -> None:
        """Read a context and score its entries."""
        llm, n = self._llm, len(context)
        llm.reset()
        llm.eval(context)
        self._n_context = n
        self._norms = {
            layer: group * float(sum(np.sum(norms, dtype=np.float64) for norms in heads))
            for (layer, heads), group in zip(self._observed("vnorm", 1).items(), self._groups.values())
        }
        # What is protected at run time is neither ranked nor pooled with what is.
        self._candidates = slice(self._config.sink, n - self._config.recent)
        self._observed(self._scorer, self._config.window)
        self._scores = [
            _core.finished_scores(llm.ctx, layer, head)[self._candidates]
            for layer, n_head_kv in llm.kv.layers.items()
            for head in range(n_head_kv)
        ]
        # Asking starts from a copy, since not every model can take tokens back.
        self._state = llm.save_state()

    def ask(self, question: Sequence[int], seed: int) -> Floats:
        """The shares to evict, [99, heads of all layers], that are best for the answer to a question."""
        utility = [
            head[self._candidates].astype(np.float64) / (self._norms[layer] or 1.0)
            for layer, heads in self.importance(question, seed).items()
            for head in heads
        ]
        n = self._n_context
        return np.asarray(_core.solve_profile(self._scores, utility, n, min_keep(self._config, n)))

    def importance(self, question: Sequence[int], seed: int) -> dict[int, list[npt.NDArray[np.float32]]]:
        """What each entry of the context added, at most, at any step of the answer: an array per layer and KV head."""
        self._llm.load_state(self._state)
        self._llm.eval(question)
        n_steps = self._answer(np.random.default_rng([SEED, seed]))
        return {
            layer: [head[: self._n_context] for head in heads]
            for layer, heads in self._observed("oracle", n_steps).items()
        }

    def _observed(self, scorer: str, window: int) -> dict[int, list[npt.NDArray[np.float32]]]:
        self._llm.kv.set(policy=f"{scorer}:uniform", window=window)
        return self._llm.kv.scores()

    def _answer(self, rng: np.random.Generator) -> int:
        """Draw an answer and evaluate it token by token. Returns its length: at least 1."""
        vocabulary = llama_cpp.llama_model_get_vocab(self._llm.model)
        for n in range(self._steps):
            chances = self._chances()
            token = _draw(chances, rng)
            while llama_cpp.llama_vocab_is_eog(vocabulary, token):
                if n:
                    return n
                chances[token] = 0.0  # an empty answer would tell nothing
                token = _draw(chances, rng)
            self._llm.eval([token])
        return self._steps

    def _chances(self) -> Floats:
        """Of each token to be the next, up to a factor."""
        logits = last_logits(self._llm)
        return np.exp((logits - logits.max()) / TEMPERATURE)


def _draw(chances: Floats, rng: np.random.Generator) -> int:
    total = np.cumsum(chances)
    return int(np.searchsorted(total, rng.random() * total[-1], side="right"))
