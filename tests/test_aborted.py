"""A host that stops a batch or a compression half way through: nothing of it counts."""

import engine
import numpy as np
import pytest
import reference
from devices import TOLERANCE
from test_compaction import evict

WINDOW = 32  # and as many slots beside it


def stopped(ctx, what, message, after=20):
    ctx.abort_after(after)
    with pytest.raises(engine.Refused, match=message):
        what()
    ctx.abort_after(None)


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
@pytest.mark.parametrize("n", [1, 20, 100])
@pytest.mark.parametrize("after", [0, 10, 30])
def test_an_aborted_batch_leaves_the_sequence_as_it_was(toy, rng, arch, n, after):
    """Its queries are no longer observed: the window never reaches beyond the sequence's end."""
    path = toy(arch)
    net = reference.Network(path, n_queries=WINDOW)
    with engine.Model(path, engine.params(budget="20%", window=WINDOW)) as model:
        with engine.Context(model, n_ctx=1024, n_ubatch=128) as ctx:
            ctx.decode(prompt := rng.integers(3, 512, 300))
            net.decode(prompt)
            held = ctx.held()
            stopped(ctx, lambda: ctx.decode(rng.integers(3, 512, n)), "returned 2", after)
            assert (ctx.pos_max(), ctx.stats().tokens_seen) == (299, 300)
            assert all(np.array_equal(held[pair], pos) for pair, pos in ctx.held().items())
            # what it wrote over is lost, the newest of the rest are observed
            pos = ctx.queries(ctx.pairs()[0][0])[1].tolist()
            assert pos == list(range(300 - min(WINDOW, max(0, 2 * WINDOW - n)), 300))
            if pos:
                ctx.compress()
                evict(net, ctx)
            else:
                with pytest.raises(engine.Refused, match="no queries"):
                    ctx.compress()
            for tokens in ([7], rng.integers(3, 512, 40)):
                assert np.abs(ctx.decode(tokens, all_logits=True) - net.decode(tokens)).max() < 20 * TOLERANCE
            ctx.compress()
            evict(net, ctx)
            assert np.abs(ctx.decode([8])[-1:] - net.decode([8])[0][-1:]).max() < 20 * TOLERANCE


def test_the_ubatches_before_an_aborted_one_stay(toy, rng):
    """llama.cpp takes back the ubatch that was stopped, no more."""
    path = toy(n_layer=1)
    with engine.Model(path, engine.params(budget="20%")) as model, engine.Context(model, n_ctx=1024, n_ubatch=64) as ctx:
        calls = []
        for n in (64, 256):  # what one ubatch of 64 takes
            ctx.clear()
            counted = engine.L.ggml_abort_callback(lambda _user: calls.append(n) is not None)
            engine.L.llama_set_abort_callback(ctx.handle, counted, None)
            ctx.decode(rng.integers(3, 512, n))
        one = calls.count(64)
        ctx.clear()
        stopped(ctx, lambda: ctx.decode(rng.integers(3, 512, 256)), "returned 2", after=2 * one + one // 2)
        assert (ctx.pos_max(), ctx.stats().tokens_seen) == (127, 128)
        assert ctx.queries(0)[1].tolist() == list(range(128 - 32, 128)) or ctx.queries(0)[1].tolist() == []
        assert ctx.pos_max() >= max(ctx.queries(0)[1], default=0)


@pytest.mark.parametrize("policy", ["laprox", "criticalkv", "keydiff"])
@pytest.mark.parametrize("after", [0, 3, 30])
def test_an_aborted_compression_leaves_the_cache_as_it_was(toy, rng, policy, after):
    path = toy()
    with engine.Model(path, engine.params(policy=policy, budget="20%")) as model, engine.Context(model) as ctx:
        tokens = rng.integers(3, 512, 300)
        ctx.decode(tokens)
        held, k, stats = ctx.held(), ctx.entries(1, 0).k, ctx.stats()
        stopped(ctx, ctx.compress, "aborted", after)
        assert all(np.array_equal(held[pair], pos) for pair, pos in ctx.held().items())
        assert np.array_equal(k, ctx.entries(1, 0).k)
        assert (ctx.stats().kv_bytes, ctx.stats().compressions) == (stats.kv_bytes, 0)
        ctx.compress()
        chosen = ctx.held()
        ctx.clear()
        ctx.decode(tokens)
        ctx.compress()
        assert all(np.array_equal(chosen[pair], pos) for pair, pos in ctx.held().items())
