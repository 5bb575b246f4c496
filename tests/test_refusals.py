"""What can't be done is refused with a reason, and nothing is half done."""

import ctypes as c

import engine
import numpy as np
import pytest
import worker
from gguf_factory import truncate


@pytest.mark.parametrize(
    "name, text",
    [
        ("policy", "nonesuch"), ("policy", ""), ("policy", "snapkv:nobody"), ("policy", "nobody:ada"), ("policy", "snapkv:ada:ada"),
        ("policy", "snapkv:cake"), ("policy", "custom"), ("policy", "custom:ada"), ("budget", "0"), ("budget", "-5"), ("budget", "120%"),
        ("window", "0"), ("window", "1025"), ("sink", "-1"), ("recent", "0"), ("min_tokens", "-1"), ("prefill", "lazy"), ("floor", "1.1"),
    ],
)  # fmt: skip
def test_settings_out_of_range(name, text):
    """Named as the user knows them; what was set before stays."""
    for before, spelled in (("", name), ("kv_", f"kv_{name}"), ("--kv-", f"--kv-{name}".replace("_", "-"))):
        params = engine.Params(before_names=before)
        with pytest.raises(engine.Refused) as refused:
            params.set(name, text)
        message = str(refused.value)
        assert message.startswith(f'{spelled} is "{text}"')
        assert message.endswith("; accepted: " + engine.options()[name].accepted.decode())
        assert params.get(name) == engine.options()[name].initial.decode()


def test_what_stands_where_none_is_given_can_be_given():
    params = engine.Params()
    for name, row in engine.options().items():
        assert params.get(name) == row.initial.decode()
        params.set(name, row.initial.decode())
        params.set(name, None)
        assert params.get(name) == row.initial.decode()
    params.check()


def test_a_budget_smaller_than_what_is_never_evicted(toy, rng):
    """Without a model, by model and by context; both go on with what they had."""
    params = engine.params(budget="35")
    for wrong in (params.check, lambda: engine.Model(toy(), params)):
        with pytest.raises(engine.Refused, match='^budget is "35" .less than the 36 tokens .*sink 4 and recent 32.*accepted: at least 36'):
            wrong()
    engine.params(budget="36").check()
    engine.params(budget="35", policy="full").check()
    engine.params(budget="8", sink=4, recent=4).check()
    with engine.Model(toy(), engine.params(budget="50%")) as model:
        with pytest.raises(engine.Refused, match="never evicted"):
            model.set_params(params)
        with engine.Context(model) as ctx:
            with pytest.raises(engine.Refused, match="never evicted"):
                ctx.set_params(params)
            assert ctx.get_params().get("budget") == "50%"
            ctx.decode(rng.integers(3, 512, 100))
            ctx.compress()
            assert ctx.stats().entries_held == 50 * 6


def test_off(toy):
    """Stock llama.cpp for contexts to come; a live one keeps its layout."""
    with engine.Model(toy(), engine.params()) as model, engine.Context(model) as ctx:
        with pytest.raises(engine.Refused, match='policy is "off".*accepted: full'):
            ctx.set_params(engine.params(policy="off"))
        assert ctx.get_params().get("policy") == "laprox"
        model.set_params(engine.params(policy="off"))
        with engine.Context(model) as stock, pytest.raises(engine.Refused, match="without the compressing cache"):
            stock.get_params()


def test_unknown_policy_names_the_known():
    with pytest.raises(engine.Refused) as refused:
        engine.params(policy="nonesuch")
    names = [*engine.policies(), *engine.scorers(), *engine.allocators(), "off"]
    assert all(name in str(refused.value) for name in names if name != "custom")


def test_policies_are_listed():
    assert {"full", "streaming", "laprox"} <= set(engine.policies())
    assert engine.laprox("api_version") == 4


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


def test_a_draft_model_that_reads_the_cache_of_its_target(toy):
    with engine.Model(toy("gemma4")) as model, engine.Model(toy("gemma4_assistant")) as draft:
        with engine.Context(model) as target, engine.Context(draft, other=target):
            pass
        model.set_params(engine.params())
        with engine.Context(model) as target:
            with pytest.raises(engine.Refused):
                engine.Context(draft, other=target)
            assert "the draft model reads the cache" in engine.last_error()


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
            ctx.set_params(engine.params(prefill="chunked"))


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
