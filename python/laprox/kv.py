"""`llm.kv`: what the compressing cache of a laprox.Llama holds, and its two levers."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from laprox import _core
from laprox.cache_types import Choice
from laprox.config import KVConfig

if TYPE_CHECKING:
    from laprox.llama import Llama

T = TypeVar("T")


@dataclass(frozen=True)
class KVStats:
    """A sequence's cache in numbers. Positions seen and entries held are different things.

    Attributes:
        tokens_seen: Positions evaluated and not removed.
        entries_held: (layer, KV head, token) entries in the cache.
        entries_full: What an uncompressed cache would hold.
        kv_bytes: Allocated for K, V and their masks, tail and padding included.
        kv_bytes_full: What llama.cpp would need to cache the tokens seen.
        window_bytes: Allocated for the observation window's queries.
        compressions: Times that entries were chosen.
        score_seconds: Time spent scoring entries.
        select_seconds: Time spent choosing those that stay.
        compact_seconds: Time spent moving them together.
        tokens_reread: Cached tokens that the last prompt evaluated again, since they were compressed for another prompt.
        recalls: Times that they were chosen for a later prompt, from the archive, too.
        entries_recalled: Entries that came back from it.
        archived_entries: Entries in the archive: of all tokens but the latest, held ones included.
        archived_bytes: Memory or disk that it takes.
        tokens_lost: Tokens that are neither among the latest nor in the archive: what was evicted of them can't come back.
    """

    tokens_seen: int
    entries_held: int
    entries_full: int
    kv_bytes: int
    kv_bytes_full: int
    window_bytes: int
    compressions: int
    score_seconds: float
    select_seconds: float
    compact_seconds: float
    tokens_reread: int = 0
    recalls: int = 0
    entries_recalled: int = 0
    archived_entries: int = 0
    archived_bytes: int = 0
    tokens_lost: int = 0


class KV:
    """The compressing cache of one `laprox.Llama`. Every method raises LaproxError with the engine's reason.

    So does all of this in another thread than one that is in the midst of a call of the Llama.
    """

    def __init__(self, llm: Llama) -> None:
        self._llm = llm

    @property
    def config(self) -> KVConfig:
        """The settings in force."""
        assert self._llm.kv_config is not None  # or Llama.kv would have refused
        return self._llm.kv_config

    @property
    def choice(self) -> Choice | None:
        """What type_k="auto" or type_v="auto" chose, and instead of what; None: the types were given."""
        return self._llm._choice

    @property
    def layers(self) -> dict[int, int]:
        """The layers that are compressed, and the KV heads of each; sliding-window layers, say, are not."""
        with self._engine() as ctx:
            return dict(_core.layers(ctx))

    def stats(self) -> KVStats:
        """The cache in numbers, now."""
        with self._engine() as ctx:
            return KVStats(**_core.stats(ctx), tokens_reread=self._llm._tokens_reread)

    def positions(self, layer: int, head: int) -> npt.NDArray[np.int32]:
        """Positions held for a KV head: [n], ascending. Every head of every layer has its own."""
        with self._engine() as ctx:
            return _core.positions(ctx, layer, head)

    def held(self) -> dict[int, npt.NDArray[np.bool_]]:
        """Which tokens each KV head of each compressed layer holds: {layer: bool [KV heads, positions seen]}.

        The sum over an array's last axis is what each head kept; over all heads of all layers, how many of them still hold
        each token. What a layer holds that is not compressed is not told: all of it, or its window.
        """
        with self._engine() as ctx:
            n = _core.stats(ctx)["tokens_seen"]
            held = {layer: np.zeros((n_head_kv, n), bool) for layer, n_head_kv in self.layers.items()}
            for layer, heads in held.items():
                for head, row in enumerate(heads):
                    row[self.positions(layer, head)] = True
            return held

    def scores(self, layer: int | None = None, head: int | None = None) -> Any:
        """Score what is held with the current policy and observation window. Evicts nothing.

        Raw scores as the policy defines them (LaProx, eq. of Algorithm 1), before pooling and layer normalisation,
        float32 [n], aligned with `positions(layer, head)`.

        What a `laprox.Policy` raises is raised here.

        Returns:
            The array of one KV head; or, without `head`, a list of them; or, without `layer`, a dict of such lists
            by layer. Everything is scored at each call, so ask for all layers at once.
        """
        if layer is None and head is not None:
            raise ValueError(f"scores(head={head}) needs a layer")
        with self._engine() as ctx:
            layers = self.layers
            self._scored(_core.score)
            if layer is None:
                return {il: _scores_of(ctx, il, n) for il, n in layers.items()}
            if head is None:
                return _scores_of(ctx, layer, layers.get(layer, 1))  # of another layer, the engine says what is wrong
            return _core.scores(ctx, layer, head)

    def compress(self) -> None:
        """Evict down to the budget now and give the memory back; does nothing within budget or min_tokens.

        `Llama.generate` calls this when a prompt is in; after a bare `Llama.eval` it is yours to call. What a
        `laprox.Policy` raises is raised here, and nothing is evicted.
        """
        self._scored(_core.compress)

    def prompt_done(self) -> None:
        """Say that a prompt is in: compress if more than min_tokens tokens came since entries were last chosen.

        `Llama.generate` calls this; after a bare `Llama.eval` it is yours to call. Also where entries were chosen while the
        prompt came in, so that its end, the question, has its say. Where entries were evicted before, those that this prompt
        needs come back from the archive, and its tokens are evaluated again on them, `recall` times. Raises as `compress` does.
        """
        first: int | None = None
        with self._engine():
            while True:
                first, again = self._scored(partial(self._llm._prompt_done, last=first))
                if first is None:
                    break
                self._llm._eval_scored(again)
        if lost := _core.last_error():
            warnings.warn(lost, RuntimeWarning, stacklevel=2)

    def set(self, **changes: Any) -> None:
        """Change settings, named as in KVConfig, from the next compression on.

        Raises:
            ValueError: A setting is out of range, or one that can't change any more: `prefill`, `archive`, `archive_limit`.
            TypeError: No such setting.
        """
        config = replace(self.config, **changes)
        if not config.on:
            raise ValueError("the policy of a live cache can't become off: make a Llama with kv=None")
        for name in ("prefill", "archive", "archive_limit"):
            if getattr(config, name) != getattr(self.config, name):
                raise ValueError(f"{name} is {getattr(self.config, name)!r} for the life of this Llama")
        with self._engine() as ctx:
            self._llm._use_scorer_of(config.policy, lambda: _core.set_params(ctx, config.params()))
            self._llm.kv_config = config
        if "policy" in changes:
            self._llm._full_for_document = False

    def _scored(self, function: Callable[[int], T]) -> T:
        scorer = self._llm._scorer
        try:
            with self._engine() as ctx:
                return function(ctx)
        except _core.LaproxError as refusal:
            error = scorer.take_error() if scorer else None
            if error is None:
                raise
            raise error from error.__cause__ or error.__context__ or refusal

    @contextlib.contextmanager
    def _engine(self) -> Iterator[int]:
        """The context, which no other thread uses meanwhile."""
        self._llm._check_not_scoring()
        ctx = self._llm.ctx
        with self._llm._in_use.at_once():
            yield ctx


def _scores_of(ctx: int, layer: int, n_head_kv: int) -> list[npt.NDArray[np.float32]]:
    return [_core.scores(ctx, layer, head) for head in range(n_head_kv)]
