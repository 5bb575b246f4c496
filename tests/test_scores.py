"""LaProx scores against NumPy float64 on the values that the cache itself holds."""

import devices
import engine
import numpy as np
import pytest
import reference

# largest relative error: median, worst
EXACT, HALF, QUANTISED = (1e-3, 1e-3), (1e-3, 1e-2), (1e-2, 1e-1)
if devices.ROUNDS:
    EXACT = HALF = QUANTISED

MHA = {"n_head": 4, "n_head_kv": 4}
GQA = {"n_head": 8, "n_head_kv": 2}
MQA = {"n_head": 4, "n_head_kv": 1}


def expected_scores(ctx, path, seq=0):
    """What laprox_scores() should say, from laprox_entries(), laprox_queries() and the weights in the file."""
    net = reference.Network(path)
    out = {}
    for il, n_head_kv in ctx.layers():
        q, q_pos = ctx.queries(il, seq)
        w_o, group = net.w[f"blk.{il}.attn_output.weight"], net.n_head // n_head_kv
        scale = 1.0 if net.arch in ("gemma2", "gemma4") else net.scale  # they scale their queries themselves
        for h in range(n_head_kv):
            e, part = ctx.entries(il, h, seq), slice(h * group, (h + 1) * group)
            columns = slice(h * group * net.d, (h + 1) * group * net.d)
            out[il, h] = reference.laprox_scores(q[:, part], q_pos, e.k, e.v, e.pos, w_o[:, columns], scale, net.softcap)
    return out


def check(ctx, path, tolerance, seq=0):
    got, want = ctx.score(seq), expected_scores(ctx, path, seq)
    assert got.keys() == want.keys() and len(got) > 0
    got, want = (np.concatenate([x[pair] for pair in want]) for x in (got, want))
    error = np.abs(got - want) / np.maximum(want, 1e-12 * want.max())  # squares of less are 0 in float32
    median, worst = tolerance
    assert np.median(error) < median and error.max() < worst, f"median {np.median(error):.1e}, worst {error.max():.1e}"


@pytest.mark.parametrize(
    "shape, weights, type_k, n, tolerance",
    [
        (MHA, "F32", "f32", 100, EXACT),
        (GQA, "F32", "f32", 1000, EXACT),
        (MQA | {"head_dim": 128}, "F32", "f32", 700, EXACT),
        (MQA, "F16", "f16", 300, HALF),
        (GQA | {"head_dim": 128}, "F32", "f16", 4000, HALF),
        (MHA | {"head_dim": 128}, "Q8_0", "f16", 500, HALF),
        (GQA, "Q4_K", "f16", 1000, HALF),
        (GQA, "F32", "bf16", 500, QUANTISED),
        (GQA, "Q4_0", "q8_0", 4000, QUANTISED),
        (MHA | {"head_dim": 128}, "Q6_K", "q8_0", 300, QUANTISED),
        (GQA | {"head_dim": 128}, "Q4_K", "q4_0", 1000, QUANTISED),
        (MQA, "F32", "q4_0", 100, QUANTISED),
    ],
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else None if isinstance(x, tuple) else str(x),
)
def test_scores(toy, rng, shape, weights, type_k, n, tolerance):
    path = toy(weights=weights, n_layer=2, n_ff=512, **shape)
    with engine.Model(path, engine.params()) as model, engine.Context(model, n_ctx=n + 64, n_ubatch=128, type_k=type_k) as ctx:
        ctx.decode(rng.integers(3, 512, n))
        check(ctx, path, tolerance)


@pytest.mark.parametrize("window, n", [(8, 200), (64, 200), (32, 20), (1, 50)])
def test_windows(toy, rng, window, n):
    """Also wider than the prompt. Queries arrive in several batches, the last of one token."""
    path = toy()
    with engine.Model(path, engine.params(window=window)) as model, engine.Context(model, n_ubatch=64) as ctx:
        ctx.decode(rng.integers(3, 512, n - 1))
        ctx.decode([7])
        q, pos = ctx.queries(1)
        assert pos.tolist() == list(range(max(0, n - window), n)) and len(q) == len(pos)
        check(ctx, path, EXACT)


@pytest.mark.parametrize("type_k", ["f32", "q8_0"])
def test_scores_after_a_compression(toy, rng, type_k):
    """Over what is left of a head and what came after, again and again."""
    path = toy()
    tolerance = EXACT if type_k == "f32" else QUANTISED
    with engine.Model(path, engine.params(budget="30%")) as model, engine.Context(model, n_ctx=1024, type_k=type_k) as ctx:
        for n in (400, 1, 150):
            ctx.decode(rng.integers(3, 512, n))
            check(ctx, path, tolerance)
            ctx.compress()
            check(ctx, path, tolerance)


def test_a_device_is_asked_once_a_layer(toy, rng):
    """Heads share what is the same for them: the mask, the slots of the queries, and W_O's part."""
    path, n = toy(n_layer=3, **MHA), 500
    with engine.Model(path, engine.params()) as model, engine.Context(model) as ctx:
        ctx.decode(rng.integers(3, 512, n))
        ctx.score()  # W_O's part is made once
        ctx.score()
        asked = engine.scoring()
        shared, index = 3 * (2 * n * 32 + 4 * 32 + 4 * 4 * 64 * 64), 3 * 4 * 4 * n
        assert asked["graphs"] == 3 and asked["bytes_out"] == 3 * 4 * 4 * n
        assert shared <= asked["bytes_in"] <= shared + index * devices.ROUNDS


def test_more_heads_than_a_graph_has_room_for(toy, rng):
    """Each has its own mask after a compression, of 8 MB here."""
    path = toy(n_layer=1, n_head=16, n_head_kv=16, head_dim=32)
    with engine.Model(path, engine.params(window=1024, budget="95%")) as model:
        with engine.Context(model, n_ctx=4608, n_batch=512) as ctx:
            ctx.decode(rng.integers(3, 512, 4200))
            ctx.compress()
            check(ctx, path, EXACT)
            assert engine.scoring()["graphs"] == 2


@pytest.mark.parametrize("kv_unified", [False, True])
def test_sequences_have_their_own_windows(toy, rng, kv_unified):
    """Sequences of different lengths in one batch; a global window would mix their queries."""
    path = toy()
    with engine.Model(path, engine.params()) as model:
        with engine.Context(model, n_ctx=1536, n_seq_max=3, n_ubatch=64, kv_unified=kv_unified) as ctx:
            ctx.decode(rng.integers(3, 512, 200), seq=0)
            ctx.decode(rng.integers(3, 512, 10), seq=2)
            for i in range(40):
                batch = [(int(rng.integers(3, 512)), 200 + i, (0,)), (int(rng.integers(3, 512)), 10 + i, (2,))]
                ctx.submit(batch + ([(5, i, (1,))] if i < 20 else []))
            for seq, n in ((0, 240), (1, 20), (2, 50)):
                assert ctx.queries(0, seq)[1].tolist() == list(range(max(0, n - 32), n))
                check(ctx, path, EXACT, seq)


@pytest.mark.parametrize("type_k, tolerance", [("f32", 1e-2 if devices.ROUNDS else 1e-3), ("f16", 1e-2), ("q8_0", 5e-2)])
def test_entries_and_queries_are_the_models(toy, rng, type_k, tolerance):
    """The oracle above trusts what the cache shows; here that is compared with the NumPy forward pass."""
    path, tokens = toy(), rng.integers(3, 512, 200)
    net = reference.Network(path, n_queries=32)
    net.decode(tokens)
    with engine.Model(path, engine.params()) as model, engine.Context(model, type_k=type_k) as ctx:
        ctx.decode(tokens)
        for il, h in ctx.pairs():
            e = ctx.entries(il, h)
            assert e.pos.tolist() == list(range(200))
            for got, want in ((e.k, net.k[il, h]), (e.v, net.v[il, h]), (ctx.queries(il)[0], net.q[il])):
                assert np.linalg.norm(got - want) < tolerance * np.linalg.norm(want)


def test_scores_belong_to_what_is_held_now(toy, rng):
    """No scores before the first scoring, after a token more, after a compression or a reset."""
    with engine.Model(toy(), engine.params()) as model, engine.Context(model) as ctx:
        changes = [
            lambda: ctx.decode(rng.integers(3, 512, 100)),
            lambda: ctx.decode([5]),
            lambda: ctx.compress(),
            lambda: ctx.seq_rm(0, ctx.pos_max(), -1),
            lambda: (ctx.clear(), ctx.decode(rng.integers(3, 512, 100))),
        ]
        for change in changes:
            change()
            with pytest.raises(engine.Refused):
                ctx.scores(0, 0)
            ctx.score()
            assert len(ctx.scores(0, 0)) == len(ctx.positions(0, 0))
