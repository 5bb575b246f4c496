"""Scorers by the book, in NumPy float64; allocators_reference.py has the allocators.

Every function here was written from the description of a paper, not from the engine, and each says which. They take a
layer as a list of Head: what a KV head holds, the observed queries of its group, and which of its entries may be
evicted. `raw` scores are one number per held entry (what laprox_scores() shows); a policy ranks a head's candidates by
what `scores` makes of them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from reference import attention_logits, average_pool, rope, softmax


@dataclass
class Head:
    """One KV head: n entries in ascending position, w observed queries of g query heads."""

    pos: np.ndarray
    k: np.ndarray  # [n, d]
    v: np.ndarray  # [n, d]
    q: np.ndarray  # [w, g, d]
    q_pos: np.ndarray
    w_o: np.ndarray  # [g, n_embd, d]
    scale: float
    softcap: float | None
    first: int  # candidates are the entries [first, last): sinks before, recent tokens behind
    last: int
    expected: np.ndarray | None = None  # Expected Attention's logits [g, n]

    @property
    def candidates(self) -> slice:
        return slice(self.first, self.last)

    @functools.cached_property
    def logits(self) -> np.ndarray:
        """[g, w, n], -inf where a query can't see a key."""
        seen = self.q_pos[:, None] >= self.pos[None]
        return np.stack([attention_logits(self.q[:, i], self.k, seen, self.scale, self.softcap) for i in range(self.q.shape[1])])

    @functools.cached_property
    def attention(self) -> np.ndarray:
        """[g, w, n]: causal softmax over everything held (dossier, section 0)."""
        return softmax(self.logits)

    def output_norms(self, p: int) -> np.ndarray:
        """||v_i W_h||_p: [g, n]."""
        return np.stack([np.linalg.norm(self.v @ w_h.T, ord=p, axis=1) for w_h in self.w_o])


@dataclass
class Scores:
    """Of one head's candidates."""

    score: np.ndarray
    second: np.ndarray | None = None  # decides after the first stage
    loose: np.ndarray | None = None  # float32 may rank these before or after where `score` has them


def heads_of(ctx, net, il: int, sink: int, recent: int, seq: int = 0) -> list[Head]:
    """A layer of a live context, from what its cache holds and the weights in the file."""
    n_head_kv = net.n_head_kv[il]
    group, d = net.n_head // n_head_kv, net.d
    q, q_pos = ctx.queries(il, seq)
    w_o = net.w[f"blk.{il}.attn_output.weight"]
    out = []
    for h in range(n_head_kv):
        e, mine = ctx.entries(il, h, seq), range(h * group, (h + 1) * group)
        sees = q_pos >= e.pos[0]  # a query older than all that is held sees nothing
        out.append(
            Head(
                pos=e.pos,
                k=e.k.astype(np.float64),
                v=e.v.astype(np.float64),
                q=q[sees][:, mine].astype(np.float64),
                q_pos=q_pos[sees],
                w_o=np.stack([w_o[:, i * d : (i + 1) * d] for i in mine]),
                scale=1.0 if net.arch == "gemma2" else net.scale,  # gemma2 scales its queries itself
                softcap=net.softcap,
                first=int((e.pos < sink).sum()),
                last=len(e.pos) - recent,
            )
        )
    return out


def max_pool(x: np.ndarray, kernel: int = 7) -> np.ndarray:
    """Over the neighbours that there are."""
    r = kernel // 2
    return np.array([x[max(0, i - r) : i + r + 1].max() for i in range(len(x))])


# --- scorers: numbers per entry --------------------------------------------------------------------------------------


def laprox(head: Head) -> np.ndarray:
    """LaProx, Algorithm 1 (section 1): mean over the group of ||A[:, i]||_2 * ||v_i W_h||_2."""
    return (np.linalg.norm(head.attention, axis=1) * head.output_norms(2)).mean(0)


def oracle(head: Head) -> np.ndarray:
    """LU-KV's importance (section 2): max over steps (the observed queries) of ||A[t, i] v_i W_h||_2, max over the group."""
    return (head.attention.max(1) * head.output_norms(2)).max(0)


def value_norm(head: Head) -> np.ndarray:
    """Mean over the group of ||v_i W_h||_2."""
    return head.output_norms(2).mean(0)


def snapkv(head: Head) -> np.ndarray:
    """Section 5: attention of the window, mean over its queries and over the group (before pooling, as Ada-KV does)."""
    return head.attention.mean((0, 1))


def kvzip(head: Head) -> np.ndarray:
    """KVzip (2505.23416): the most attention that any observed query of the group gives."""
    return head.attention.max((0, 1))


def energy(head: Head) -> np.ndarray:
    """Ours: root of the sum over observed queries and group of (A[t, i] ||v_i W_h||_2 / mean over entries of the latter)^2."""
    norms = head.output_norms(2)
    return np.sqrt(((head.attention**2).sum(1) * (norms / norms.mean(1, keepdims=True)) ** 2).sum(0))


def tova(head: Head) -> np.ndarray:
    """Section 12: attention of the last query alone, mean over the group (a layer's mean over its heads comes later)."""
    assert head.q_pos[-1] == head.q_pos.max()
    return head.attention[:, -1].mean(0)


def knorm(head: Head) -> np.ndarray:
    """Section 13: -||k_i||_2."""
    return -np.linalg.norm(head.k, axis=1)


def keydiff(head: Head) -> np.ndarray:
    """Section 14: -cos(k_i, mean over everything cached of k / ||k||)."""
    unit = head.k / np.linalg.norm(head.k, axis=1, keepdims=True)
    anchor = unit.mean(0)
    return -(unit @ anchor) / np.linalg.norm(anchor)


def streaming(head: Head) -> np.ndarray:
    """Section 11: later is better."""
    return head.pos.astype(np.float64)


def looks_most(head: Head) -> np.ndarray:
    """LAVa's attention (section 8): mean over the window, max over the group."""
    return head.attention.mean(1).max(0)


def variance(head: Head) -> np.ndarray:
    """Unbiased, of each key's weights over the window: [g, n]. One query has none."""
    return head.attention.var(1, ddof=1) if head.attention.shape[1] > 1 else np.zeros_like(head.attention[:, 0])


def smoothed(head: Head) -> np.ndarray:
    """DefensiveKV (section 8): rows over the prefix, averaged over 5 tokens and rescaled to the mass they had: [g, w, n_prefix]."""
    prefix = head.attention[:, :, : head.last]
    pooled = np.apply_along_axis(average_pool, 2, prefix, 5)
    mass, after = prefix.sum(2, keepdims=True), pooled.sum(2, keepdims=True)
    return pooled * np.divide(mass, after, out=np.zeros_like(mass), where=after > 0)


def expected(head: Head, epsilon: float = 0.02) -> np.ndarray:
    """Expected Attention (section 15): softmax over the keys but the sinks, mean over the group, + epsilon, * ||v_i||_2."""
    assert head.expected is not None
    logits = np.where(np.arange(len(head.pos)) < head.first, -np.inf, head.expected)
    return (softmax(logits).mean(0) + epsilon) * np.linalg.norm(head.v, axis=1)


def rkv_importance(head: Head) -> np.ndarray:
    """R-KV (section 18): logits' maximum over the group, softmax over the prefix alone, mean over the window: [n_prefix]."""
    return softmax(head.logits[:, :, : head.last].max(0)).mean(0)


def rkv_redundancy(head: Head, threshold: float = 0.5) -> np.ndarray:
    """R-KV (section 18): how like the other keys each is, as a softmax over everything held.

    In every row of the cosine matrix the last key above the threshold is spared: the newest duplicate stays.
    """
    unit = head.k / np.linalg.norm(head.k, axis=1, keepdims=True)
    cos = unit @ unit.T
    np.fill_diagonal(cos, 0)
    for row in cos:
        like = np.flatnonzero(row > threshold)
        if len(like):
            row[like[-1]] = 0
    return softmax(cos.mean(0))


RAW = {
    "laprox": laprox,
    "snapkv": snapkv,
    "criticalkv": snapkv,
    "cake": snapkv,
    "lava": looks_most,
    "tova": tova,
    "kvzip": kvzip,
    "energy": energy,
    "knorm": knorm,
    "keydiff": keydiff,
    "streaming": streaming,
    "oracle": oracle,
    "vnorm": value_norm,
    "expected": expected,
}


# --- scorers: what ranks a layer's candidates ------------------------------------------------------------------------


def plain(raw):
    return lambda heads: [Scores(raw(h)[h.candidates]) for h in heads]


def pooled(raw, pool, kernel: int):
    return lambda heads: [Scores(pool(raw(h)[h.candidates], kernel)) for h in heads]


def tova_scores(heads: list[Head]) -> list[Scores]:
    """Averaged over all heads of the layer: over those that still hold the token."""
    seen: dict[int, list[float]] = {}
    for h in heads:
        for p, s in zip(h.pos.tolist(), tova(h)):
            seen.setdefault(p, []).append(s)
    return [Scores(np.array([np.mean(seen[p]) for p in h.pos[h.candidates].tolist()])) for h in heads]


def criticalkv_scores(heads: list[Head]) -> list[Scores]:
    """Section 8: first SnapKV's scores, then (score + 1e-4) * mean over the group of ||v_i W_h||_1."""
    out = []
    for h in heads:
        s = max_pool(snapkv(h)[h.candidates])
        out.append(Scores(s, (s + 1e-4) * h.output_norms(1).mean(0)[h.candidates]))
    return out


def cake_scores(heads: list[Head], gamma: float = 200) -> list[Scores]:
    """Section 9: mean + gamma * variance over the window, averaged over 5 tokens, mean over the group."""
    return [Scores(average_pool((h.attention.mean(1) + gamma * variance(h)).mean(0)[h.candidates], 5)) for h in heads]


def cake_preference(heads: list[Head]) -> float:
    """Section 9, with the authors' fallback tau = 1: entropy times variance of the attention to the layer's prefix."""
    entropy = spread = 0.0
    for h in heads:
        a = h.attention[:, :, : h.last]
        entropy -= (a * np.log(a + 1e-10)).sum()
        spread += variance(h)[:, : h.last].sum()
    return entropy * spread


def lava_scores(heads: list[Head]) -> list[Scores]:
    """Section 8: max-pooled attention times the head's largest ||v_j||_1."""
    return [Scores(max_pool(looks_most(h)[h.candidates]) * np.abs(h.v).sum(1).max()) for h in heads]


def defensivekv_scores(heads: list[Head], mass: float = 0.9) -> list[Scores]:
    """Section 8: the worst case over queries, no less than the head's mean, times the value's share among the heads.

    The fewest tokens that, together with the recent ones, make up 90% of the mean attention come before all others: a
    head's heaviest first, and of two heads' the one that is further ahead in its own. The authors force no more of them
    than the uniform budget; an order that doesn't depend on the budget comes to that where all heads have so many.
    """
    share: dict[int, float] = {}
    norms = [h.output_norms(1).mean(0) for h in heads]
    for h, u in zip(heads, norms):
        for p, x in zip(h.pos.tolist(), u):
            share[p] = share.get(p, 0.0) + x
    out = []
    for h, u in zip(heads, norms):
        rows = smoothed(h)
        worst, mean = rows.max((0, 1)), rows.mean((0, 1))
        score = np.maximum(worst, worst.mean()) * u[: h.last] / np.array([share[p] for p in h.pos[: h.last].tolist()])
        wanted = mass - h.attention[:, :, h.last :].sum(2).mean()
        order = np.lexsort((-h.pos[: h.last], -mean))
        before = np.cumsum(mean[order]) - mean[order]
        forced, loose = np.zeros(h.last, bool), np.zeros(h.last, bool)
        forced[order] = before < wanted
        loose[order] = np.abs(before - wanted) < 1e-5
        score[order[forced[order]]] = 1e6 - np.arange(forced.sum())
        out.append(Scores(score[h.candidates], loose=loose[h.candidates]))
    return out


def rkv_scores(heads: list[Head], weight: float = 0.1) -> list[Scores]:
    """Section 18: weight * importance (max-pooled over 7) - (1 - weight) * redundancy."""
    out = []
    for h in heads:
        importance = max_pool(rkv_importance(h)[h.first :])
        out.append(Scores(weight * importance - (1 - weight) * rkv_redundancy(h)[h.candidates]))
    return out


SCORES = {
    "laprox": pooled(laprox, average_pool, 7),
    "snapkv": pooled(snapkv, max_pool, 7),
    "criticalkv": criticalkv_scores,
    "defensivekv": defensivekv_scores,
    "cake": cake_scores,
    "lava": lava_scores,
    "tova": tova_scores,
    "kvzip": plain(kvzip),
    "energy": plain(energy),
    "knorm": plain(knorm),
    "keydiff": plain(keydiff),
    "streaming": plain(streaming),
    "oracle": plain(oracle),
    "vnorm": plain(value_norm),
    "rkv": rkv_scores,
    "expected": plain(expected),
}


@functools.lru_cache(maxsize=8)
def mean_rotation(start: int, n: int, d: int, rope_base: float, neox: bool) -> np.ndarray:
    """Of positions start ... start + n - 1: [d, d]."""
    units = np.broadcast_to(np.eye(d), (n, d, d))
    return rope(units, start + np.arange(n), rope_base, neox).mean(0).T  # its columns are unit vectors, turned


def expected_logits(head: Head, queries: np.ndarray, q_pos: np.ndarray, sink: int, rope_base: float, neox: bool, n_future: int = 512, weights: np.ndarray | None = None) -> np.ndarray:
    """Expected Attention's logits (section 15): [g, n].

    queries [m, g, d]: of every token evaluated, after RoPE at q_pos. Their mean and covariance before RoPE, without the
    first `sink`, are turned by the mean rotation of the next n_future positions; then the log of E exp(scale * q k) for
    a Gaussian q. `weights` [m]: how much each of them counts; None: alike.
    """
    counts = np.ones(len(q_pos)) if weights is None else weights
    counts = counts[q_pos >= sink]
    turn = mean_rotation(int(head.pos.max()) + 1, n_future, queries.shape[2], rope_base, neox)
    out = []
    for q in rope(queries, -q_pos, rope_base, neox)[q_pos >= sink].transpose(1, 0, 2):
        mean, cov = turn @ np.average(q, 0, counts), turn @ np.cov(q.T, aweights=counts, ddof=0) @ turn.T
        out.append(head.scale * head.k @ mean + head.scale**2 / 2 * ((head.k @ cov) * head.k).sum(1))
    return np.stack(out)


def best(pos: np.ndarray, s: Scores, count: int) -> np.ndarray:
    """Positions of a head's best: higher score first, then later. In two stages, half of them by the first (section 8)."""
    order = lambda score: np.lexsort((-pos, -score))  # noqa: E731
    if s.second is None:
        return np.sort(pos[order(s.score)[:count]])
    first = order(s.score)[: count // 2]
    rest = [i for i in order(s.second) if i not in set(first.tolist())]
    return np.sort(pos[np.concatenate([first, np.array(rest[: count - count // 2], int)])])
