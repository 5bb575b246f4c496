"""Off is stock llama.cpp to the bit; full is stock llama.cpp within rounding; streaming is stock after seq_rm."""

import devices
import engine
import numpy as np
import pytest
import worker


@pytest.mark.parametrize(
    "arch, context",
    [
        ("llama", {"type_k": "f16"}),
        ("llama", {"type_k": "q8_0", "n_seq_max": 2, "kv_unified": True}),
        ("llama", {"type_k": "f16", "flash_attn": False, "n_seq_max": 2}),
        ("gemma2", {"type_k": "f16"}),
        ("lfm2", {"type_k": "f16", "n_seq_max": 2}),
    ],
)
def test_off_is_bit_identical(toy, rng, stock, arch, context):
    path, tokens = toy(arch), rng.integers(3, 512, 300).tolist()
    context = dict(context, n_ctx=1024, n_ubatch=64)
    steps = [["decode", tokens], ["greedy", 5, 30], ["save"]]
    if context.get("n_seq_max"):
        steps += [["decode", tokens[:90], 1], ["greedy", 7, 10, 1], ["seq_save", 1]]
    if arch == "llama":
        steps += [["seq_rm", 0, 100, 200], ["greedy", 9, 10]]
    steps += [["clear"], ["decode", tokens[100:120]]]
    for theirs, ours, step in zip(stock(path, steps, **context), worker.run_steps(path, steps, context), steps):
        assert np.array_equal(theirs, ours), step[0]


def test_off_again(toy, rng, stock):
    """Taking the settings back gives the stock cache back."""
    path, tokens = toy(), rng.integers(3, 512, 100).tolist()
    with engine.Model(path, engine.params()) as model:
        with engine.Context(model, type_k="f16") as ctx:
            assert ctx.get_params().get("window") == "32"
        model.set_params(None)
        with engine.Context(model, type_k="f16") as ctx:
            ours = ctx.decode(tokens, all_logits=True)
            with pytest.raises(engine.Refused):
                ctx.get_params()
            with pytest.raises(engine.Refused):
                ctx.compress()
    assert np.array_equal(ours, stock(path, [["decode", tokens]], type_k="f16")[0])


@pytest.mark.parametrize("kv", [{"policy": "full"}, {"policy": "laprox", "budget": "100%"}], ids=["full", "100%"])
@pytest.mark.parametrize("type_k", ["f16", "q8_0"])
def test_everything_kept_is_stock(toy, rng, stock, type_k, kv):
    """1,000 tokens: a prompt, a compression that evicts nothing, and an answer, token for token."""
    path, tokens = toy(), rng.integers(3, 512, 600).tolist()
    context = {"n_ctx": 1024, "n_ubatch": 128, "type_k": type_k}
    prompt, answer = ["decode", tokens], ["greedy", 5, 400]
    theirs = stock(path, [prompt, answer], **context)
    prompted, _, answered, stats = worker.run_steps(path, [prompt, ["compress"], answer, ["stats"]], context, kv)
    for a, b in zip(theirs, (prompted, answered)):
        assert np.abs(a - b).max() < 1e-3
        assert np.array_equal(a.argmax(1), b.argmax(1))
    assert stats["entries_held"] == stats["entries_full"] == 1000 * 6


@pytest.mark.parametrize("type_k, typical, worst", [("f32", 1e-4, 1e-3), ("q8_0", 5e-4, 5e-2)])
def test_streaming_is_stock_after_seq_rm(toy, rng, stock, type_k, typical, worst):
    """Budget 30 % of 400 tokens: 120 per head, 4 of them sinks.

    Stock llama.cpp puts new tokens into the holes, so it adds in another order; in a quantised cache a last bit
    sometimes becomes another code.
    """
    if devices.ROUNDS:
        typical = worst = devices.TOLERANCE
    path, tokens = toy(), rng.integers(3, 512, 400).tolist()
    # flash attention casts an F32 cache to F16 in stock llama.cpp, so that one is compared without it
    context = {"n_ctx": 512, "n_ubatch": 128, "type_k": type_k}
    reference_context = dict(context, flash_attn=type_k != "f32")
    answer = [["greedy", 5, 60], ["decode", tokens[100:130]]]
    theirs = stock(path, [["prompt", tokens], ["seq_rm", 0, 4, 400 - 116], *answer], **reference_context)[2:]
    kv = {"policy": "streaming", "budget": "30%"}
    ours = worker.run_steps(path, [["prompt", tokens], ["compress"], ["held"], *answer], context, kv)
    for held in ours[2].values():
        assert held.tolist() == [*range(4), *range(284, 400)]
    for a, b in zip(theirs, ours[3:]):
        error = np.abs(a - b).max(1)
        assert np.median(error) < typical and error.max() < worst
