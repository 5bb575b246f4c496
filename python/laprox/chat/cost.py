"""What a model's KV cache costs, and whether it can be compressed: asked of a small context, before a large one is made."""

from __future__ import annotations

from dataclasses import dataclass

from laprox import KVConfig, LaproxError, _core
from laprox._upstream import LlamaModel
from laprox.cache_types import CacheType
from laprox.chat import log
from laprox.sizes import shape_of, small_context


@dataclass(frozen=True)
class Cache:
    """The part of a model's KV cache that can be compressed."""

    layers: int
    pairs: int  # (layer, KV head)
    bytes_per_token: int  # over all layers

    def full(self, tokens: int) -> int:
        """Bytes of what an uncompressed cache holds."""
        return tokens * self.bytes_per_token

    def at(self, budget: str, tokens: int) -> int:
        """Bytes of what a budget keeps, before the tail and padding."""
        unit, value = _core.parse_budget(budget)
        if unit == "bytes":
            return min(int(value), self.full(tokens))
        entries = min(_core.budget_entries(budget, tokens, self.pairs), tokens * self.pairs)
        return entries * self.bytes_per_token // self.pairs


def measure(weights: LlamaModel, type_k: CacheType, type_v: CacheType, config: KVConfig = KVConfig()) -> Cache:
    """Ask a small context what it would compress. Raises LaproxError if nothing, or not with these settings."""
    _core.model_set_params(weights.model, config.params())
    try:
        context = small_context(weights, type_k.ggml, type_v.ggml)
    except ValueError as error:
        raise LaproxError(_core.last_error() or log.reason() or str(error)) from None
    shape = shape_of(context.ctx)
    return Cache(shape.layers, shape.pairs, round(shape.keys * type_k.bytes_per_element + shape.values * type_v.bytes_per_element))
