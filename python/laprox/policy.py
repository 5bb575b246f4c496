"""Policies of your own: one method in NumPy, on the real engine."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from laprox import _core

CUSTOM = "custom"  # the engine's name for a scorer that is set from outside


class Head:
    """What one KV head holds when it is scored. Arrays are read when they are first asked for.

    Attributes:
        layer: The model's layer.
        index: The KV head within the layer.
        positions: Of the entries held, ascending: int32 [n].
    """

    def __init__(self, ctx: int, seq_id: int, layer: int, index: int, positions: npt.NDArray[np.int32]) -> None:
        self.layer = layer
        self.index = index
        self.positions = positions
        self._ctx = ctx
        self._seq_id = seq_id

    @cached_property
    def keys(self) -> npt.NDArray[np.float32]:
        """Keys after RoPE: [n, d]."""
        return _core.keys(self._live(), self.layer, self.index, self._seq_id)

    @cached_property
    def values(self) -> npt.NDArray[np.float32]:
        """Values: [n, d_v]."""
        return _core.values(self._live(), self.layer, self.index, self._seq_id)

    @property
    def queries(self) -> npt.NDArray[np.float32]:
        """The observation window: queries after RoPE, oldest first, of the query heads that read this KV head.

        [w, n_gqa, d]; w is less than the window where tokens were taken back. Their products with the keys, times
        `scale`, are attention logits.
        """
        return self._window[0]

    @property
    def scale(self) -> float:
        """What the model multiplies query-key products with: mostly 1/sqrt(d), or 1 where it scales its queries."""
        return _core.kq_scale(self._live(), self.layer)

    @property
    def query_positions(self) -> npt.NDArray[np.int32]:
        """Positions of the queries: [w]. A query sees the entries up to its own position."""
        return self._window[1]

    @cached_property
    def _window(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        ctx = self._live()
        queries, positions = _core.queries(ctx, self.layer, self._seq_id)
        n_gqa = queries.shape[1] // dict(_core.layers(ctx))[self.layer]
        return queries[:, self.index * n_gqa : (self.index + 1) * n_gqa], positions

    def _live(self) -> int:
        if not self._ctx:  # the entries have moved since, and the cache may be gone
            raise _core.LaproxError(f"layer {self.layer}, head {self.index}: what it held can only be read inside score()")
        return self._ctx

    def _close(self) -> None:
        self._ctx = 0


class Policy(ABC):
    """Decides which entries the cache keeps: subclass it, write `score`, and pass an instance as `kv_policy`.

        class SmallKeys(laprox.Policy):
            def score(self, head):
                return -np.linalg.norm(head.keys, axis=1)

        llm = laprox.Llama("model.gguf", kv_policy=SmallKeys(), kv_budget="10%")

    The engine does the rest: budgets, attention sinks and recent tokens (which are never evicted, whatever their
    scores), compaction. It asks for scores only where something has to go: not within the budget or `min_tokens`.

    Attributes:
        allocator: Who keeps how many, one of `laprox.allocators()`: "uniform" gives each head the same share, "global"
            (the default) lets all heads of the model compete, so their scores must mean the same.
    """

    allocator: str = "global"

    @abstractmethod
    def score(self, head: Head) -> npt.ArrayLike:
        """Score what one KV head holds. Called for every head of every compressed layer, one after another.

        What this raises comes out of the call that compressed (`llm.kv.compress()`, a completion), and the cache stays
        as it was. Where the engine compresses by itself, between the batches of llama.cpp (no room, or a long
        generation), nothing can be raised: if there is room all the same, a warning says that it failed; if not, the
        exception is the cause of the error of `Llama.eval`.

        Args:
            head: Its entries, and the queries observed last.

        Returns:
            Numbers [n], one per entry: higher is kept first, -inf is never kept. Or booleans [n], a mask: entries that
            are False are never kept, those that are True are, the latest first, until the budget is used up. A mask
            decides alone where the budget is larger than what it leaves, such as "99%".
        """


class Scorer:
    """What the engine calls for a Policy: `_core.set_scorer` borrows it."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._error: BaseException | None = None
        self._thread: int | None = None
        self._warned = False

    @property
    def name(self) -> str:
        return type(self.policy).__name__

    @property
    def running(self) -> bool:
        """Whether this thread is inside Policy.score(), so that the cache is in the middle of a compression."""
        return self._thread == threading.get_ident()

    def __call__(
        self, ctx: int, seq_id: int, layer: int, head: int, positions: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.float32] | None:
        """The scores of a head; None, and the exception is kept, if there are none."""
        of = Head(ctx, seq_id, layer, head, positions)
        self._thread = threading.get_ident()
        try:
            return _checked(self.policy.score(of), positions, f"{self.name}.score(), layer {layer}, head {head},")
        except BaseException as error:  # also KeyboardInterrupt: nothing may be raised through the engine
            self._error = self._error or error
            return None
        finally:
            self._thread = None
            of._close()

    def take_error(self) -> BaseException | None:
        """What was raised since this was asked last."""
        error, self._error = self._error, None
        return error

    def first_warning(self) -> bool:
        """True once."""
        first, self._warned = not self._warned, True
        return first


def _checked(result: Any, positions: npt.NDArray[np.int32], where: str) -> npt.NDArray[np.float32]:
    """Scores for the engine. Raises TypeError or ValueError, which say what is wrong with a policy's answer."""
    accepted = f"accepted: {len(positions)} numbers, or booleans, one per entry"
    answer = np.asarray(result)
    if answer.dtype.kind not in "biuf":
        what = f"an array of {answer.dtype}" if isinstance(result, np.ndarray) else f"{result!r:.80}"
        raise TypeError(f"{where} returned {what}; {accepted}")
    if answer.shape != positions.shape:
        raise ValueError(f"{where} returned an array of shape {answer.shape}; {accepted}")
    if answer.dtype.kind == "b":
        return np.where(answer, positions, -np.inf).astype(np.float32)
    with np.errstate(over="ignore"):  # said below
        scores = np.ascontiguousarray(answer, dtype=np.float32)
    wrong = np.isnan(scores) | np.isposinf(scores)
    if wrong.any():
        first = int(np.argmax(wrong))
        raise ValueError(
            f"{where} returned {answer[first]} for position {positions[first]}; "
            "accepted: numbers that float32 can hold, or -inf for what is never kept"
        )
    return scores
