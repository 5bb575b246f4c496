"""Models in which only some layers have a cache that can be compressed."""

import devices
import engine
import numpy as np
import pytest
import reference
import worker
from devices import TOLERANCE
from test_compaction import evict
from test_scores import EXACT, HALF, check

LAYERS = {"gemma2": [1, 3], "lfm2": [1, 3]}


@pytest.mark.parametrize("arch", LAYERS)
def test_which_layers(toy, rng, arch):
    """Not those with a sliding window, nor those with recurrent state."""
    with engine.Model(toy(arch), engine.params()) as model, engine.Context(model) as ctx:
        assert ctx.layers() == [(il, 2) for il in LAYERS[arch]]
        ctx.decode(rng.integers(3, 512, 50))
        assert ctx.stats().entries_full == ctx.stats().entries_held == 50 * 4
        with pytest.raises(engine.Refused):
            ctx.positions(0, 0)


@pytest.mark.parametrize("arch", LAYERS)
def test_everything_kept_is_stock(toy, rng, stock, arch):
    path, tokens = toy(arch), rng.integers(3, 512, 300).tolist()
    context = {"n_ctx": 512, "n_ubatch": 64, "type_k": "f16"}
    steps = [["decode", tokens], ["greedy", 5, 60]]
    ours = worker.run_steps(path, [steps[0], ["compress"], steps[1]], context, {"policy": "full"})
    for a, b in zip(stock(path, steps, **context), (ours[0], ours[2])):
        assert np.abs(a - b).max() < 1e-3


@pytest.mark.parametrize("arch", LAYERS)
@pytest.mark.parametrize("type_k, tolerance", [("f32", EXACT), ("f16", HALF)])
def test_scores(toy, rng, arch, type_k, tolerance):
    """gemma2 caps its attention logits; so must the scores."""
    path = toy(arch)
    with engine.Model(path, engine.params(budget="30%")) as model, engine.Context(model, type_k=type_k) as ctx:
        ctx.decode(rng.integers(3, 512, 300))
        check(ctx, path, tolerance)
        ctx.compress()
        ctx.decode(rng.integers(3, 512, 40))
        check(ctx, path, tolerance)


@pytest.mark.parametrize("arch, tolerance", [("gemma2", 20 * TOLERANCE), ("lfm2", TOLERANCE)])
def test_logits_after_compressions(toy, rng, arch, tolerance):
    """gemma2: the sliding-window layers go through llama.cpp's float16 casts and GELU through a float16 table."""
    path = toy(arch)
    net, full = reference.Network(path), reference.Network(path)
    with engine.Model(path, engine.params(budget="20%")) as model, engine.Context(model, n_ctx=1024, n_ubatch=64) as ctx:
        for n in (300, 1, 80, 30):
            tokens = rng.integers(3, 512, n)
            logits, everything = ctx.decode(tokens, all_logits=True), full.decode(tokens)
            assert np.abs(logits - net.decode(tokens)).max() < tolerance
            if n >= 80:
                ctx.compress()
                evict(net, ctx)
        assert np.abs(logits - everything).max() > (4 if devices.ROUNDS else 10) * tolerance, "evicting made no difference"
        assert ctx.stats().entries_held == reference.budget_entries("20%", 381, 4, 4, 32) + 30 * 4


@pytest.mark.parametrize("arch, tolerance", [("gemma2", 20 * TOLERANCE), ("lfm2", 0)])
def test_states(toy, rng, arch, tolerance):
    """llama.cpp restores a sliding window in another order of cells, so those layers add in another order."""
    path = toy(arch)
    with engine.Model(path, engine.params(budget="20%")) as model:
        with engine.Context(model, n_ctx=512, n_seq_max=2) as a, engine.Context(model, n_ctx=512, n_seq_max=2) as b:
            a.decode(rng.integers(3, 512, 200))
            a.compress()
            assert b.load(a.save()) and b.seq_load(a.seq_save(0), 1)
            tokens = rng.integers(3, 512, 20)
            logits = a.decode(tokens, all_logits=True)
            for seq in (0, 1):
                assert np.abs(logits - b.decode(tokens, seq, all_logits=True)).max() <= tolerance
            assert all(np.array_equal(a.positions(*p), b.positions(*p, seq)) for p in a.pairs() for seq in (0, 1))


@pytest.mark.parametrize("arch", LAYERS)
def test_removing(toy, rng, arch):
    """All of a sequence can go; what was compressed can't be cut."""
    path = toy(arch)
    with engine.Model(path, engine.params(budget="20%")) as model, engine.Context(model) as ctx:
        ctx.decode(rng.integers(3, 512, 200))
        ctx.compress()
        held = ctx.held()
        assert not ctx.seq_rm(0, 50, -1)
        assert all(np.array_equal(held[p], pos) for p, pos in ctx.held().items())
        assert ctx.seq_rm(0, -1, -1)
        assert ctx.stats().entries_held == 0
        tokens, net = rng.integers(3, 512, 60), reference.Network(path)
        assert np.abs(ctx.decode(tokens) - net.decode(tokens)[-1]).max() < 20 * TOLERANCE


def test_layers_without_attention(toy, rng):
    """Nemotron 49B and 51B (Deci) have some: nothing is stored or scored for them."""
    path = toy("deci")
    with engine.Model(path, engine.params(budget="20%")) as model, engine.Context(model) as ctx:
        assert ctx.layers() == [(0, 2), (2, 2), (3, 2)]
        ctx.decode(rng.integers(3, 512, 300))
        ctx.compress()
        assert ctx.stats().entries_held == 60 * 6
        ctx.decode([5, 6])


@pytest.mark.parametrize("arch, layers", [("gated", [3, 7]), ("gemma4", [1, 3])])
def test_scores_see_the_attention_of_the_layer_that_owns_the_entries(toy, rng, stock, arch, layers):
    """docs/how-it-works.md says so: not gates between attention and its output projection, and not later layers that read the same
    entries (layer 5 of gemma4 reads those of layer 3). Nothing else about such models is different."""
    path, tokens = toy(arch), rng.integers(3, 512, 300)
    with engine.Model(path, engine.params(budget="20%")) as model, engine.Context(model, type_k="f16") as ctx:
        assert [il for il, _ in ctx.layers()] == layers
        logits = ctx.decode(tokens, all_logits=True)
        check(ctx, path, HALF)
        ctx.compress()
        assert ctx.stats().entries_held == 60 * 4
        shorter = ctx.decode([5, 6], all_logits=True)
        check(ctx, path, HALF)
    steps = [["decode", tokens.tolist()], ["decode", [5, 6]]]
    whole = stock(path, steps, type_k="f16")
    assert np.abs(logits - whole[0]).max() < 1e-3
    assert np.abs(shorter - whole[1]).max() > 0.1, "evicting made no difference"


def test_hybrids_of_sliding_windows_only_are_refused(toy):
    """LFM2 with a sliding window, the only model of llama.cpp's fourth kind of memory, has no full attention to compress."""
    with engine.Model(toy("lfm2", swa=64)) as model:
        with pytest.raises(engine.Refused, match="no layer with a full attention cache"):
            model.set_params(engine.params())
        with engine.Context(model) as ctx:
            ctx.decode([5, 6])
