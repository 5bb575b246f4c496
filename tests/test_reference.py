"""The oracle itself: the NumPy forward pass against llama.cpp without flash attention, in which nothing is float16."""

import engine
import numpy as np
import pytest
import reference


@pytest.mark.parametrize(
    "arch, changes, tolerance",
    [
        ("llama", {}, 1e-4),
        ("llama", {"n_head": 4, "n_head_kv": 1, "head_dim": 128, "n_embd": 128}, 1e-4),
        ("gemma2", {}, 2e-3),  # GELU goes through a float16 table
        ("lfm2", {}, 1e-4),
    ],
)
def test_forward_pass(toy, rng, arch, changes, tolerance):
    path = toy(arch, **changes)
    tokens = rng.integers(3, 512, 200)
    with engine.Model(path) as model, engine.Context(model, flash_attn=False, n_ubatch=64) as ctx:
        logits = np.concatenate([ctx.decode(tokens, all_logits=True), ctx.decode(tokens[:3], all_logits=True)])
    net = reference.Network(path)
    expected = np.concatenate([net.decode(tokens), net.decode(tokens[:3])])
    assert 1 < logits.std() < 4
    assert np.abs(logits - expected).max() < tolerance


def test_attention_of_the_toy_is_worth_evicting_from(toy, rng):
    """A few entries carry most of a head's attention, and not the same ones in every head."""
    net = reference.Network(toy(), n_queries=32)
    net.decode(rng.integers(3, 512, 300))
    best = []
    for il, h in net.pos:
        a = reference.softmax(reference.attention_logits(net.q[il][:, h * 4], net.k[il, h], np.ones((32, 300), bool), net.scale))
        assert np.sort(a, axis=1)[:, -30:].sum(1).mean() > 0.7
        best.append(set(np.argsort(a.sum(0))[-30:]))
    assert all(len(x & y) < 20 for i, x in enumerate(best) for y in best[:i])


def test_selection_by_hand():
    """Six candidates, small enough to follow on paper."""
    held = {(0, 0): np.arange(6), (0, 1): np.arange(6)}
    raw = {(0, 0): np.array([9, 7, 0, 0, 0, 9.0]), (0, 1): np.array([9, 0, 0, 0, 14, 9.0])}
    # sink 1, recent 1: positions 1..4 are candidates; the pools of four neighbours are all equal: 1 and 2 per entry
    kept = reference.select(held, raw, tokens_seen=6, budget="75%", sink=1, recent=1)
    assert [kept[0, 0].tolist(), kept[0, 1].tolist()] == [[0, 4, 5], [0, 1, 2, 3, 4, 5]]
    kept = reference.select(held, raw, tokens_seen=6, budget="60%", sink=1, recent=1, policy="streaming")
    assert [kept[0, 0].tolist(), kept[0, 1].tolist()] == [[0, 3, 4, 5], [0, 4, 5]]
