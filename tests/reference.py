"""What the engine should compute, in NumPy float64: attention over a ragged cache, scores, selection.

Nothing here is taken from the engine. A Network is the forward pass of a GGUF (llama, gemma2, lfm2) in which every
(layer, KV head) holds its own set of entries, as after an eviction; the functions below it are LaProx by the book.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as QType
from gguf import GGUFReader, quants


@functools.lru_cache(maxsize=16)
def read_gguf(path: str | Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Metadata, and weights as float64 in the orientation [out, in]."""
    reader = GGUFReader(str(path))
    meta = {name: f.contents() for name, f in reader.fields.items() if not name.startswith(("GGUF.", "tokenizer."))}
    weights = {}
    for t in reader.tensors:
        data = t.data if t.tensor_type == QType.F32 else quants.dequantize(t.data, t.tensor_type)
        weights[t.name] = data.reshape([int(n) for n in reversed(t.shape)]).astype(np.float64)
    return meta, weights


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rope(x: np.ndarray, pos: np.ndarray, base: float, neox: bool) -> np.ndarray:
    """x: [n, heads, d]. The angles are float32 products, as in ggml: at position 4000 that is worth 1e-4."""
    d = x.shape[-1]
    theta = np.empty((len(pos), d // 2), np.float32)
    theta[:, 0] = pos
    for i in range(1, d // 2):
        theta[:, i] = theta[:, i - 1] * np.float32(base ** (-2.0 / d))
    cos, sin = np.cos(theta.astype(np.float64))[:, None], np.sin(theta.astype(np.float64))[:, None]
    a, b = (x[..., : d // 2], x[..., d // 2 :]) if neox else (x[..., 0::2], x[..., 1::2])
    ra, rb = a * cos - b * sin, a * sin + b * cos
    return np.concatenate([ra, rb], -1) if neox else np.stack([ra, rb], -1).reshape(x.shape)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    """The tanh form through a float16 table, as in ggml on the CPU."""
    x = x.astype(np.float16).astype(np.float64)
    y = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x)))
    return y.astype(np.float16).astype(np.float64)


class Network:
    """One sequence of a model, with a cache that tests may thin out."""

    def __init__(self, path: str | Path, n_queries: int = 64):
        self.meta, self.w = read_gguf(path)
        self.arch = self.meta["general.architecture"]
        get = lambda key, default=None: self.meta.get(f"{self.arch}.{key}", default)  # noqa: E731
        self.n_layer, self.n_head = get("block_count"), get("attention.head_count")
        kv = get("attention.head_count_kv")
        self.n_head_kv = list(kv) if isinstance(kv, (list, tuple)) else [kv] * self.n_layer
        self.d = get("attention.key_length")
        self.rope_base = get("rope.freq_base", 10000.0)
        self.eps = get("attention.layer_norm_rms_epsilon", 1e-5)
        self.swa, self.softcap = get("attention.sliding_window"), get("attn_logit_softcapping")
        self.final_softcap = get("final_logit_softcapping")
        self.scale = 1 / math.sqrt(self.d)
        self.n_queries = n_queries
        self.attention_layers = [il for il in range(self.n_layer) if self.n_head_kv[il]]
        self.clear()

    def clear(self) -> None:
        self.pos, self.k, self.v = {}, {}, {}
        self.bias = {}  # by (layer, head): a function of positions, added to q k^T
        for il in self.attention_layers:
            for h in range(self.n_head_kv[il]):
                self.pos[il, h] = np.empty(0, int)
                self.k[il, h] = self.v[il, h] = np.empty((0, self.d))
        self.q = {il: np.empty((0, self.n_head, self.d)) for il in self.attention_layers}
        self.q_pos = np.empty(0, int)
        self.conv = {}

    def windowed(self, il: int) -> bool:
        """Whether a layer looks back over a sliding window only."""
        return self.arch == "gemma2" and il % 2 == 0

    def keep(self, il: int, head: int, positions) -> None:
        """Evict everything else from a head."""
        m = np.isin(self.pos[il, head], positions)
        assert m.sum() == len(positions), "an entry is kept that was not there"
        self.pos[il, head], self.k[il, head], self.v[il, head] = (x[il, head][m] for x in (self.pos, self.k, self.v))

    def decode(self, tokens, pos=None) -> np.ndarray:
        """Logits of every token. Positions continue where the sequence ended unless given."""
        tokens = np.asarray(tokens)
        if pos is None:
            start = self.q_pos[-1] + 1 if len(self.q_pos) else 0
            pos = np.arange(start, start + len(tokens))
        pos = np.asarray(pos)
        w = self.w
        x = w["token_embd.weight"][tokens]
        if self.arch == "gemma2":
            x = x * math.sqrt(x.shape[1])
        for il in range(self.n_layer):
            b = f"blk.{il}."
            h = rms_norm(x, w[b + "attn_norm.weight"], self.eps)
            h = self._attention(il, h, pos) if self.n_head_kv[il] else self._shortconv(il, h)
            if self.arch == "gemma2":
                h = rms_norm(h, w[b + "post_attention_norm.weight"], self.eps)
            x = x + h
            h = rms_norm(x, w[b + "ffn_norm.weight"], self.eps)
            act = gelu if self.arch == "gemma2" else silu
            h = (act(h @ w[b + "ffn_gate.weight"].T) * (h @ w[b + "ffn_up.weight"].T)) @ w[b + "ffn_down.weight"].T
            if self.arch == "gemma2":
                h = rms_norm(h, w[b + "post_ffw_norm.weight"], self.eps)
            x = x + h
        self.q_pos = np.concatenate([self.q_pos, pos])[-self.n_queries :]
        x = rms_norm(x, w["token_embd_norm.weight" if self.arch == "lfm2" else "output_norm.weight"], self.eps)
        logits = x @ w.get("output.weight", w["token_embd.weight"]).T
        return self.final_softcap * np.tanh(logits / self.final_softcap) if self.final_softcap else logits

    def _attention(self, il: int, h: np.ndarray, pos: np.ndarray) -> np.ndarray:
        b, n, n_kv = f"blk.{il}.", len(h), self.n_head_kv[il]
        group = self.n_head // n_kv
        q = (h @ self.w[b + "attn_q.weight"].T).reshape(n, self.n_head, self.d)
        k = (h @ self.w[b + "attn_k.weight"].T).reshape(n, n_kv, self.d)
        v = (h @ self.w[b + "attn_v.weight"].T).reshape(n, n_kv, self.d)
        if b + "attn_q_norm.weight" in self.w:
            q = rms_norm(q, self.w[b + "attn_q_norm.weight"], self.eps)
            k = rms_norm(k, self.w[b + "attn_k_norm.weight"], self.eps)
        neox = self.arch != "llama"
        q, k = rope(q, pos, self.rope_base, neox), rope(k, pos, self.rope_base, neox)
        self.q[il] = np.concatenate([self.q[il], q])[-self.n_queries :]

        out = np.empty((n, self.n_head, self.d))
        for g in range(n_kv):
            key = il, g
            self.pos[key] = np.concatenate([self.pos[key], pos])
            self.k[key] = np.concatenate([self.k[key], k[:, g]])
            self.v[key] = np.concatenate([self.v[key], v[:, g]])
            age = pos[:, None] - self.pos[key][None]
            seen = age >= 0
            if self.windowed(il):
                seen &= age < self.swa
            for i in range(g * group, (g + 1) * group):
                logits = attention_logits(q[:, i], self.k[key], seen, self.scale, self.softcap)
                if key in self.bias:
                    logits = logits + self.bias[key](self.pos[key])
                out[:, i] = softmax(logits) @ self.v[key]
        return out.reshape(n, -1) @ self.w[b + "attn_output.weight"].T

    def _shortconv(self, il: int, h: np.ndarray) -> np.ndarray:
        b = f"blk.{il}.shortconv."
        kernel = self.w[b + "conv.weight"]
        gate_in, gate_out, x = np.split(h @ self.w[b + "in_proj.weight"].T, 3, axis=1)
        past = self.conv.get(il, np.zeros((kernel.shape[1] - 1, h.shape[1])))
        x = np.concatenate([past, gate_in * x])
        self.conv[il] = x[len(x) - len(past) :]
        y = sum(x[i : i + len(h)] * kernel[:, i] for i in range(kernel.shape[1]))
        return (gate_out * y) @ self.w[b + "out_proj.weight"].T


# --- LaProx ----------------------------------------------------------------------------------------------------------


def attention_logits(q: np.ndarray, k: np.ndarray, seen: np.ndarray, scale: float, softcap: float | None = None) -> np.ndarray:
    x = q @ k.T * scale
    if softcap:
        x = softcap * np.tanh(x / softcap)
    return np.where(seen, x, -np.inf)


def laprox_scores(q, q_pos, k, v, pos, w_o, scale: float, softcap: float | None = None) -> np.ndarray:
    """Raw scores of one KV head: the mean over its query heads of ||A[:, i]||_2 * ||v_i W_h||_2.

    q: [w, group, d], the observed queries of the head's group; k, v: [n, d]; w_o: [n_embd, group * d], the columns
    of W_O that belong to the group. A is the causal softmax over everything held.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    seen = np.asarray(q_pos)[:, None] >= np.asarray(pos)[None]
    d, group = v.shape[1], q.shape[1]
    score = np.zeros(len(pos))
    for i in range(group):
        a = softmax(attention_logits(q[:, i], k, seen, scale, softcap))
        w_h = w_o[:, i * d : (i + 1) * d]
        score += np.linalg.norm(a, axis=0) * np.linalg.norm(v @ w_h.T, axis=1)
    return score / group


def average_pool(x: np.ndarray, kernel: int = 7) -> np.ndarray:
    """Zero-padded at both ends, always divided by the kernel."""
    return np.convolve(np.asarray(x, np.float64), np.ones(kernel), "same" if len(x) >= kernel else "full")[_centre(len(x), kernel)] / kernel


def _centre(n: int, kernel: int) -> slice:
    return slice(None) if n >= kernel else slice(kernel // 2, kernel // 2 + n)


def top_k(candidates: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]], k: int) -> dict[tuple[int, int], np.ndarray]:
    """The best k of {(layer, head): (positions, scores)}: higher score, then later, then lower layer, then lower head."""
    ranked = sorted((-s, -p, il, h) for (il, h), (pos, score) in candidates.items() for p, s in zip(pos.tolist(), score.tolist()))
    kept = {pair: [] for pair in candidates}
    for _, p, il, h in ranked[: max(k, 0)]:
        kept[il, h].append(-p)
    return {pair: np.sort(np.array(p, int)) for pair, p in kept.items()}


def budget_entries(budget: str | float, tokens_seen: int, n_pairs: int, sink: int, recent: int) -> int:
    """Entries that a percent or token budget allows; never fewer than the protected ones."""
    text = str(budget)
    if text.isdigit():
        entries = min(int(text), tokens_seen) * n_pairs
    else:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        entries = math.floor(share * (tokens_seen * n_pairs) + 0.5)
    return max(entries, (sink + recent) * n_pairs)


def select(held, scores, tokens_seen: int, budget, sink: int, recent: int, policy: str = "laprox", pool=None) -> dict[tuple[int, int], np.ndarray]:
    """What survives of `held` = {(layer, head): ascending positions} with raw `scores` alike, protected entries included."""
    last = max(pos.max() for pos in held.values())
    rank = {pair: (pos >= sink) & (pos <= last - recent) for pair, pos in held.items()}
    k = budget_entries(budget, tokens_seen, len(held), sink, recent) - sum(int((~m).sum()) for m in rank.values())
    candidates = normalised(held, scores, rank, pool) if policy == "laprox" else {p: (held[p][m], held[p][m]) for p, m in rank.items()}
    chosen = top_k(candidates, k)
    return {pair: np.sort(np.concatenate([held[pair][~m], chosen[pair]])) for pair, m in rank.items()}


def normalised(held, scores, rank, pool=None) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """Pooled over a head's candidates, one beside the other, or by pool(scores, positions); then divided by the layer's sum."""
    pool = pool or (lambda score, _pos: average_pool(score))
    pooled = {pair: pool(np.asarray(scores[pair], np.float64)[m], held[pair][m]) for pair, m in rank.items()}
    total = {}
    for (il, _), x in pooled.items():
        total[il] = total.get(il, 0.0) + x.sum()
    return {(il, h): (held[il, h][rank[il, h]], x / total[il] if total[il] else x) for (il, h), x in pooled.items()}
