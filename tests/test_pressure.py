"""A prompt that doesn't fit streams through: when a batch finds no room the cache is compressed and the batch retried."""

import engine
import numpy as np
import pytest
import reference
from devices import TOLERANCE


def follow(ctx, net, tokens, batch):
    """Feed tokens batch by batch to both; the NumPy model evicts what the engine evicted before it attended."""
    compressions = 0
    for start in range(0, len(tokens), batch):
        part, before = tokens[start : start + batch], ctx.held()
        got = ctx.decode(part, all_logits=True)
        after = ctx.held()
        if ctx.stats().compressions > compressions:
            compressions = ctx.stats().compressions
            for pair, pos in after.items():
                assert set(pos[pos < start]) <= set(before[pair])
                net.keep(*pair, pos[pos < start])
        for pos in after.values():
            assert set(range(start, start + len(part))) <= set(pos.tolist()), "a token was evicted by its own batch"
        assert np.abs(got - net.decode(part)).max() < TOLERANCE
    return compressions


@pytest.mark.parametrize("policy", ["laprox", "streaming"])
def test_prompt_longer_than_the_context(toy, rng, policy):
    """1,500 tokens through 512 cells, 100 tokens per head kept at each compression."""
    path = toy()
    net = reference.Network(path)
    with engine.Model(path, engine.params(policy=policy, budget="100")) as model:
        with engine.Context(model, n_ctx=512, n_batch=128, n_ubatch=64) as ctx:
            assert follow(ctx, net, rng.integers(3, 512, 1500), 128) >= 2
            stats = ctx.stats()
            assert stats.tokens_seen == 1500 and ctx.pos_max() == 1499
            assert 100 * 6 <= stats.entries_held <= 512 * 6
            assert stats.kv_bytes <= 1.2 * 512 * 6 * 2 * 64 * 4


def test_generation_longer_than_the_context(toy, rng):
    """One token at a time, forever, in bounded memory."""
    path = toy()
    net = reference.Network(path)
    with engine.Model(path, engine.params(budget="64")) as model, engine.Context(model, n_ctx=256, n_batch=128) as ctx:
        ctx.decode(p := rng.integers(3, 512, 200))
        net.decode(p)
        seen, peak = 200, 0
        compressions = 0
        for token in rng.integers(3, 512, 400):
            before = ctx.held()
            got = ctx.decode([token])
            if ctx.stats().compressions > compressions:
                compressions = ctx.stats().compressions
                for pair, pos in ctx.held().items():
                    assert set(pos[pos < seen]) <= set(before[pair])
                    net.keep(*pair, pos[pos < seen])
            assert np.abs(got - net.decode([token])[0]).max() < TOLERANCE
            seen += 1
            peak = max(peak, ctx.stats().entries_held)
        assert compressions >= 2 and peak <= (64 + 256) * 6


def test_chunked_prefill_is_bounded(toy, rng):
    """The same logical context, far fewer bytes at any time, and the same arithmetic."""
    path, tokens = toy(n_layer=2), rng.integers(3, 512, 3000)
    peak = {}
    for prefill in ("dense", "chunked"):
        with engine.Model(path, engine.params(budget="200", prefill=prefill)) as model:
            with engine.Context(model, n_ctx=4096, n_batch=128) as ctx:
                peak[prefill] = 0
                for start in range(0, 3000, 128):
                    ctx.decode(tokens[start : start + 128])
                    peak[prefill] = max(peak[prefill], ctx.stats().kv_bytes)
                ctx.compress()
                assert ctx.stats().entries_held == 200 * 4
                assert ctx.stats().tokens_seen == 3000
    assert peak["chunked"] < 0.5 * peak["dense"]


def test_chunked_prefill_against_numpy(toy, rng):
    path = toy()
    net = reference.Network(path)
    with engine.Model(path, engine.params(budget="10%", prefill="chunked")) as model:
        with engine.Context(model, n_ctx=4096, n_batch=128) as ctx:
            assert follow(ctx, net, rng.integers(3, 512, 1600), 128) >= 1


def test_pressure_with_nothing_to_evict(toy, rng):
    """`full` never evicts: a batch that doesn't fit is refused as llama.cpp refuses it, and the cache stays usable."""
    path = toy()
    with engine.Model(path, engine.params(policy="full")) as model, engine.Context(model, n_ctx=256, n_batch=128) as ctx:
        ctx.decode(tokens := rng.integers(3, 512, 250))
        before = ctx.held()
        with pytest.raises(engine.Refused):
            ctx.decode(rng.integers(3, 512, 20))
        assert all(np.array_equal(before[p], pos) for p, pos in ctx.held().items())
        net = reference.Network(path)
        net.decode(tokens)
        assert np.abs(ctx.decode([5]) - net.decode([5])[0]).max() < TOLERANCE


def test_pressure_of_one_sequence_leaves_the_others_alone(toy, rng):
    path = toy()
    with engine.Model(path, engine.params(budget="64")) as model:
        with engine.Context(model, n_ctx=512, n_batch=64, n_seq_max=2) as ctx:
            ctx.decode(rng.integers(3, 512, 100), seq=1)
            other = ctx.held(1)
            ctx.decode(rng.integers(3, 512, 700), seq=0)
            assert ctx.stats(0).compressions >= 1 and ctx.stats(1).compressions == 0
            assert all(np.array_equal(other[p], pos) for p, pos in ctx.held(1).items())


@pytest.mark.parametrize("policy", ["laprox", "keydiff", "streaming"])
def test_long_generations_are_compacted(toy, rng, policy):
    """With room for all of it: what was generated is compressed by the latest queries, and each step stays exact."""
    path = toy()
    net = reference.Network(path)
    with engine.Model(path, engine.params(policy=policy, budget="100")) as model, engine.Context(model, n_ctx=4096) as ctx:
        ctx.decode(prompt := rng.integers(3, 512, 300))
        net.decode(prompt)
        ctx.compress()
        compressions = 0
        for seen, token in enumerate(rng.integers(3, 512, 900), 300):
            got = ctx.decode([token])
            if ctx.stats().compressions > compressions:
                compressions = ctx.stats().compressions
                for pair, pos in ctx.held().items():
                    net.keep(*pair, pos[pos < seen])
            assert np.abs(got - net.decode([token])[0]).max() < TOLERANCE
            assert ctx.stats().entries_held <= (100 + 256 + 1) * 6
        assert compressions >= 3 and ctx.stats().tokens_seen == 1200


@pytest.mark.parametrize("budget, least", [("5%", 600), ("100%", 2001), ("full", 2001)])
def test_generations_within_min_tokens_or_budget_stay_whole(toy, rng, budget, least):
    """A percentage of a short text is little: at least min_tokens stay while it is generated."""
    params = dict(policy="full") if budget == "full" else dict(budget=budget)
    with engine.Model(toy(n_layer=1), engine.params(min_tokens=600, **params)) as model, engine.Context(model, n_ctx=4096) as ctx:
        held = []
        for i, token in enumerate(rng.integers(3, 512, 2001)):
            ctx.decode([token])
            if i == 0:
                ctx.compress()  # the prompt is in
            held.append(ctx.stats().entries_held // 2)
        assert held[600] == 601 and held[-1] >= least
        assert held[-1] < 1300 if budget == "5%" else held[-1] == 2001


@pytest.mark.parametrize("batch", [{"n_batch": 32}, {"n_batch": 16}, {"n_batch": 512, "n_ubatch": 16}, {"n_batch": 1}], ids=str)
@pytest.mark.parametrize("first", [0, 100])
def test_prompts_in_small_batches_are_not_taken_for_generations(toy, rng, batch, first):
    """Read a few tokens at a time, a document is left whole until it is said to be in; also one that comes later."""
    if first and batch == {"n_batch": 1}:
        first = 0  # after an answer, a token with logits is one more of it
    with engine.Model(toy(n_layer=1), engine.params(budget="100")) as model, engine.Context(model, n_ctx=2048, **batch) as ctx:
        if first:
            ctx.decode(rng.integers(3, 512, first))
            ctx.compress()
        ctx.decode(rng.integers(3, 512, 1000))
        assert ctx.stats().compressions == 0 and ctx.stats().entries_held == (first + 1000) * 2


def test_drafts_count_as_generated(toy, rng):
    """Verified by twenties, a generation is compressed as one that comes token by token."""
    with engine.Model(toy(n_layer=1), engine.params(budget="100")) as model, engine.Context(model, n_ctx=2048) as ctx:
        ctx.decode(rng.integers(3, 512, 50))
        ctx.compress()
        for _ in range(40):
            ctx.decode(rng.integers(3, 512, 20), all_logits=True)
        assert ctx.stats().compressions >= 2


def test_rejected_drafts_leave_the_window_whole(toy, rng):
    """Two of eight accepted, eight times: still the last 32 queries."""
    with engine.Model(toy(n_layer=1), engine.params(window=32)) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(rng.integers(3, 512, 300))
        for _ in range(8):
            ctx.decode(rng.integers(3, 512, 8), all_logits=True)
            assert ctx.seq_rm(0, ctx.pos_max() - 5, -1)
        assert ctx.queries(0)[1].tolist() == list(range(284, 316))


@pytest.mark.parametrize("budget", ["50%", "100%", "300", "400KiB"])
def test_no_budget_outgrows_the_context(toy, rng, budget):
    """A share of a text longer than n_ctx would come to more than n_ctx: what llama.cpp would have allocated is the limit."""
    with engine.Model(toy(n_layer=1), engine.params(budget=budget)) as model, engine.Context(model, n_ctx=512, n_batch=64) as ctx:
        for _ in range(50):
            ctx.decode(rng.integers(3, 512, 64))
            assert ctx.stats().entries_held <= (512 + 256) * 2
        assert ctx.stats().tokens_seen == 3200
        ctx.compress()
        assert ctx.stats().entries_held <= 512 * 2


@pytest.mark.parametrize("n_batch, most", [(512, 3), (128, 6), (32, 24)])
def test_chunked_prefill_does_not_compress_every_batch(toy, rng, n_batch, most):
    params = engine.params(budget="200", prefill="chunked")
    with engine.Model(toy(n_layer=1), params) as model, engine.Context(model, n_ctx=8192, n_batch=n_batch) as ctx:
        ctx.decode(rng.integers(3, 512, 3000))
        assert 1 <= ctx.stats().compressions <= most


def test_a_generation_that_cannot_be_compacted_goes_on(toy, rng):
    """A scorer that refuses costs memory, not the conversation."""
    with engine.Model(toy(n_layer=1), engine.params(policy="custom", budget="100")) as model, engine.Context(model, n_ctx=1024) as ctx:
        for token in rng.integers(3, 512, 700):
            ctx.decode([token])
        assert ctx.stats().compressions == 0 and ctx.stats().entries_held == 700 * 2


@pytest.mark.parametrize("archive", ["off", "ram"])
def test_all_of_a_context_can_be_used(toy, rng, archive):
    """What was kept isn't a multiple of the blocks that a tail grows by."""
    with engine.Model(toy(), engine.params(budget="90%", min_tokens=0, archive=archive)) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(rng.integers(3, 512, 620))
        ctx.prompt_done()
        ctx.decode(rng.integers(3, 512, 404))
        assert ctx.pos_max() == 1023


@pytest.mark.parametrize("n_ctx, budget, protect", [(768, "600", "0-200"), (2048, "1600", "0-600")])
def test_a_long_prompt_streams_through_with_protected_tokens(toy, rng, n_ctx, budget, protect):
    with engine.Model(toy(n_layer=2), engine.params(budget=budget, min_tokens=0, protect=protect, archive="off")) as model:
        with engine.Context(model, n_ctx=n_ctx, n_batch=128) as ctx:
            ctx.decode(rng.integers(3, 512, n_ctx + 700))
            assert all(set(range(*map(int, protect.split("-")))) <= set(pos.tolist()) for pos in ctx.held().values())
