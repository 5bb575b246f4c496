"""What gates are trained for: the full cache's predictions, within a capacity (DBTrimKV and TRIM-KV, training)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROWS = 4096  # positions whose logits are in memory at a time


def capacity_loss(retained: Tensor, budget: float, whole: bool) -> Tensor:
    """The hinge on what is retained, averaged over where it is active.

    Args:
        retained: S_t, [layers, batch, KV heads, n].
        budget: M, tokens per KV head.
        whole: One budget M x layers x KV heads for the whole model (DBTrimKV), or M for every head (TRIM-KV).
    """
    n = retained.shape[-1]
    seen = torch.arange(1, n + 1, device=retained.device, dtype=retained.dtype)  # what all heads would hold
    heads = retained.shape[0] * retained.shape[2] if whole else 1
    held = retained.sum((0, 2)) if whole else retained
    over = (held - budget * heads).clamp(min=0) / ((seen - budget) * heads).clamp(min=1)
    active = over > 0
    return over.sum() / active.sum().clamp(min=1)


def prediction_losses(
    logits: Callable[[Tensor], Tensor], student: Tensor, teacher: Tensor, targets: Tensor, rows: int = ROWS
) -> tuple[Tensor, Tensor, Tensor]:
    """Means over positions of: the cross-entropy to the teacher, the next token's, and the KL divergence to the teacher.

    The first two are trained on; the third is the first less the teacher's entropy, without a gradient.

    Args:
        logits: Hidden states [m, n_embd] to logits [m, vocabulary].
        student, teacher: Last hidden states where the next token is supervised, [m, n_embd].
        targets: That next token, [m].
        rows: So many logits at a time; the backward pass computes them again.
    """

    def part(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            expected = logits(teacher).log_softmax(-1)
        given = logits(student).log_softmax(-1)
        cross = -(expected.exp() * given).sum()
        entropy = -(expected.exp() * expected).sum()
        return torch.stack((cross, F.nll_loss(given, targets, reduction="sum"), (cross - entropy).detach()))

    sums = torch.zeros(3, device=student.device)
    for start in range(0, len(targets), rows):
        piece = (student[start : start + rows], teacher[start : start + rows], targets[start : start + rows])
        sums = sums + checkpoint(part, *piece, use_reentrant=False)
    cross, ntp, kl = (sums / max(1, len(targets))).unbind()
    return cross, ntp, kl
