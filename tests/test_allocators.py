"""Allocators, selection and LU-KV's solver through laprox._core, against oracles in exact fractions written from the papers."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from laprox import _core

CASES = 60


class Case:
    """Ragged candidates of layers with any number of heads; every other case has many equal and some strange scores."""

    def __init__(self, rng, case):
        self.layer, self.head, self.pos, self.score, self.second = [], [], [], [], []
        n_seen = int(rng.integers(1, 60))
        for il in sorted(rng.choice(9, rng.integers(1, 6), replace=False).tolist()):
            for head in range(rng.integers(1, 5)):
                keep = rng.random(n_seen) < rng.choice([0.0, 0.5, 1.0], p=[0.1, 0.4, 0.5])
                n = int(keep.sum())
                if case % 2:
                    values = [0, -0.0, 0.25, 1, 3, -1, -np.inf, np.nan] if case % 4 == 1 else [0, 0.25, 1, 3]
                    score, second = rng.choice(values, n), rng.choice(values, n)
                else:
                    score, second = rng.lognormal(0, 2, n), rng.normal(0, 1, n)
                self.layer.append(il)
                self.head.append(head)
                self.pos.append(np.flatnonzero(keep).astype(np.int32))
                self.score.append(score.astype(np.float32))
                self.second.append(second.astype(np.float32))
        self.room = [len(p) for p in self.pos]
        self.n_protected = rng.integers(0, 5, len(self.layer)).tolist()
        self.layers = [[i for i, x in enumerate(self.layer) if x == il] for il in dict.fromkeys(self.layer)]
        self.preference = rng.integers(0, 4, len(self.layers)).astype(float) if case % 3 else rng.random(len(self.layers))
        everything = sum(self.room)
        self.n_keep = int(rng.choice([0, -3, everything, everything + 7, rng.integers(0, everything + 1)], p=[0.05] * 4 + [0.8]))
        self.total = min(max(self.n_keep, 0), everything)

    def allocate(self, name, **options):
        chosen = _core.allocate(name, self.layer, self.head, self.pos, self.score, self.n_keep, **options)
        assert all((np.diff(c.astype(int)) > 0).all() for c in chosen)
        return chosen

    def counts(self, name, **options):
        counts = [len(c) for c in self.allocate(name, **options)]
        assert sum(counts) == self.total
        assert all(n <= room for n, room in zip(counts, self.room))
        return counts


@pytest.fixture
def cases(rng):
    return [Case(rng, i) for i in range(CASES)]


def finite_rank(score):
    return np.where(np.isnan(score), -np.inf, score).astype(float)


def share_out(weight, room, total):
    """Largest remainders, then the first; full places leave what they cannot take to the others."""
    total = min(max(total, 0), sum(room))
    share, places = [0] * len(room), [i for i, r in enumerate(room) if r]
    while places:
        weights = {i: Fraction(weight[i]) for i in places}
        everything = sum(weights.values())
        ideal = {i: total * weights[i] / everything if everything else Fraction(total, len(places)) for i in places}
        full = [i for i in places if ideal[i] >= room[i]]
        if not full:
            break
        for i in full:
            share[i] = room[i]
            total -= room[i]
            places.remove(i)
    for i in places:
        share[i] = math.floor(ideal[i])
    for i in sorted(places, key=lambda i: (share[i] - ideal[i], i))[: total - sum(share[i] for i in places)]:
        share[i] += 1
    return share


def best(case, heads, score, n):
    """{head: indices} of the best n candidates: higher score, then later, then lower layer, then lower head."""
    ranked = sorted(
        (-s, -p, case.layer[i], case.head[i], i, j)
        for i in heads
        for j, (s, p) in enumerate(zip(finite_rank(score[i]).tolist(), case.pos[i].tolist()))
    )
    kept = {i: [] for i in heads}
    for *_, i, j in ranked[: max(n, 0)]:
        kept[i].append(j)
    return {i: sorted(js) for i, js in kept.items()}


def from_lowest(case, heads):
    """A layer's scores in float64, its lowest 0 where it is negative; what is not finite stays."""
    finite = np.concatenate([case.score[i][np.isfinite(case.score[i])] for i in heads]).astype(float)
    lowest = min(finite.min(initial=0), 0)
    return {i: case.score[i].astype(float) - lowest for i in heads}, (finite - lowest).sum()


def within_layers(case, weights, share):
    """`weights` are per head; share(heads, total) -> one count per head."""
    totals = share_out(
        [Fraction(w) * len(heads) for w, heads in zip(weights, case.layers)],
        [sum(case.room[i] for i in heads) for heads in case.layers],
        case.n_keep,
    )
    return [n for heads, total in zip(case.layers, totals) for n in share(heads, total)]


def equally(case):
    return lambda heads, total: share_out([1] * len(heads), [case.room[i] for i in heads], total)


def adaptively(case):
    def share(heads, total):
        won = best(case, heads, case.score, total)
        mix = [Fraction(4, 5) * len(won[i]) + Fraction(total, 5 * len(heads)) for i in heads]
        return share_out(mix, [case.room[i] for i in heads], total)

    return share


def test_names():
    assert _core.allocators() == ["global", "global-raw", "uniform", "pyramid", "ada", "lava", "cake", "profile"]
    with pytest.raises(ValueError, match="unknown allocator \"adda\"; accepted: global, .*profile"):
        _core.allocate("adda", [0], [0], [[0]], [[1.0]], 1)


def test_global(cases):
    for case in cases:
        share = [None] * len(case.layer)
        for heads in case.layers:
            scores, total = from_lowest(case, heads)
            for i in heads:
                share[i] = (scores[i] / total if total else scores[i]).astype(np.float32)
        everything = range(len(case.layer))
        assert [c.tolist() for c in case.allocate("global")] == list(best(case, everything, share, case.n_keep).values())
        assert [c.tolist() for c in case.allocate("global-raw")] == list(best(case, everything, case.score, case.n_keep).values())


def test_uniform(cases):
    for case in cases:
        assert case.counts("uniform") == share_out([1] * len(case.room), case.room, case.n_keep)


def test_pyramid(cases):
    for case in cases:
        average, available = Fraction(case.total, len(case.room)), max(case.room)
        low, high = average / 20, 2 * average - average / 20
        if high >= available:
            low, high = 2 * average - available, available
        n = len(case.layers)
        caps = [high - i * (high - low) / (n - 1) if n > 1 else 1 for i in range(n)]
        assert case.counts("pyramid") == within_layers(case, caps, equally(case))


def test_ada(cases):
    for case in cases:
        assert case.counts("ada") == within_layers(case, [1] * len(case.layers), adaptively(case))


def test_lava(cases):
    for case in cases:
        entropy = []
        for heads in case.layers:
            scores, total = from_lowest(case, heads)
            x = np.concatenate([scores[i][np.isfinite(scores[i])] for i in heads])
            p = x[x > 0] / total if total else x[:0]
            n = sum(case.room[i] for i in heads)
            entropy.append(-(p * np.log(p)).sum() / math.log(n) if total and n > 1 else 1.0)
        # two sums of logarithms never agree to the last bit
        entropy = [Fraction(round(max(e, 0) * 2**40), 2**40) for e in entropy]
        assert case.counts("lava") == within_layers(case, entropy, adaptively(case))


def test_cake(cases):
    for case in cases:
        expected = within_layers(case, case.preference.tolist(), equally(case))
        assert case.counts("cake", layer_preference=case.preference) == expected
    with pytest.raises(ValueError, match="got 0 for"):
        cases[0].counts("cake")


@pytest.mark.parametrize("n_seen", [0, 80])
def test_profile(cases, rng, n_seen):
    table = rng.integers(0, 101, (99, 9, 4)) / 100
    for case in cases:
        length = [max(n_seen, room + p) for room, p in zip(case.room, case.n_protected)]
        kept = case.total + sum(case.n_protected)
        percent = 100 * (1 - Fraction(kept, sum(length))) if sum(length) else Fraction(1)
        percent = min(max(percent, 1), 99)
        row = min(int(percent), 98)
        target = []
        for il, head, n, p in zip(case.layer, case.head, length, case.n_protected):
            low, high = (Fraction(round(table[i, il, head] * 100), 100) for i in (row - 1, row))
            evicted = low + (percent - row) * (high - low)
            target.append(max(0, (1 - evicted) * n - p))
        options = dict(profile=table, n_protected=case.n_protected, n_seen=n_seen)
        assert case.counts("profile", **options) == share_out(target, case.room, case.n_keep)
    with pytest.raises(ValueError, match="needs a profile"):
        cases[0].counts("profile")


def test_a_smaller_profile_is_refused():
    with pytest.raises(ValueError, match="profile of 2 layers with 3 KV heads has no layer 2, head 0"):
        _core.allocate("profile", [0, 2], [0, 0], [[0]] * 2, [[1.0]] * 2, 1, profile=np.zeros((99, 2, 3)))


def test_two_stages(cases):
    for case in cases:
        for i, chosen in enumerate(case.allocate("uniform", second=case.second)):
            order = lambda score: sorted(left, key=lambda j: (-finite_rank(score[i])[j], -case.pos[i][j]))
            left = list(range(case.room[i]))
            kept = order(case.score)[: len(chosen) // 2]
            left = [j for j in left if j not in kept]
            kept += order(case.second)[: len(chosen) - len(kept)]
            assert chosen.tolist() == sorted(kept)


def test_same_result_every_time(cases):
    for case, name in itertools.product(cases[:10], _core.allocators()):
        options = dict(layer_preference=case.preference, profile=np.full((99, 9, 4), 0.5))
        first, again = case.allocate(name, **options), case.allocate(name, **options)
        assert [a.tolist() for a in first] == [b.tolist() for b in again]


def lower_hull_slopes(y):
    height = np.concatenate([[0], np.cumsum(y)])
    slopes, at = [], 0
    while at < len(y):
        rise = (height[at + 1 :] - height[at]) / np.arange(1, len(y) - at + 1)
        step = len(rise) - int(np.argmin(rise[::-1]))
        slopes += [rise[step - 1]] * step
        at += step
    return slopes


def test_isotonic_regression_is_the_lower_hull(rng):
    for n in [0, 1, 2, 5, 40, 300]:
        y = rng.exponential(size=n)
        fit = _core.isotonic_increasing(y)
        assert fit.dtype == np.float64 and (np.diff(fit) >= 0).all()
        np.testing.assert_allclose(fit, lower_hull_slopes(y), rtol=1e-9)


def test_solver_against_exhaustive_search(rng):
    for _ in range(15):
        n, n_protected, min_keep, n_heads = 8, 2, 3, 3
        score = rng.permuted(np.tile(np.arange(n - n_protected), (n_heads, 1)), axis=1)
        utility = np.take_along_axis(np.sort(rng.exponential(size=score.shape), axis=1), score, axis=1)  # the scorer knows
        table = _core.solve_profile(score, utility, n, min_keep)
        assert table.shape == (99, n_heads)
        lost = np.concatenate([np.zeros((n_heads, 1)), np.cumsum(np.sort(utility.astype(np.float32), axis=1), axis=1)], axis=1)
        most = n - min_keep
        for i, row in enumerate(table):
            target = math.floor((i + 1) / 100 * n_heads * n + 0.5)
            if target > n_heads * most:
                np.testing.assert_allclose(row, (i + 1) / 100, rtol=1e-12)
                continue
            discards = np.rint(row * n).astype(int)
            np.testing.assert_allclose(row, discards / n, rtol=1e-12)
            assert discards.sum() == target and discards.max() <= most
            least = min(
                sum(lost[h, k] for h, k in enumerate(ks))
                for ks in itertools.product(range(most + 1), repeat=n_heads)
                if sum(ks) == target
            )
            assert sum(lost[h, k] for h, k in enumerate(discards)) == pytest.approx(least, abs=1e-6)


def test_solver_refuses_what_does_not_fit_together():
    for scores, utility, n_tokens, reason in [
        ([[1]], [[1], [2]], 4, "one element per"),
        ([[1, 2]], [[1]], 4, "2 scores and 1 utilities"),
        ([[1, 2]], [[1, 2]], 1, "more than the 1 tokens"),
        ([[1]], [[np.nan]], 1, "isn't finite"),
    ]:
        with pytest.raises(ValueError, match=reason):
            _core.solve_profile(scores, utility, n_tokens, 0)


@pytest.mark.parametrize("allocator", ["global", "global-raw"])
@pytest.mark.parametrize("floor", [0.0, 0.1, 0.5, 1.0])
def test_floor(allocator, floor):
    """Every head first takes its best `floor` times the average (DBTrimKV's floor_budget_ratio), the rest is global."""
    rng = np.random.default_rng(int(floor * 10))
    for _ in range(30):
        layer, head = np.repeat([0, 1, 2], 2).astype(np.int32), np.tile([0, 1], 3).astype(np.int32)
        score = [np.float32(rng.random(n) * 10.0**i) for i, n in enumerate(rng.integers(0, 30, 6))]
        pos = [np.arange(len(s), dtype=np.int32) for s in score]
        n_keep = int(rng.integers(0, sum(map(len, score)) + 1))
        kept = _core.allocate(allocator, layer, head, pos, score, n_keep, floor=floor)
        assert sum(map(len, kept)) == n_keep
        least = int(floor * n_keep / 6)
        first = [set(np.argsort(-s)[:least].tolist()) for s in score]
        assert all(set(k.tolist()) >= f for k, f in zip(kept, first))
        free = [[(s if allocator == "global-raw" else s / sum(score[j].sum() for j in range(6) if layer[j] == layer[i]), i, p)
                 for p, s in enumerate(score[i]) if p not in first[i]] for i in range(6)]  # fmt: skip
        best = sorted((x for f in free for x in f), reverse=True)[: n_keep - sum(map(len, first))]
        want = [first[i] | {p for _, j, p in best if j == i} for i in range(6)]
        assert [set(k.tolist()) for k in kept] == want
