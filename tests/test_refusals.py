"""What can't be done is refused with a reason, and nothing is half done."""

import ctypes as c

import engine
import numpy as np
import pytest
import worker
from gguf_factory import truncate


@pytest.mark.parametrize(
    "text, unit, value",
    [
        ("5%", engine.FRACTION, 0.05),
        ("100%", engine.FRACTION, 1.0),
        ("0.05", engine.FRACTION, 0.05),
        ("2.5%", engine.FRACTION, 0.025),
        ("2048", engine.TOKENS, 2048),
        ("512MiB", engine.BYTES, 512 * 2**20),
        ("64KiB", engine.BYTES, 64 * 2**10),
        ("1.5GiB", engine.BYTES, 1.5 * 2**30),
        ("500kB", engine.BYTES, 500e3),
        ("20MB", engine.BYTES, 20e6),
        ("2GB", engine.BYTES, 2e9),
    ],
)
def test_budgets(text, unit, value):
    budget = engine.parse_budget(text)
    assert budget.unit == unit and budget.value == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("text", ["0", "0%", "0.0", "-3%", "-5", "abc", "", " ", "5%%", "%", "120%", "nan", "inf", "1e400", "5 apples", "-1MiB", "0MiB", "5TB5"])
def test_no_budgets(text):
    with pytest.raises(engine.Refused) as refused:
        engine.parse_budget(text)
    assert text.strip() in str(refused.value)


def broken_params():
    def change(**fields):
        p = engine.params()
        for name, value in fields.items():
            setattr(p, name, value)
        return p

    budget = engine.LaproxBudget
    yield "policy", "nonesuch", change(policy=b"nonesuch")
    yield "no policy", "policy", change(policy=None)
    yield "budget 0", "0", change(budget=budget(engine.FRACTION, 0.0))
    yield "budget above 1", "2", change(budget=budget(engine.FRACTION, 2.0))
    yield "negative tokens", "-5", change(budget=budget(engine.TOKENS, -5))
    yield "negative bytes", "-5", change(budget=budget(engine.BYTES, -5))
    yield "tokens below the protected", "36", change(budget=budget(engine.TOKENS, 35))
    yield "not a number", "nan", change(budget=budget(engine.TOKENS, float("nan")))
    yield "unknown unit", "unit", change(budget=budget(7, 1.0))
    yield "window 0", "window", change(window=0)
    yield "window < 0", "window", change(window=-1)
    yield "sink < 0", "sink", change(sink=-1)
    yield "recent 0", "recent", change(recent=0)
    yield "min_tokens < 0", "min_tokens", change(min_tokens=-1)
    yield "prefill", "prefill", change(prefill=9)


@pytest.mark.parametrize("word, params", [pytest.param(w, p, id=name) for name, w, p in broken_params()])
def test_settings_out_of_range(toy, rng, word, params):
    """By model and by context; both go on with what they had."""
    with engine.Model(toy(), engine.params(budget="50%")) as model:
        with pytest.raises(engine.Refused, match=word):
            model.set_params(params)
        with engine.Context(model) as ctx:
            with pytest.raises(engine.Refused, match=word):
                ctx.set_params(params)
            assert ctx.get_params().budget.value == 0.5
            ctx.decode(rng.integers(3, 512, 100))
            ctx.compress()
            assert ctx.stats().entries_held == 50 * 6


def test_unknown_policy_names_the_known(toy):
    with engine.Model(toy()) as model:
        with pytest.raises(engine.Refused) as refused:
            model.set_params(engine.params(policy="nonesuch"))
    assert all(name in str(refused.value) for name in engine.policies())


def test_policies_are_listed():
    assert {"full", "streaming", "laprox"} <= set(engine.policies())
    assert engine.laprox("api_version") == 3
    p = engine.laprox("default_params")
    assert (p.policy, p.window, p.sink, p.recent, p.min_tokens, p.prefill) == (b"laprox", 32, 4, 32, 512, engine.DENSE)
    assert (p.budget.unit, p.budget.value) == (engine.FRACTION, 0.2)


@pytest.mark.parametrize("arch, reason", [("alibi", "(?i)alibi"), ("embedder", "(?i)embedding|causal|cache"), ("mamba", "(?i)attention"), ("sinks", "(?i)sinks")])
def test_models_that_cannot_be_compressed(toy, arch, reason):
    """The reason, and a model that still works as it did."""
    with engine.Model(toy(arch)) as model:
        with pytest.raises(engine.Refused, match=reason):
            model.check()
        with pytest.raises(engine.Refused, match=reason):
            model.set_params(engine.params())
        with engine.Context(model, n_ctx=128, embeddings=arch == "embedder"):
            pass


def test_models_that_can(toy):
    for arch in ("llama", "gemma2", "lfm2"):
        with engine.Model(toy(arch)) as model:
            model.check()


def test_flash_attention_off(toy):
    with engine.Model(toy(), engine.params()) as model:
        with pytest.raises(engine.Refused):
            engine.Context(model, flash_attn=False)
        assert "flash attention" in engine.last_error().lower()
        with engine.Context(model) as ctx:  # and with it on all is well
            ctx.decode([5, 6])


def test_budget_larger_than_the_context(toy):
    with engine.Model(toy(), engine.params(budget="2048")) as model:
        with pytest.raises(engine.Refused):
            engine.Context(model, n_ctx=512)
        assert "2048" in engine.last_error() and "512" in engine.last_error()
    with engine.Model(toy(), engine.params(budget="100")) as model, engine.Context(model, n_ctx=512) as ctx:
        with pytest.raises(engine.Refused, match="2048"):
            ctx.set_params(engine.params(budget="2048"))


def test_byte_budget_below_the_protected_entries(toy, rng):
    """Can't be met without evicting what is promised to stay: refused, evicting nothing."""
    with engine.Model(toy(), engine.params(budget="4KiB")) as model:
        with engine.Context(model) as ctx:
            ctx.decode(rng.integers(3, 512, 200))
            with pytest.raises(engine.Refused, match="4"):
                ctx.compress()
            assert ctx.stats().entries_held == 1200


def test_prefill_of_a_live_context(toy):
    with engine.Model(toy(), engine.params()) as model, engine.Context(model) as ctx:
        with pytest.raises(engine.Refused, match="prefill"):
            ctx.set_params(engine.params(prefill=engine.CHUNKED))


def test_a_token_of_several_sequences(toy, rng):
    """A shared prompt in one batch: each sequence has its own entries here, so it is refused and nothing is cached."""
    with engine.Model(toy(), engine.params()) as model, engine.Context(model, n_seq_max=2, kv_unified=True) as ctx:
        with pytest.raises(engine.Refused):
            ctx.submit([(5, 0, (0, 1)), (6, 1, (0, 1))])
        assert ctx.stats(-1).tokens_seen == 0
        ctx.decode([5, 6])
        assert ctx.stats(0).tokens_seen == 2


def test_truncated_file(toy, tmp_path):
    for fraction in (0.001, 0.3, 0.95):
        with pytest.raises(engine.Refused):
            engine.Model(truncate(toy(), tmp_path / "part.gguf", fraction), engine.params())


def test_asking_about_what_is_not_there(toy, rng):
    """Sequences, layers and heads out of range, an empty sequence, buffers too small."""
    with engine.Model(toy(), engine.params()) as model, engine.Context(model, n_seq_max=2) as ctx:
        ctx.decode(rng.integers(3, 512, 50))
        for seq, il, head in [(7, 0, 0), (-2, 0, 0), (0, 99, 0), (0, -1, 0), (0, 0, 2), (0, 0, -1)]:
            with pytest.raises(engine.Refused):
                ctx.positions(il, head, seq)
        for seq in (7, -2):
            with pytest.raises(engine.Refused):
                ctx.compress(seq)
            with pytest.raises(engine.Refused):
                ctx.stats(seq)
            with pytest.raises(engine.Refused):
                ctx.score(seq)
        assert len(ctx.positions(0, 0, 1)) == 0 and ctx.stats(1).entries_held == 0
        ctx.compress(1)
        few = np.full(60, -7, np.int32)
        assert engine.laprox("positions", ctx.handle, 0, 0, 0, few.ctypes.data_as(c.POINTER(c.c_int32)), 10) == 50
        assert few[:10].tolist() == list(range(10)) and (few[10:] == -7).all()
        rows = np.full((60, 64), -7, np.float32)
        pointer = rows.ctypes.data_as(c.POINTER(c.c_float))
        assert engine.laprox("entries", ctx.handle, 0, 0, 0, pointer, None, 49) == 50
        assert (rows == -7).all()
        assert engine.laprox("entries", ctx.handle, 0, 0, 0, pointer, None, 50) == 50
        assert (rows[:50] != -7).all() and (rows[50:] == -7).all()
        assert ctx.stats().entries_held == 50 * 6


def test_a_reason_is_not_kept_for_the_next_success(toy):
    with engine.Model(toy()) as model:
        with pytest.raises(engine.Refused):
            model.set_params(engine.params(policy="nonesuch"))
        assert engine.last_error()
        model.set_params(engine.params())
        assert engine.last_error() == ""


def test_training(toy):
    """Gradients can't flow through flash attention: refused, and the context goes on."""
    with engine.Model(toy(n_layer=1), engine.params()) as model, engine.Context(model, n_ctx=256, n_batch=256) as ctx:
        ctx.train()
        assert "trained" in engine.last_error()
        assert ctx.decode([5, 6]).size == model.n_vocab


def test_flash_attention_auto(toy, rng, stock):
    """llama.h's default: on where a policy needs it."""
    path, tokens = toy(), rng.integers(3, 512, 300).tolist()
    context = {"type_k": "f16", "flash_attn": None}
    ours = worker.run_steps(path, [["decode", tokens]], context, {"policy": "full"})[0]
    assert np.abs(ours - stock(path, [["decode", tokens]], **context)[0]).max() < 1e-3
