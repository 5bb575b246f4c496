"""What a model's KV cache costs, and whether it can be compressed: asked of a small context, before a large one is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import llama_cpp

from laprox import KVConfig, LaproxError, _core
from laprox._upstream import LlamaContext, LlamaModel
from laprox.chat import log


class CacheType(Protocol):
    """A type that cached keys and values can have."""

    @property
    def ggml(self) -> int: ...
    @property
    def bytes_per_element(self) -> float: ...


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
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 256
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.type_k, params.type_v = type_k.ggml, type_v.ggml
    try:
        context = LlamaContext(model=weights, params=params, verbose=False)
    except ValueError as error:
        raise LaproxError(_core.last_error() or log.reason() or str(error)) from None
    pairs, total = 0, 0.0
    layers = _core.layers(context.ctx)
    for layer, n_head_kv in layers:
        _, d_k, d_v = _core.head_shape(context.ctx, layer)
        pairs += n_head_kv
        total += n_head_kv * (d_k * type_k.bytes_per_element + d_v * type_v.bytes_per_element)
    return Cache(len(layers), pairs, round(total))
