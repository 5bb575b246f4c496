"""Bytes: what is reported is what the process holds, and evicting gives it back."""

import os

import devices
import engine
import numpy as np
import pytest
import worker

MiB = 1 << 20

# a sanitizer holds on to what was freed, and has a shadow of everything
elsewhere = "LAPROX_SANITIZED" in os.environ or devices.BACKEND != "cpu"
resident = pytest.mark.skipif(elsewhere, reason="a process holds more with a sanitizer, and not the cache that is on a device")

# 8 KV heads of 128 in 2 layers: 16 KiB per token in F16
LARGE = {"n_layer": 2, "n_embd": 256, "n_head": 8, "n_head_kv": 8, "head_dim": 128, "n_ff": 256}


def per_token(ctx, bytes_per_element=2.0):
    return sum(n for _, n in ctx.layers()) * 2 * ctx.model.head_dim * bytes_per_element


@pytest.mark.parametrize(
    "type_k, element, budget, n",
    [("f16", 2.0, 0.05, 4000), ("f16", 2.0, 0.3, 2000), ("q8_0", 34 / 32, 0.1, 2000), ("q4_0", 18 / 32, 0.1, 2000)],
)
def test_bytes_follow_the_budget(toy, rng, type_k, element, budget, n):
    """At most 1.2 x (budget x full), plus the tail."""
    with engine.Model(toy(**LARGE), engine.params(budget=str(budget))) as model:
        with engine.Context(model, n_ctx=4608, n_ubatch=256, type_k=type_k) as ctx:
            ctx.decode(rng.integers(3, 512, n))
            before = ctx.stats()
            full = n * per_token(ctx, element)
            assert full <= before.kv_bytes_full <= 1.1 * full
            assert before.kv_bytes >= full
            ctx.compress()
            after = ctx.stats()
            assert after.entries_held == round(budget * n * 16)
            tail = 256 * per_token(ctx, element)
            assert budget * full <= after.kv_bytes <= 1.2 * budget * full + tail


@pytest.mark.parametrize("n_seq_max", [1, 4])
def test_no_hidden_second_cache(toy, rng, n_seq_max):
    """Never more than stock llama.cpp takes for the same context, and what one sequence doesn't use isn't there."""
    with engine.Model(toy(**LARGE), engine.params()) as model:
        with engine.Context(model, n_ctx=16384, n_seq_max=n_seq_max, type_k="f16") as ctx:
            ctx.decode(rng.integers(3, 512, 100))
            assert 100 * per_token(ctx) <= ctx.stats(-1).kv_bytes <= 1.01 * (16384 / n_seq_max) * per_token(ctx)


@resident
def test_resident_memory_falls(toy, rng, tmp_path):
    """Nearly 100 MiB of cache to a twentieth: the process gives it back, and keeps what the statistics say."""
    tokens = rng.integers(3, 512, 6000).tolist()
    steps = [["rss"], ["prompt", tokens], ["stats"], ["rss"], ["compress"], ["stats"], ["rss"], ["prompt", [5, 6]], ["rss"]]
    context = {"n_ctx": 6144, "n_ubatch": 256, "type_k": "f32"}
    at_start, _, full, rss_full, _, kept, rss_kept, _, rss_after = worker.run_in_process(
        toy(**LARGE), steps, context, tmp_path, kv={"budget": "5%"}
    )
    assert full["kv_bytes"] >= 93 * MiB and kept["kv_bytes"] < 10 * MiB
    assert rss_full - at_start < full["kv_bytes"] + 64 * MiB  # no second copy anywhere
    freed = full["kv_bytes"] - kept["kv_bytes"]
    assert rss_full - rss_kept > freed - 16 * MiB and rss_full - rss_after > freed - 16 * MiB


@pytest.mark.parametrize("budget, limit", [("3MiB", 3 * MiB), ("5MiB", 5 * MiB), ("9000kB", 9e6)])
@pytest.mark.parametrize("policy", ["laprox", "streaming"])
def test_byte_budgets_hold(toy, rng, budget, limit, policy):
    """Never exceeded after a compression, and not a pretext to throw everything away."""
    with engine.Model(toy(**LARGE), engine.params(budget=budget, policy=policy)) as model:
        with engine.Context(model, n_ctx=4096, n_ubatch=256, type_k="f16") as ctx:
            for n in (2000, 300, 700):
                ctx.decode(rng.integers(3, 512, n))
                ctx.compress()
                assert 0.6 * limit <= ctx.stats().kv_bytes <= limit


def test_byte_budget_that_fits_evicts_nothing(toy, rng):
    with engine.Model(toy(**LARGE), engine.params(budget="64MiB")) as model:
        with engine.Context(model, n_ctx=1024, type_k="f16") as ctx:
            ctx.decode(rng.integers(3, 512, 500))
            ctx.compress()
            assert ctx.stats().entries_held == 500 * 16


def test_clearing_gives_everything_back(toy, rng):
    with engine.Model(toy(**LARGE), engine.params()) as model, engine.Context(model, n_ctx=4096, type_k="f16") as ctx:
        start = ctx.stats().kv_bytes
        ctx.decode(rng.integers(3, 512, 2000))
        ctx.compress()
        ctx.clear()
        stats = ctx.stats()
        assert (stats.tokens_seen, stats.entries_held, stats.entries_full) == (0, 0, 0)
        assert stats.kv_bytes <= start


@pytest.mark.parametrize("how", ["seq_rm", "clear", "seq_keep"])
def test_removing_gives_back_what_was_never_compressed(toy, rng, how):
    """A sequence of several grows as it is used, and a gone one takes no more than a new one."""
    with engine.Model(toy(n_layer=1), engine.params(policy="full")) as model:
        with engine.Context(model, n_ctx=8192, n_seq_max=2) as ctx:
            start = ctx.stats(0).kv_bytes
            ctx.decode(rng.integers(3, 512, 3000))
            full = ctx.stats(0).kv_bytes
            assert 3000 / 256 * start <= full <= 1.3 * 3000 / 256 * start  # not twice what is needed
            getattr(ctx, how)(*{"seq_rm": [0], "clear": [], "seq_keep": [1]}[how])
            assert ctx.stats(0).kv_bytes == start


def test_a_short_text_after_a_long_one_takes_little(toy, rng):
    """Once compressed and cleared, a context takes what its text needs, not all of n_ctx again."""
    with engine.Model(toy(n_layer=1), engine.params(budget="5%")) as model, engine.Context(model, n_ctx=8192) as ctx:
        full = ctx.stats().kv_bytes
        ctx.decode(rng.integers(3, 512, 600))
        ctx.compress()
        ctx.clear()
        ctx.decode(rng.integers(3, 512, 300))
        assert ctx.stats().kv_bytes <= 512 / 8192 * 1.01 * full


@resident
def test_growing_needs_room_for_one_layer_more(toy, rng, tmp_path):
    """Layers move one by one: no second cache beside the first, not even for a moment."""
    shape = LARGE | {"n_layer": 8}
    steps = [["prompt", rng.integers(3, 512, 256).tolist()], ["peak_rss"]]
    steps += [["prompt", rng.integers(3, 512, 256).tolist()] for _ in range(11)] + [["stats"], ["peak_rss"]]
    context = {"n_ctx": 8192, "n_seq_max": 2, "n_batch": 256, "type_k": "f32"}  # 16 KiB per token and layer
    *_, start, after, peak = [r for r in worker.run_in_process(toy(**shape), steps, context, tmp_path, kv={"policy": "full"}) if not isinstance(r, np.ndarray)]
    layer = after["kv_bytes"] / 8
    assert after["kv_bytes"] > 180 * MiB
    assert peak - start < after["kv_bytes"] + layer + 32 * MiB


@resident
def test_what_attention_needs_beside_the_cache_is_bounded(toy, rng, tmp_path):
    """The process holds what is reported and, while a batch is evaluated, masks of the heads' different lengths: those of one
    layer, twice, whatever the number of layers, of batches and of length classes. docs/how-it-works.md has the formula."""
    n_batch, n_head_kv, per_row = 512, 8, 4 * 8 * 2 * 128 * 2  # bytes of a row of all heads and layers, in F16
    tokens = lambda n: rng.integers(3, 512, n).tolist()  # noqa: E731
    look = [["stats"], ["held"], ["rss"]]
    steps = [["prompt", tokens(n_batch)], *look, ["prompt", tokens(5500)], ["compress"], *look]
    for n in (n_batch, n_batch, 1, n_batch, n_batch, 200, n_batch):
        steps += [["prompt", tokens(n)], *look]
    context = {"n_ctx": 12288, "n_batch": n_batch, "type_k": "f16"}
    results = worker.run_in_process(toy(**LARGE | {"n_layer": 4}), steps, context, tmp_path, kv={"budget": "10%"})
    seen = [results[i : i + 3] for i, step in enumerate(steps) if step[0] == "stats"]
    reported = lambda stats: stats["kv_bytes"] + stats["window_bytes"]  # noqa: E731
    beside = [rss - reported(stats) for stats, _, rss in seen]  # the model, the program, compute buffers
    for (stats, held, _), more in zip(seen[1:], np.array(beside[1:]) - beside[0]):
        lengths = [len(pos) for pos in held.values()]
        rows = stats["kv_bytes"] / per_row + max(lengths) - np.mean(lengths)  # of the longest head, its unused cells included
        assert -16 * MiB < more < 2 * rows * n_batch * n_head_kv * 2 + 8 * MiB
    assert seen[1][0]["kv_bytes"] < 0.15 * 6012 * per_row


@resident
@pytest.mark.parametrize("n_seq_max", [1, 3])
def test_reported_bytes_are_the_processs(toy, rng, tmp_path, n_seq_max):
    """Cache, windows and masks of contexts of every kind: within a few percent of what the process holds, at every step."""
    shape = LARGE | {"n_layer": 6}
    steps = [["prompt", rng.integers(3, 512, 64).tolist()], ["stats", -1], ["rss"]]
    for i in range(6):
        steps += [["prompt", rng.integers(3, 512, 1500).tolist(), i % n_seq_max]]
        steps += [["compress", i % n_seq_max]] if i == 3 else []
        steps += [["stats", -1], ["rss"]]
    context = {"n_ctx": 9216 * n_seq_max, "n_batch": 64, "n_seq_max": n_seq_max, "type_k": "f32"}
    results = worker.run_in_process(toy(**shape), steps, context, tmp_path, kv={"budget": "30%", "window": 64})
    seen = [(s["kv_bytes"] + s["window_bytes"], rss) for s, rss in zip(results, results[1:]) if isinstance(s, dict)]
    (first, rss_first), *later = seen
    assert max(reported for reported, _ in seen) > 200 * MiB
    for reported, rss in later:
        masks = 4 * (reported / (6 * 8 * 2 * 128 * 4)) * 64 * 8  # in the compute buffers, see the test above: rows x batch x KV heads
        assert abs((rss - rss_first) - (reported - first)) < 0.04 * max(reported, first) + masks + 8 * MiB


def test_a_byte_budget_is_chosen_as_fast_as_one_of_tokens(toy, rng):
    """Scores are ranked once, not for every step of the search for what fits."""
    shape = {"n_layer": 2, "n_head": 2, "n_head_kv": 2, "n_embd": 64, "head_dim": 32, "n_ff": 64}
    seconds = {}
    tokens = rng.integers(3, 512, 6000)
    with engine.Model(toy(**shape), engine.params()) as model, engine.Context(model, n_ctx=8192) as ctx:
        for budget in ("1000", "2MiB"):
            ctx.set_params(engine.params(budget=budget))
            seconds[budget] = 1e9
            for _ in range(3):
                ctx.clear()
                ctx.decode(tokens)
                ctx.compress()
                assert ctx.stats().compressions == 1
                seconds[budget] = min(seconds[budget], ctx.stats().select_seconds)
    assert seconds["2MiB"] < 5 * seconds["1000"] + 0.002
