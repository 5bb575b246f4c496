"""The attention that gates are trained with: softmax(q k + (t - i) log beta_i), and how much it retains.

Everything stays in log space: beta^(t-i) itself would be 1 or 0 in floating point for most of what matters. Scores of
[queries, keys] are never kept: queries go through in chunks, and the backward pass computes each chunk again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 128  # queries at a time


def retention_attention(
    q: Tensor, k: Tensor, v: Tensor, log_beta: Tensor, scale: float, chunk: int = CHUNK, strictness: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Causal attention with weights proportional to beta_i^(t-i) exp(q_t k_i), exactly (DBTrimKV, training objective).

    Args:
        q: [batch, heads, n, d].
        k, v: [batch, KV heads, n, d]; each KV head serves heads / KV heads query heads.
        log_beta: [batch, KV heads, n], at most 0, float32.
        scale: Of the products, 1 / sqrt(d).
        chunk: Queries at a time. Time does not depend on it, memory is batch x heads x chunk x n.
        strictness: How slowly an entry stops to count while attention forgets it, see `Recipe`.

    Returns:
        The output [batch, heads, n, d], and S_t = sum over i <= t of beta_i^((t-i) / strictness), [batch, KV heads, n].
    """
    outputs, retained = [], []
    for start in range(0, q.shape[2], chunk):
        end = min(start + chunk, q.shape[2])  # keys from here on are in the future
        part = (q[:, :, start:end], k[:, :, :end], v[:, :, :end], log_beta[..., :end], scale, strictness)
        output, s = checkpoint(_chunk, *part, use_reentrant=False) if torch.is_grad_enabled() else _chunk(*part)
        outputs.append(output)
        retained.append(s)
    return torch.cat(outputs, 2), torch.cat(retained, 2)


def _chunk(q: Tensor, k: Tensor, v: Tensor, log_beta: Tensor, scale: float, strictness: float) -> tuple[Tensor, Tensor]:
    """The last q.shape[2] of k.shape[2] positions."""
    decay = log_decay(log_beta, q.shape[2])
    grouped = q.unflatten(1, (k.shape[1], -1))  # [batch, KV heads, group, queries, d]
    logits = torch.einsum("bhgtd,bhid->bhgti", grouped, k).float() * scale + decay[:, :, None]
    weights = logits.softmax(-1).to(v.dtype)
    return torch.einsum("bhgti,bhid->bhgtd", weights, v).flatten(1, 2), (decay / strictness).exp().sum(-1)


def log_decay(log_beta: Tensor, n_queries: int) -> Tensor:
    """(t - i) log beta_i for the last positions t, -inf for i > t: [..., n] -> [..., n_queries, n]."""
    n = log_beta.shape[-1]
    i = torch.arange(n, device=log_beta.device)
    age = i[n - n_queries :, None] - i
    return (age * log_beta[..., None, :]).masked_fill(age < 0, -math.inf)
