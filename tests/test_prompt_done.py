"""When a prompt is compressed: laprox_prompt_done(), one rule for Python and llama-server."""

import engine
import numpy as np
import pytest

PAIRS = 2  # (layer, KV head) pairs of the model


@pytest.fixture
def open_context(toy):
    """open_context(n_ctx=2048, **settings): a context of a small model whose prompts stay exact up to 64 tokens."""
    opened = []

    def open(n_ctx=2048, n_batch=128, **settings):
        model = engine.Model(toy(n_layer=1), engine.params(**{"budget": "100", "min_tokens": 64, **settings}))
        ctx = engine.Context(model, n_ctx=n_ctx, n_batch=n_batch)
        opened.extend((ctx, model))
        return ctx

    yield open
    for one in opened:
        one.close()


def whole(ctx):
    return ctx.stats().entries_held == ctx.stats().tokens_seen * PAIRS


@pytest.mark.parametrize("n, compressions", [(64, 0), (101, 1)])
def test_a_prompt(open_context, rng, n, compressions):
    ctx = open_context()
    ctx.decode(rng.integers(3, 512, n))
    assert ctx.stats().compressions == 0
    ctx.prompt_done()
    assert ctx.stats().compressions == compressions and whole(ctx) == (compressions == 0)


def test_follow_ups_stay_exact_until_they_are_more_than_min_tokens(open_context, rng):
    ctx = open_context()
    ctx.decode(rng.integers(3, 512, 300))
    ctx.prompt_done()
    for n, compressions in ((30, 1), (34, 1), (1, 2), (64, 2), (1, 3)):
        ctx.decode(rng.integers(3, 512, n))
        ctx.prompt_done()
        assert ctx.stats().compressions == compressions


def test_what_is_asked_for_is_done(open_context, rng):
    """laprox_compress() is no rule."""
    ctx = open_context()
    ctx.decode(rng.integers(3, 512, 300))
    ctx.prompt_done()
    ctx.decode(rng.integers(3, 512, 10))
    ctx.prompt_done()
    assert ctx.stats().compressions == 1
    ctx.compress()
    assert ctx.stats().compressions == 2 and ctx.stats().entries_held == 100 * PAIRS


@pytest.mark.parametrize("end", [1, 20])
def test_the_end_of_a_prompt_that_was_compressed_while_it_came_in_has_its_say(open_context, rng, end):
    """Also where it is short, and where it looks like a token that was generated."""
    ctx = open_context(prefill="chunked", n_batch=32)
    tokens = rng.integers(3, 512, 800).tolist()
    while ctx.stats().compressions < 2:  # the last time, for a batch that is shorter than min_tokens
        ctx.decode([tokens.pop() for _ in range(32)])
    ctx.decode([tokens.pop() for _ in range(end)])
    early = ctx.stats().compressions
    ctx.prompt_done()
    assert ctx.stats().compressions == early + 1 and ctx.stats().entries_held == 100 * PAIRS
    ctx.decode(tokens[:20])  # which was that prompt's
    ctx.prompt_done()
    assert ctx.stats().compressions == early + 1


def test_a_follow_up_of_a_long_generation_stays_exact(open_context, rng):
    """The generation was compressed by itself: what came since is what counts, not what came since the prompt."""
    ctx = open_context()
    ctx.decode(rng.integers(3, 512, 300))
    ctx.prompt_done()
    while ctx.stats().compressions < 2:
        ctx.decode(rng.integers(3, 512, 1))
    ctx.decode(rng.integers(3, 512, 1))
    ctx.decode(rng.integers(3, 512, 20))
    ctx.prompt_done()
    assert ctx.stats().compressions == 2


@pytest.mark.parametrize("n", [20, 300])
def test_what_is_generated_after_any_prompt_is_bounded(open_context, rng, n):
    """Also after one that is left alone."""
    ctx = open_context()
    ctx.decode(rng.integers(3, 512, n))
    ctx.prompt_done()
    for token in rng.integers(3, 512, 900):
        ctx.decode([token])
        assert ctx.stats().entries_held <= (max(n, 100) + 256 + 64) * PAIRS
    assert ctx.stats().compressions >= 2


def test_a_state_carries_what_the_rule_needs(open_context, rng):
    ctx = open_context()
    ctx.decode(rng.integers(3, 512, 300))
    ctx.prompt_done()
    ctx.decode(rng.integers(3, 512, 40))
    state = ctx.seq_save()
    for n, compressed in ((20, False), (30, True)):
        assert ctx.seq_load(state)
        before = ctx.stats().compressions
        ctx.decode(rng.integers(3, 512, n))
        ctx.prompt_done()
        assert (ctx.stats().compressions > before) == compressed


def test_refused(open_context, rng):
    """Where there is nothing, or no such sequence."""
    with pytest.raises(engine.Refused, match="sequence 3 doesn't exist"):
        open_context().prompt_done(3)


@pytest.mark.parametrize("archive", ["ram", "off"])
@pytest.mark.parametrize("seed", range(4))
def test_after_any_turns_the_budget_holds(open_context, archive, seed):
    """Whatever was gone back to, and however long the prompts are: the budget's 100 tokens and an exact turn, of min_tokens at most."""
    rng = np.random.default_rng(seed)
    ctx = open_context(archive=archive, window=32)
    text = []
    for _ in range(25):
        keep = int(rng.integers(0, len(text) + 1)) if rng.random() < 0.5 else len(text)
        if not ctx.seq_rm(0, keep, -1):
            ctx.clear()
            keep = 0
        del text[keep:]
        text += rng.integers(3, 512, int(rng.choice([1, 20, 90, 300]))).tolist()
        if len(text) > 1700:
            ctx.clear()
            text, keep = [3] * 10, 0
        ctx.decode(text[keep:])
        while (again := ctx.prompt_done(most=512)) is not None:
            ctx.decode(text[again:])
        assert ctx.stats().tokens_seen == len(text)
        assert ctx.stats().entries_held <= PAIRS * (100 + 64)
