"""Tokens that are protected are held by every KV head, beside what the budget leaves of the others."""

import engine
import numpy as np
import pytest
import reference

FIRST, END = 20, 70
SETTINGS = {"budget": "20%", "protect": f"{FIRST}-{END}", "window": 16}
N = 400
SHAPES = {"gqa": ("llama", {}), "mha": ("llama", {"n_head": 4, "n_head_kv": 4, "n_layer": 2}), "iswa": ("gemma2", {"swa": 16}), "hybrid": ("lfm2", {})}


@pytest.fixture(params=SHAPES)
def path(request, toy):
    arch, shape = SHAPES[request.param]
    return toy(arch, **shape)


def assert_protected(ctx):
    for pair, pos in ctx.held().items():
        assert set(range(FIRST, END)) <= set(pos.tolist()), pair
        assert (np.diff(pos) > 0).all()


def expected(ctx, budget, n=N):
    """Entries: of all pairs the protected tokens, and the budget's share of the other tokens."""
    return reference.budget_entries(budget, n - (END - FIRST), len(ctx.pairs()), 4, 32) + (END - FIRST) * len(ctx.pairs())


@pytest.mark.parametrize("type_kv", ["f16", "q8_0"])
def test_what_is_held(path, rng, type_kv):
    """Twice: the second selection starts from ragged heads."""
    with engine.Model(path, engine.params(**SETTINGS)) as model, engine.Context(model, n_ctx=1024, type_k=type_kv) as ctx:
        seen = 0
        for n in (N, 200):
            ctx.decode(rng.integers(3, 512, n))
            seen += n
            ctx.compress()
            assert_protected(ctx)
            assert ctx.stats().entries_held == expected(ctx, "20%", seen)


@pytest.mark.parametrize("policy", sorted(set(engine.policies()) - {"off", "full", "custom", "retention", "lukv"}))
def test_every_policy(toy, rng, policy):
    tokens = rng.integers(3, 512, N)
    with engine.Model(toy(), engine.params(**SETTINGS | {"policy": policy})) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(tokens)
        ctx.compress()
        assert_protected(ctx)
        assert ctx.stats().entries_held <= expected(ctx, "20%")


def test_the_others_are_the_best(toy, rng):
    """Of all heads, by the scores that the engine itself compares."""
    with engine.Model(toy(), engine.params(**SETTINGS | {"policy": "laprox:global-raw"})) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(rng.integers(3, 512, N))
        ctx.score()
        scores = {pair: ctx.finished_scores(*pair) for pair in ctx.pairs()}
        ctx.compress()
        kept, gone = [], []
        for pair, pos in ctx.held().items():
            ranked = ~np.isnan(scores[pair])
            assert not ranked[FIRST:END].any() and ranked.sum() == N - 4 - 32 - (END - FIRST)
            stays = np.isin(np.arange(N), pos)
            kept += scores[pair][ranked & stays].tolist()
            gone += scores[pair][ranked & ~stays].tolist()
        assert kept and gone and min(kept) >= max(gone)


def test_where_they_reach_beyond_what_was_seen(toy, rng):
    with engine.Model(toy(), engine.params(budget="20%", protect="350-900")) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(rng.integers(3, 512, N))
        ctx.compress()
        assert all(set(range(350, N)) <= set(pos.tolist()) for pos in ctx.held().values())
        n_pairs = len(ctx.pairs())
        assert ctx.stats().entries_held == reference.budget_entries("20%", 350, n_pairs, 4, 32) + 50 * n_pairs


def test_bytes_are_a_limit_for_them_too(toy, rng):
    """A budget in bytes holds whatever is protected; one that they don't fit in is refused, and nothing is lost."""
    with engine.Model(toy(), engine.params(**SETTINGS)) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(rng.integers(3, 512, N))
        full = ctx.stats().kv_bytes
        ctx.set_params(engine.params(**SETTINGS | {"budget": f"{full // 2 // 1024}KiB"}))
        ctx.compress()
        assert_protected(ctx)
        assert ctx.stats().kv_bytes <= full // 2
        ctx.set_params(engine.params(**SETTINGS | {"budget": "200KiB"}))
        with pytest.raises(engine.Refused, match="sink, recent and protect"):
            ctx.compress()
        assert_protected(ctx)


def test_a_prompt_that_is_compressed_while_it_comes_in(toy, rng):
    kv = engine.params(**SETTINGS | {"prefill": "chunked"})
    with engine.Model(toy(), kv) as model, engine.Context(model, n_ctx=2048, n_batch=128) as ctx:
        ctx.decode(rng.integers(3, 512, 1500))
        ctx.compress()
        assert ctx.stats().compressions > 1
        assert_protected(ctx)


def test_later_turns(path, rng):
    """Recall brings others back and takes others away; a range that is protected from now on comes back whole."""
    settings = SETTINGS | {"archive": "ram"}
    with engine.Model(path, engine.params(**settings)) as model, engine.Context(model, n_ctx=2048) as ctx:
        for n in (N, 60, 90):
            ctx.decode(rng.integers(3, 512, n))
            again = ctx.prompt_done()
            assert again is None or again > 0
            assert_protected(ctx)
        ctx.set_params(engine.params(**settings | {"protect": "100-140"}))
        ctx.decode(rng.integers(3, 512, 40))
        ctx.compress()
        assert all(set(range(100, 140)) <= set(pos.tolist()) for pos in ctx.held().values())


def test_several_ranges(toy, rng):
    """With what is left between them, and a policy that would keep none of it."""
    ranges = {"protect": "60-70,5-20,300-301"}
    with engine.Model(toy(), engine.params(budget="15%", policy="streaming", **ranges)) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(rng.integers(3, 512, N))
        ctx.compress()
        protected = {*range(5, 20), *range(60, 70), 300}
        n_pairs = len(ctx.pairs())
        assert ctx.stats().entries_held == (reference.budget_entries("15%", N - 26, n_pairs, 4, 32)) + 26 * n_pairs
        assert all(protected | set(range(4)) <= set(pos.tolist()) for pos in ctx.held().values())


def test_a_score_of_never_does_not_reach_them(toy, rng):
    with engine.Model(toy(), engine.params(**SETTINGS | {"policy": "custom"})) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(rng.integers(3, 512, N))
        ctx.set_scorer(lambda pos, *_: np.where(pos % 3 == 0, -np.inf, pos).astype(np.float32))
        ctx.compress()
        assert_protected(ctx)
        assert all((pos[(pos >= END) & (pos < N - 32)] % 3 > 0).all() for pos in ctx.held().values())


@pytest.mark.parametrize("protect, reason", [("0-500", "accepted: a larger context, or fewer that are protected"), ("0-5000", "no room for 64 more tokens")])
def test_more_than_a_context_has_room_for(toy, rng, protect, reason):
    """Refused where it would grow for ever; what is held stays."""
    with engine.Model(toy(), engine.params(budget="5%", protect=protect)) as model, engine.Context(model, n_ctx=512, n_batch=64) as ctx:
        with pytest.raises(engine.Refused):
            ctx.decode(rng.integers(3, 512, 1000))
        assert reason in engine.last_error()
        assert ctx.stats().entries_held <= 512 * len(ctx.pairs())
        ctx.set_params(engine.params(budget="20%"))
        ctx.decode(rng.integers(3, 512, 64))


@pytest.mark.parametrize("text", ["5", "9-3", "0-", "0-3,", "0-9999999999"])
def test_no_ranges(text):
    with pytest.raises(engine.Refused, match='protect is ".*"; accepted: positions FIRST-END, such as 0-300 or 0-20,80-300'):
        engine.params(protect=text)


def test_of_a_request_only(toy, rng):
    """Of two sequences one protects a range, beside a byte budget of its own."""
    settings = {"budget": "1900KiB", "window": 16}
    with engine.Model(toy(), engine.params(**settings)) as model, engine.Context(model, n_ctx=1024, n_seq_max=2) as ctx:
        ctx.set_seq_params(1, engine.params(**settings | {"budget": "950KiB", "protect": f"{FIRST}-{END}"}))
        for seq in (0, 1):
            ctx.decode(rng.integers(3, 512, N), seq=seq)
            ctx.compress(seq)
        both = [ctx.stats(seq).kv_bytes for seq in (0, 1)]
        assert all(n <= 950 * 1024 for n in both), both
        assert all(set(range(FIRST, END)) <= set(pos.tolist()) for pos in ctx.held(1).values())
        assert not all(set(range(FIRST, END)) <= set(pos.tolist()) for pos in ctx.held(0).values())
