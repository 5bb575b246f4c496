"""After an eviction the model computes what a forward pass with per-head masks computes."""

import copy

import engine
import gguf_factory
import numpy as np
import pytest
import reference
from devices import TOLERANCE


def evict(net, ctx, seq=0):
    """Give the NumPy model the entries that the engine holds."""
    for pair, pos in ctx.held(seq).items():
        net.keep(*pair, pos)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"n_head": 4, "n_head_kv": 4, "head_dim": 128},
        {"n_head": 4, "n_head_kv": 1},
        {"n_head": 16, "n_head_kv": 8, "n_layer": 2},
    ],
    ids=["gqa", "mha", "mqa", "8-kv-heads"],
)
def test_prompt_turns_and_a_second_compression(toy, rng, shape):
    path = toy(**shape)
    net = reference.Network(path)
    with engine.Model(path, engine.params(budget="15%")) as model, engine.Context(model, n_ctx=1024, n_ubatch=128) as ctx:
        for n in (300, 1, 70, 1, 200, 5):
            tokens = rng.integers(3, 512, n)
            error = np.abs(ctx.decode(tokens, all_logits=True) - net.decode(tokens)).max()
            assert error < TOLERANCE
            if n >= 70:  # after the prompt, a turn, and another
                ctx.compress()
                evict(net, ctx)
        assert ctx.stats().compressions == 3
        evicted = 1 - ctx.stats().entries_held / ctx.stats().entries_full
        assert evicted > 0.7


def test_eviction_changes_the_answer(toy, rng):
    """The tests above compare equals; this one knows that they can differ."""
    path, tokens = toy(), rng.integers(3, 512, 400)
    net = reference.Network(path)
    net.decode(tokens)
    with engine.Model(path, engine.params(budget="10%")) as model, engine.Context(model) as ctx:
        ctx.decode(tokens)
        ctx.compress()
        full, evicted = copy.deepcopy(net), copy.deepcopy(net)
        evict(evicted, ctx)
        got = ctx.decode([5])
        assert np.abs(got - evicted.decode([5])[0]).max() < TOLERANCE
        assert np.abs(got - full.decode([5])[0]).max() > 1


def test_queries_attend_before_they_evict(toy, rng):
    """The token that triggers an eviction still sees everything; the next one doesn't. Positions are not renumbered."""
    path, tokens = toy(), rng.integers(3, 512, 200)
    net = reference.Network(path)
    expected = net.decode(tokens)[-1]
    with engine.Model(path, engine.params(budget="20%")) as model, engine.Context(model) as ctx:
        logits = ctx.decode(tokens)
        ctx.compress()
        assert np.abs(logits - expected).max() < TOLERANCE
        evict(net, ctx)
        assert ctx.pos_max() == 199 and ctx.stats().tokens_seen == 200
        assert np.abs(ctx.decode([7]) - net.decode([7], [200])[0]).max() < TOLERANCE


@pytest.mark.parametrize("kv_unified", [False, True])
def test_sequences_at_once(toy, rng, kv_unified):
    """Three sequences in shared batches: one compressed twice, one once, one never."""
    path = toy()
    with engine.Model(path, engine.params(budget="20%")) as model:
        with engine.Context(model, n_ctx=1536, n_seq_max=3, n_ubatch=48, kv_unified=kv_unified) as ctx:
            nets = [reference.Network(path) for _ in range(3)]

            def together(n):
                """n tokens for each sequence, interleaved in one batch."""
                tokens = rng.integers(3, 512, (n, 3))
                start = [len(net.q_pos) and net.q_pos[-1] + 1 for net in nets]
                batch = [(int(tokens[i, s]), start[s] + i, (s,)) for i in range(n) for s in range(3)]
                got = ctx.submit(batch, range(3 * n))
                for s, net in enumerate(nets):
                    assert np.abs(got[s::3] - net.decode(tokens[:, s])).max() < TOLERANCE

            for s, n in enumerate((300, 120, 200)):
                tokens = rng.integers(3, 512, n)
                assert np.abs(ctx.decode(tokens, s) - nets[s].decode(tokens)[-1]).max() < TOLERANCE
            together(20)
            for compressed in ([0], [0, 1], []):
                untouched = {s: ctx.held(s) for s in range(3) if s not in compressed}
                for s in compressed:
                    ctx.compress(s)
                    evict(nets[s], ctx, s)
                for s, held in untouched.items():
                    assert all(np.array_equal(held[p], pos) for p, pos in ctx.held(s).items())
                together(1)
                together(30)
            assert ctx.stats(2).entries_held == ctx.stats(2).entries_full
            totals = [ctx.stats(s) for s in range(3)]
            for name in ("tokens_seen", "entries_held", "entries_full", "kv_bytes_full"):
                assert getattr(ctx.stats(-1), name) == sum(getattr(t, name) for t in totals)


@pytest.mark.parametrize("type_k, type_v", [("f16", "f16"), ("bf16", "bf16"), ("q8_0", "q8_0"), ("q4_0", "q4_0"), ("q8_0", "f16")])
def test_entries_move_without_being_touched(toy, rng, type_k, type_v):
    """Compaction copies rows bit for bit, whatever their type, and rows stay with their positions."""
    with engine.Model(toy(), engine.params(budget="30%")) as model, engine.Context(model, n_ctx=1024, type_k=type_k, type_v=type_v) as ctx:
        for n in (400, 150):
            ctx.decode(rng.integers(3, 512, n))
            before = {pair: ctx.entries(*pair) for pair in ctx.pairs()}
            ctx.compress()
            for pair, old in before.items():
                new = ctx.entries(*pair)
                rows = np.searchsorted(old.pos, new.pos)
                assert len(new.pos) < len(old.pos)
                assert np.array_equal(old.pos[rows], new.pos)
                assert np.array_equal(old.k[rows], new.k) and np.array_equal(old.v[rows], new.v)


@pytest.mark.parametrize("policy", ["full", "laprox"])
def test_graphs_are_reused(toy, rng, policy):
    """Decoding rebuilds its graph once per block of tail and after a compression, not per token."""
    with engine.Model(toy(), engine.params(policy=policy)) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(rng.integers(3, 512, 300))
        ctx.compress()
        before = ctx.graphs_reused()
        for token in rng.integers(3, 512, 300):
            ctx.decode([token])
        assert ctx.graphs_reused() - before >= 295


class Unequal(gguf_factory._Writer):
    """Heads whose values weigh from 1 to 16: in layer 0 in head order, in layer 1 in no order."""

    def matrix(self, name, rows, cols, std):
        data = self.rng.standard_normal((rows, cols), dtype=np.float32) * np.float32(std)
        if name.endswith("attn_v.weight"):
            weight = [1, 1, 1, 2, 2, 4, 8, 16] if name.startswith("blk.0") else [4, 1, 16, 1, 2, 8, 1, 2]
            data *= np.repeat(weight, rows // 8)[:, None] / 8
        self.gguf.add_tensor(name, data)


def test_heads_of_very_different_length(tmp_path, rng):
    """8 KV heads, some far longer than others: several length classes in a layer, in and out of head order."""
    path = gguf_factory.write_llama(tmp_path / "unequal.gguf", writer=Unequal, n_layer=2, n_head=16, n_head_kv=8)
    net = reference.Network(path)
    with engine.Model(path, engine.params(budget="12%", recent=8)) as model, engine.Context(model, n_ctx=2048, n_ubatch=256) as ctx:
        tokens = rng.integers(3, 512, 1000)
        ctx.decode(tokens)
        net.decode(tokens)
        for n in (1, 40, 1):
            ctx.compress()
            evict(net, ctx)
            lengths = [len(p) for p in ctx.held().values()]
            assert max(lengths) > 8 * min(lengths)
            tokens = rng.integers(3, 512, n)
            assert np.abs(ctx.decode(tokens, all_logits=True) - net.decode(tokens)).max() < TOLERANCE
