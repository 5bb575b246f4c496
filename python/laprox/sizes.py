"""How many numbers a token takes in the cache: asked of a small context, before a large one is made."""

from __future__ import annotations

from typing import NamedTuple

import llama_cpp

from laprox import _core
from laprox._upstream import LlamaContext, LlamaModel
from laprox.cache_types import CACHE_TYPES, Types


class Shape(NamedTuple):
    """What of a model's cache is compressed."""

    layers: int
    pairs: int  # (layer, KV head)
    keys: int  # numbers in a token's keys, over all layers
    values: int

    def bytes_per_token(self, types: Types) -> float:
        """Of a token that is held by every pair."""
        return self.keys * CACHE_TYPES[types.k].bytes_per_element + self.values * CACHE_TYPES[types.v].bytes_per_element


def shape_of(ctx: int) -> Shape:
    """Of a context. Raises LaproxError where nothing is compressed."""
    pairs = keys = values = 0
    layers = _core.layers(ctx)
    for layer, n_head_kv in layers:
        _, d_k, d_v = _core.head_shape(ctx, layer)
        pairs += n_head_kv
        keys += n_head_kv * d_k
        values += n_head_kv * d_v
    return Shape(len(layers), pairs, keys, values)


def small_context(model: LlamaModel, type_k: int = CACHE_TYPES["f16"].ggml, type_v: int = CACHE_TYPES["f16"].ggml) -> LlamaContext:
    """With room for a few tokens, of a model whose parameters were set. Raises ValueError where there can be none."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 256
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.type_k, params.type_v = type_k, type_v
    return LlamaContext(model=model, params=params, verbose=False)
