"""The model: exactly what llama.cpp runs as `llama`, and the optimizer that trains it."""
from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from attention import attend

START = 16  # positions whose planted heads may look for what is before the first token


@dataclass
class Config:
    vocab: int = 3072
    width: int = 192
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
        self.register_buffer("common", torch.zeros(w))  # set by plant()

    @torch.no_grad()
    def plant(self, layers=(1, 2, 3, 4), sharp=14.0, seed=1, match=2.2, copy=1.0):
        """A hand-made start: docs/demo-model.md says why, and what it means.

        The embedding gets a common offset, and leaves dimensions free for what follows. Layer 0: head h looks back by
        h + 1 tokens (it reads only the common offset, its queries turned by the distance) and writes that token's code,
        a few dimensions of its embedding, to dimensions of its own. `layers`: heads whose queries are the codes of the
        last eight tokens and whose keys are the same one token earlier: they find where the same words stood, and copy
        what came next. Half of them ask for the words in the same order, the others only for the last in its place."""
        c, g = self.c, torch.Generator().manual_seed(seed)
        low, d, size, per, back = 36, c.head_size, c.width // 12, c.heads // c.kv_heads, c.heads

        def orthonormal(n, m):  # n >= m: m columns
            return torch.linalg.qr(torch.randn(n, m, generator=g))[0]

        basis = orthonormal(c.width, c.width).T
        u, rest = basis[0], basis[1 + (back + 1) * size:]
        code = [basis[1 + i * size:1 + (i + 1) * size] for i in range(back + 1)]  # 0: its own; i: of the i-th before
        words = torch.cat((code[0], rest))
        self.common.copy_(u)
        self.emb.copy_(torch.randn(c.vocab, words.shape[0], generator=g) @ words)
        self.keep_common()
        rms = (2 * words.shape[0] / c.width) ** 0.5  # of the residual stream, where layer 0 reads it

        gain = (sharp * d**0.5) ** 0.5 * rms / words.shape[0]**0.5
        for m in (self.q, self.k, self.v, self.o):
            m[0] = 0
        for head in range(c.heads):
            for pair in range(12):
                angle = torch.tensor(-(head + 1) * c.rope_base ** (-2 * pair / d))
                row = head * d + 2 * pair
                self.q[0, row], self.q[0, row + 1] = gain * angle.cos() * u, gain * angle.sin() * u
                if head % per == 0:
                    self.k[0, head // per * d + 2 * pair] = gain * u
            self.o[0, :, head * d:head * d + size] = code[head + 1].T
        for kv in range(c.kv_heads):
            self.v[0, kv * d:kv * d + size] = code[0] * rms * 2.5

        rms = ((2 * words.shape[0] + back * size * 2.5**2) / c.width) ** 0.5
        for i in layers:
            for kv in range(c.kv_heads):
                spread = [orthonormal(d - low, size) for _ in range(back)]
                if kv >= c.kv_heads // 2:
                    spread[1:] = spread[1:2] * (back - 1)
                k, v = self.k[i, kv * d:(kv + 1) * d], self.v[i, kv * d:(kv + 1) * d]
                k[:low] *= 0.1
                k[low:] = sum(spread[j] @ code[j + 1] for j in range(back)) * rms / 2.5 * match / 8**0.25
                some = orthonormal(rest.shape[0], min(d, rest.shape[0])).T
                v[:] = 0
                v[:some.shape[0]] = some @ rest * rms
                for head in range(kv * per, (kv + 1) * per):
                    q, o = self.q[i, head * d:(head + 1) * d], self.o[i, :, head * d:(head + 1) * d]
                    q[:low] *= 0.1
                    q[low:] = (2.5 * spread[0] @ code[0] + sum(spread[j] @ code[j] for j in range(1, back))) * (
                        rms / 2.5 * match / 8**0.25)
                    o[:] = 0
                    o[:, :some.shape[0]] = (some @ rest).T * copy / c.heads
        for i in range(c.layers):
            if i not in (0, *layers):
                self.o[i] *= 0.2
        self.down *= 0.1

    @torch.no_grad()
    def keep_common(self):
        """Every token's embedding has the common offset as half of its length squared: what layer 0 finds places by must
        not differ between tokens."""
        own = self.emb - torch.outer(self.emb @ self.common, self.common)
        self.emb.copy_(own + torch.outer(own.norm(dim=1), self.common))

    def output_norm(self):
        """The gain of the last norm as llama.cpp applies it (rows of `emb` have length ~ sqrt(width))."""
        return self.norm * self.c.width**-0.5

    def hidden(self, ids, cut=None, planted=False):
        """The residual stream after the last layer. `cut(layer, n)` may give a mask of visible entries.

        planted: compute layer 0's attention, which stays as planted, as what it is: head h sees the token h + 1 back."""
        c, (b, n) = self.c, ids.shape
        angle = torch.outer(torch.arange(n), c.rope_base ** (-torch.arange(0, c.head_size, 2) / c.head_size))
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]

        def heads(h, w, rotate):
            x = F.linear(h, w).unflatten(-1, (-1, c.head_size))
            if rotate:  # neighbouring pairs, llama.cpp's NORM layout
                x = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn[:x.shape[1]]).flatten(-2)
            return x.transpose(1, 2)

        x = self.emb[ids]
        for i in range(c.layers):
            h = F.rms_norm(x, (c.width,), self.attn_norm[i], c.eps)
            v = heads(h, self.v[i], False)
            whole = slice(None, START) if planted and i == 0 else slice(None)
            q, k = heads(h[:, whole], self.q[i], True), heads(h[:, whole], self.k[i], True)
            a = attend(q, k, v[:, :, whole], cut(i, n) if cut else None)
            if planted and i == 0:
                before = torch.arange(START, n) - torch.arange(1, c.heads + 1)[:, None]
                every = v.repeat_interleave(c.heads // c.kv_heads, 1)
                a = torch.cat((a, every[:, torch.arange(c.heads)[:, None], before]), 2)
            x = x + F.linear(a.transpose(1, 2).reshape(b, n, -1), self.o[i])
            h = F.rms_norm(x, (c.width,), self.ffn_norm[i], c.eps)
            x = x + F.linear(F.silu(F.linear(h, self.gate[i])) * F.linear(h, self.up[i]), self.down[i])
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
