"""Allocators by the book: how many entries each head keeps. As scorers_reference.py, from the papers and not from the engine."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from scorers_reference import Scores

Pair = tuple[int, int]


@dataclass
class Layers:
    """Scores of the whole model, by (layer, head) in ascending order."""

    pos: dict[Pair, np.ndarray]
    scores: dict[Pair, Scores]
    preference: dict[int, float] = field(default_factory=dict)  # CAKE's, by layer
    profile: np.ndarray | None = None  # LU-KV's table [99, n_layer, n_head_kv]
    tokens_seen: int = 0
    n_protected: int = 0  # entries per head

    @property
    def pairs(self) -> list[Pair]:
        return sorted(self.scores)

    @property
    def room(self) -> dict[Pair, int]:
        return {pair: len(self.scores[pair].score) for pair in self.pairs}

    def layers(self) -> dict[int, list[Pair]]:
        out: dict[int, list[Pair]] = {}
        for pair in self.pairs:
            out.setdefault(pair[0], []).append(pair)
        return out


def share_out(weight: dict, room: dict, total: int) -> dict:
    """A total in proportion to weights, at most `room` to each: largest remainders first, then the earlier key.

    What full places leave over goes to the others in the same proportion, evenly once those weigh nothing.
    """
    got, open_ = dict.fromkeys(room, 0), [key for key in room if room[key]]
    left = min(total, sum(room.values()))
    while open_ and left:
        w = {key: weight[key] for key in open_}
        if not sum(w.values()):
            w = dict.fromkeys(open_, 1.0)
        ideal = {key: left * w[key] / sum(w.values()) for key in open_}
        full = [key for key in open_ if ideal[key] >= room[key] - 1e-9]
        if full:
            for key in full:
                got[key] = room[key]
                left -= room[key]
            open_ = [key for key in open_ if key not in full]
            continue
        for key in open_:
            got[key] = math.floor(ideal[key] + 1e-9)
        rest = left - sum(got[key] for key in open_)
        for key in sorted(open_, key=lambda key: (-round(ideal[key] - got[key], 9), open_.index(key)))[:rest]:
            got[key] += 1
        return got
    return got


def ranked(m: Layers, pairs: list[Pair], score: dict[Pair, np.ndarray]) -> list[Pair]:
    """The heads of all candidates, best first: higher score, then later, then lower layer, then lower head."""
    return [(il, h) for _, _, il, h in sorted((-s, -p, *pair) for pair in pairs for p, s in zip(m.pos[pair].tolist(), score[pair].tolist()))]


def counted(m: Layers, best: list[Pair], pairs: list[Pair] | None = None) -> dict[Pair, int]:
    return {pair: best.count(pair) for pair in pairs or m.pairs}


def uniform(m: Layers, k: int) -> dict[Pair, int]:
    """Every head as many."""
    return share_out(dict.fromkeys(m.pairs, 1.0), m.room, k)


def global_(m: Layers, k: int) -> dict[Pair, int]:
    """LaProx, Algorithm 2 (section 1): one ranking of what each entry weighs among its layer's candidates."""
    weighed = {}
    for pairs in m.layers().values():
        low = min([0.0, *(m.scores[pair].score.min() for pair in pairs if m.room[pair])])
        total = sum((m.scores[pair].score - low).sum() for pair in pairs)
        for pair in pairs:
            weighed[pair] = (m.scores[pair].score - low) / (total or 1.0)
    return counted(m, ranked(m, m.pairs, weighed)[:k])


def global_raw(m: Layers, k: int) -> dict[Pair, int]:
    """The same without the layers' sums: the ablation, and Layer-DefensiveKV (section 8)."""
    return counted(m, ranked(m, m.pairs, {pair: m.scores[pair].score for pair in m.pairs})[:k])


def ada_layer(m: Layers, pairs: list[Pair], k: int, alpha: float = 0.2) -> dict[Pair, int]:
    """Ada-KV (section 7): the counts of a layer's best k, mixed with an even share alpha."""
    best = counted(m, ranked(m, pairs, {pair: m.scores[pair].score for pair in pairs})[:k], pairs)
    weight = {pair: (1 - alpha) * best[pair] + alpha * k / len(pairs) for pair in pairs}
    return share_out(weight, {pair: m.room[pair] for pair in pairs}, k)


def by_layer(m: Layers, weight: dict[int, float], k: int, within) -> dict[Pair, int]:
    room = {il: sum(m.room[pair] for pair in pairs) for il, pairs in m.layers().items()}
    totals = share_out({il: weight[il] * len(pairs) for il, pairs in m.layers().items()}, room, k)
    out = {}
    for il, pairs in m.layers().items():
        out |= within(m, pairs, totals[il])
    return out


def even_layer(m: Layers, pairs: list[Pair], k: int) -> dict[Pair, int]:
    return share_out(dict.fromkeys(pairs, 1.0), {pair: m.room[pair] for pair in pairs}, k)


def ada(m: Layers, k: int) -> dict[Pair, int]:
    return by_layer(m, dict.fromkeys(m.layers(), 1.0), k, ada_layer)


def pyramid(m: Layers, k: int, beta: float = 20) -> dict[Pair, int]:
    """PyramidKV (section 6), with a fraction for a step: from 2c - c/beta in the bottom layer to c/beta in the top one."""
    c, n = k / len(m.pairs), max(m.room.values())
    low = c / beta
    high = 2 * c - low
    if high >= n:
        high, low = n, 2 * c - n
    layers = list(m.layers())
    step = (high - low) / (len(layers) - 1) if len(layers) > 1 else 0.0
    weight = {il: high - i * step for i, il in enumerate(layers)} if len(layers) > 1 else dict.fromkeys(layers, 1.0)
    return by_layer(m, weight, k, even_layer)


def lava(m: Layers, k: int) -> dict[Pair, int]:
    """LAVa (section 8): layers by the entropy of their scores / log(count), heads as Ada-KV."""
    weight = {}
    for il, pairs in m.layers().items():
        s = np.concatenate([m.scores[pair].score for pair in pairs])
        s = s - min(s.min(), 0)  # as LaProx's sum: negative scores count from the lowest
        p = s / s.sum()
        p = p[p > 0]
        weight[il] = -(p * np.log(p)).sum() / math.log(len(s))
    return by_layer(m, weight, k, ada_layer)


def cake(m: Layers, k: int) -> dict[Pair, int]:
    """CAKE (section 9): layers by their preference, heads all alike."""
    return by_layer(m, m.preference, k, even_layer)


def profile(m: Layers, k: int) -> dict[Pair, int]:
    """LU-KV at run time (section 2), with rows interpolated (A.2): a head's length is a share of the tokens seen."""
    evicted = 100 * (1 - (k + m.n_protected * len(m.pairs)) / (m.tokens_seen * len(m.pairs)))
    row = min(max(evicted - 1, 0.0), 98.0)
    low = int(row)
    table = m.profile[low] * (1 - (row - low)) + m.profile[min(low + 1, 98)] * (row - low)
    weight = {(il, h): max(0.0, (1 - table[il, h]) * m.tokens_seen - m.n_protected) for il, h in m.pairs}
    return share_out(weight, m.room, k)


ALLOCATORS = {
    "global": global_,
    "global-raw": global_raw,
    "uniform": uniform,
    "pyramid": pyramid,
    "ada": ada,
    "lava": lava,
    "cake": cake,
    "profile": profile,
}
