"""What is kept: exactly the budget, and exactly what brute force picks from the engine's own scores."""

import engine
import numpy as np
import pytest
import reference
from gguf import GGMLQuantizationType as QType


def assert_selected(got, held, scores, tokens_seen, budget, sink, recent, policy="laprox"):
    """The same sets; where float32 and float64 round a score to either side of the threshold, entries on it may differ."""
    want = reference.select(held, scores, tokens_seen, budget, sink, recent, policy)
    assert sum(map(len, got.values())) == sum(map(len, want.values()))
    if all(np.array_equal(got[pair], want[pair]) for pair in want):
        return
    last = max(pos.max() for pos in held.values())
    rank = {pair: (pos >= sink) & (pos <= last - recent) for pair, pos in held.items()}
    value = {(pair, p): s for pair, (pos, score) in reference.normalised(held, scores, rank).items() for p, s in zip(pos, score)}
    gained = [value[pair, p] for pair in want for p in set(got[pair]) - set(want[pair])]
    lost = [value[pair, p] for pair in want for p in set(want[pair]) - set(got[pair])]
    assert max(lost) - min(gained) < 1e-6 * min(gained), "the engine kept something worth less than what it evicted"


@pytest.mark.parametrize("budget", ["10%", "0.333", "60", "36", "99%"])
@pytest.mark.parametrize("shape", [{}, {"n_head": 4, "n_head_kv": 4, "n_layer": 2}], ids=["gqa", "mha"])
def test_laprox_keeps_the_best(toy, rng, shape, budget):
    """Twice: the second selection starts from ragged heads."""
    path = toy(**shape)
    with engine.Model(path, engine.params(budget=budget)) as model, engine.Context(model, n_ctx=1024) as ctx:
        seen = 0
        for n in (401, 250):
            ctx.decode(rng.integers(3, 512, n))
            seen += n
            before, scores = ctx.held(), ctx.score()
            ctx.compress()
            assert_selected(ctx.held(), before, scores, seen, budget, 4, 32)
            stats = ctx.stats()
            entries = reference.budget_entries(budget, seen, len(before), 4, 32)
            assert stats.entries_held == min(entries, sum(map(len, before.values())))
            assert (stats.tokens_seen, stats.entries_full) == (seen, seen * len(before))


def test_pooling_joins_entries_across_gaps(toy, rng):
    """Neighbours are those in the cache, as docs/how-it-works.md says: by distance in the text, other entries would be kept."""

    def by_distance(score, pos):
        text = np.zeros(pos.max() + 1)
        text[pos] = score
        return reference.average_pool(text)[pos]

    with engine.Model(toy(), engine.params(budget="30%")) as model, engine.Context(model, n_ctx=1024) as ctx:
        for n, alike in ((400, True), (200, False)):
            ctx.decode(rng.integers(3, 512, n))
            before, scores = ctx.held(), ctx.score()
            ctx.compress()
            seen = ctx.stats().tokens_seen
            assert_selected(ctx.held(), before, scores, seen, "30%", 4, 32)
            others = reference.select(before, scores, seen, "30%", 4, 32, pool=by_distance)
            differ = sum(len(set(pos) - set(others[pair])) for pair, pos in ctx.held().items())
            assert differ <= 2 if alike else differ > 20  # while all of the text is held, both are the same


def test_heads_keep_different_entries(toy, rng):
    """A cache that silently kept the same positions everywhere would pass for a smaller context."""
    with engine.Model(toy(), engine.params()) as model, engine.Context(model) as ctx:
        ctx.decode(rng.integers(3, 512, 400))
        ctx.compress()
        held = [set(p.tolist()) for p in ctx.held().values()]
        assert len(set(map(len, held))) > 1
        assert all(a != b for i, a in enumerate(held) for b in held[:i])


@pytest.mark.parametrize("sink, recent", [(0, 1), (4, 32), (30, 5)])
def test_protected_entries(toy, rng, sink, recent):
    """Held by every head whatever they score, and a budget below them keeps exactly them."""
    with engine.Model(toy(), engine.params(budget="0.1%", sink=sink, recent=recent)) as model, engine.Context(model) as ctx:
        ctx.decode(rng.integers(3, 512, 300))
        ctx.compress()
        for pos in ctx.held().values():
            assert pos.tolist() == [*range(sink), *range(300 - recent, 300)]


@pytest.mark.parametrize("budget, kept", [("101", 101), ("33.3%", None)])
def test_streaming_ties(toy, rng, budget, kept):
    """Every head has the same scores: what a budget leaves over goes to the lower layers, then the lower heads."""
    with engine.Model(toy(), engine.params(policy="streaming", budget=budget)) as model, engine.Context(model) as ctx:
        ctx.decode(rng.integers(3, 512, 301))
        ctx.compress()
        entries = reference.budget_entries(budget, 301, 6, 4, 32)
        assert kept is None or entries == kept * 6
        for i, pair in enumerate(ctx.pairs()):
            n = entries // 6 + (i < entries % 6) - 4
            assert ctx.positions(*pair).tolist() == [*range(4), *range(301 - n, 301)]


def test_laprox_ties(tmp_path, rng):
    """Two heads with the same weights score alike to the bit. With an odd budget one entry is held by the first only."""
    import gguf_factory

    class Twins(gguf_factory._Writer):
        def matrix(self, name, rows, cols, std):
            data = self.rng.standard_normal((rows, cols), dtype=np.float32) * np.float32(std)
            if ".attn_output." in name:
                data[:, cols // 2 :] = data[:, : cols // 2]
            elif ".attn_" in name:
                data[rows // 2 :] = data[: rows // 2]
            self.gguf.add_tensor(name, data, raw_dtype=QType.F32)

    path = gguf_factory.write_llama(tmp_path / "twins.gguf", writer=Twins, n_head=4, n_head_kv=2)
    with engine.Model(path, engine.params(budget="50%")) as model, engine.Context(model) as ctx:
        ctx.decode(rng.integers(3, 512, 301))  # half of 301 * 6 entries: 903
        scores = ctx.score()
        ctx.compress()
        held = ctx.held()
        assert sum(map(len, held.values())) == 903
        odd = []
        for il in range(3):
            assert np.array_equal(scores[il, 0], scores[il, 1])
            assert set(held[il, 0]) >= set(held[il, 1])
            odd += sorted(set(held[il, 0]) - set(held[il, 1]))
        assert len(odd) == 1


def test_min_tokens(toy, rng):
    """A sequence of at most min_tokens stays exact; one token more and the budget holds."""
    with engine.Model(toy(), engine.params(min_tokens=200)) as model, engine.Context(model) as ctx:
        ctx.decode(rng.integers(3, 512, 200))
        ctx.compress()
        assert ctx.stats().entries_held == 200 * 6
        ctx.decode([5])
        ctx.compress()
        assert ctx.stats().entries_held == 36 * 6


def test_changing_the_budget_of_a_live_context(toy, rng):
    """A smaller one evicts more, a larger one brings nothing back."""
    with engine.Model(toy(), engine.params(budget="50%")) as model, engine.Context(model) as ctx:
        ctx.decode(rng.integers(3, 512, 400))
        for budget, policy, entries in [("50%", "laprox", 1200), ("40%", "streaming", 960), ("80%", "laprox", 960), ("20%", "laprox", 480)]:
            ctx.set_params(engine.params(budget=budget, policy=policy))
            ctx.compress()
            assert ctx.stats().entries_held == entries
