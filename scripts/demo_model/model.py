"""The model: exactly what llama.cpp runs as `llama`, and the optimizer that trains it."""
from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Config:
    vocab: int = 1536
    width: int = 160
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    head_size: int = 64
    ff: int = 320
    rope_base: float = 1e7
    eps: float = 1e-5
    context: int = 16384

    dict = asdict


class Model(nn.Module):
    """Matrices of all layers are stacked: [layer, out, in]. Plain random initialisation."""

    MATRICES = ("q", "k", "v", "o", "gate", "up", "down")

    def __init__(self, c: Config, seed: int = 0):
        super().__init__()
        self.c = c
        g = torch.Generator().manual_seed(seed)
        w, q, kv = c.width, c.heads * c.head_size, c.kv_heads * c.head_size

        def random(out, inn, gain=1.0):
            return nn.Parameter(torch.randn(c.layers, out, inn, generator=g) * gain * inn**-0.5)

        self.emb = nn.Parameter(torch.randn(c.vocab, w, generator=g))
        self.q, self.k, self.v = random(q, w), random(kv, w), random(kv, w)
        self.o = random(w, q, 0.5)
        self.gate, self.up, self.down = random(c.ff, w), random(c.ff, w), random(w, c.ff, 0.5)
        self.attn_norm = nn.Parameter(torch.ones(c.layers, w))
        self.ffn_norm = nn.Parameter(torch.ones(c.layers, w))
        self.norm = nn.Parameter(torch.ones(w))

    def output_norm(self):
        """The gain of the last norm as llama.cpp applies it (rows of `emb` have length ~ sqrt(width))."""
        return self.norm * self.c.width**-0.5

    def rope(self, n, start=0):
        d = self.c.head_size
        angle = torch.outer(torch.arange(start, start + n, dtype=torch.float32),
                            self.c.rope_base ** (-torch.arange(0, d, 2, dtype=torch.float32) / d))
        return angle.cos(), angle.sin()

    def hidden(self, ids, cut=None):
        """The residual stream after the last layer. `cut(layer, n)` may give a mask of visible entries."""
        c, (b, n) = self.c, ids.shape
        cos, sin = self.rope(n)

        def rotate(x):  # neighbouring pairs, llama.cpp's NORM layout
            even, odd = x[..., 0::2], x[..., 1::2]
            return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

        def norm(x, gain):
            return F.rms_norm(x, (c.width,), gain, c.eps)

        x = self.emb[ids]
        self.taps = []
        for i in range(c.layers):
            h = norm(x, self.attn_norm[i])
            q, k, v = (F.linear(h, m[i]).view(b, n, -1, c.head_size).transpose(1, 2)
                       for m in (self.q, self.k, self.v))
            q, k = rotate(q), rotate(k)
            k, v = (t.repeat_interleave(c.heads // c.kv_heads, 1) for t in (k, v))
            mask = cut(i, n) if cut else None
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
            x = x + F.linear(a.transpose(1, 2).reshape(b, n, -1), self.o[i])
            h = norm(x, self.ffn_norm[i])
            x = x + F.linear(F.silu(F.linear(h, self.gate[i])) * F.linear(h, self.up[i]), self.down[i])
            self.taps.append(x)
        return x

    def logits(self, x):
        return F.linear(F.rms_norm(x, (self.c.width,), self.output_norm(), self.c.eps), self.emb)


def orthogonal(g, steps=5):
    """Newton-Schulz: the nearest orthogonal matrix, for a stack of matrices."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr=0.01, momentum=0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                s = self.state[p]
                if not s:
                    s["m"] = torch.zeros_like(p)
                s["m"].lerp_(p.grad, 1 - group["momentum"])
                g = p.grad.lerp(s["m"], group["momentum"])
                scale = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
                p.add_(orthogonal(g), alpha=-group["lr"] * scale)
