"""Retention gates in the engine against the papers' inference in NumPy: gate outputs, scores, kept sets, refusals.

The reference reads the same sidecar (so weights are rounded alike) and computes z in float64 from the reference network's
attn_norm. What differs is how ggml rounds what it multiplies weights with: not for F32, to F16 for F16, to 8 bits in blocks
of 32 for Q8_0 and Q4_0.
"""

from __future__ import annotations

import os

import devices
import engine
import gates_factory as made
import gates_forward
import numpy as np
import pytest
import reference

from laprox.gates import sidecar

GQA = {"n_head": 8, "n_head_kv": 2}
MHA = {"n_head": 4, "n_head_kv": 4}
MQA = {"n_head": 6, "n_head_kv": 1}
Z_ERROR = {"f32": (1e-4, 1e-3), "f16": (3e-3, 1e-2), "q8_0": (6e-2, 2e-1), "q4_0": (6e-2, 2e-1)}  # of z, which spreads by 2.5: rms, largest
RELATIVE = 5e-4  # of scores
if devices.ROUNDS:
    Z_ERROR["f32"] = Z_ERROR["f16"] = (1e-2, 5e-2)
    RELATIVE = 3e-2
EVERY = [(shape, kind, tied) for shape in (GQA, MHA, MQA) for kind in ("rg", "rg10") for tied in (True, False)]


class Network(reference.Network):
    """The reference network, which also tells what its gates say of every entry held."""

    def __init__(self, path, gates, **options):
        self.gates, self.said = gates, {}
        super().__init__(path, **options)

    def _attention(self, il, h, pos):
        z = gates_forward.z(self.gates, il, h)  # float64, because h is
        for head in range(self.n_head_kv[il]):
            self.said[il, head] = np.concatenate([self.said.get((il, head), np.empty(0)), z[:, head]])
        return super()._attention(il, h, pos)

    def keep(self, il, head, positions):
        m = np.isin(self.pos[il, head], positions)
        super().keep(il, head, positions)
        self.said[il, head] = self.said[il, head][m]

    def scores(self, seen):
        """age x log beta of what is held (DBTrimKV, eviction): {(layer, head): [n]}."""
        return {pair: (seen + 1 - self.pos[pair]) * gates_forward.log_sigmoid(z) for pair, z in self.said.items()}


class Run:
    """A model, its gates, both implementations."""

    def __init__(self, toy, folder, rng, shape=GQA, kind="rg10", tied=True, stored="f32", policy="retention", budget="30%", sink=4, recent=16,
                 floor=0.0, bias=3.0, hidden=32, activation="silu", gates=None, n_layer=2, weights="F32", **context):  # fmt: skip
        self.path = toy("llama", weights=weights, n_layer=n_layer, n_ff=256, **shape)
        self.file = folder / "made.gguf"
        gates = gates or made.random_gates(n_layer, 256, shape["n_head_kv"], hidden, kind, tied, bias=bias, activation=activation)
        sidecar.write(self.file, gates, stored)
        self.net = Network(self.path, sidecar.read(self.file))
        self.policy, self.budget, self.sink, self.recent, self.floor, self.rng = policy, budget, sink, recent, floor, rng
        self.model = engine.Model(self.path, self.params())
        self.ctx = engine.Context(self.model, **context)
        self.seen = 0

    def params(self, **changes):
        settings = {"policy": self.policy, "budget": self.budget, "sink": self.sink, "recent": self.recent, "floor": self.floor, "gates": self.file}
        return engine.params(**(settings | changes))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.ctx.close()
        self.model.close()

    def read(self, n, at_once=True):
        tokens = self.rng.integers(260, 500, n)
        if at_once:
            self.ctx.decode(tokens)
        else:
            for token in tokens:
                self.ctx.decode([token])
        self.net.decode(tokens)
        self.seen += n

    def compress(self, near=2 * RELATIVE):
        """Compress, and compare what is kept. Entries nearer to the threshold than float32 tells apart may go either way."""
        scores = self.net.scores(self.seen)
        held = {pair: pos.copy() for pair, pos in self.net.pos.items()}
        wanted = kept_sets(held, scores, self)
        self.ctx.compress()
        got = self.ctx.held()
        assert sum(map(len, got.values())) == sum(map(len, wanted.values()))
        differ = 0
        for pair in held:
            for pos in set(got[pair].tolist()) ^ set(wanted[pair].tolist()):
                s = scores[pair][held[pair] == pos][0]
                threshold = min_kept(scores[pair], held[pair], wanted[pair], self)
                thresholds = [threshold] if "uniform" in self.policy else [min_kept(scores[p], held[p], wanted[p], self) for p in held]
                assert min(abs(s - t) for t in thresholds) <= near * abs(s), (pair, pos, s, thresholds)
                differ += 1
            self.net.keep(*pair, got[pair])  # both go on from the same
        assert differ <= 0.02 * sum(map(len, wanted.values()))
        return got


def min_kept(score, pos, kept, run):
    ranked = np.isin(pos, kept) & (pos >= run.sink) & (pos < run.seen - run.recent)
    return score[ranked].min() if ranked.any() else np.inf


def kept_sets(held, scores, run):
    """Sinks, recent tokens, and the best of the rest: of the whole model, or of each head. Ties: the later one."""
    protected = {pair: (pos < run.sink) | (pos >= run.seen - run.recent) for pair, pos in held.items()}
    budget = reference.budget_entries(run.budget, run.seen, len(held), run.sink, run.recent)
    n = budget - sum(int(m.sum()) for m in protected.values())
    free = {pair: (held[pair][~m], scores[pair][~m]) for pair, m in protected.items()}
    if run.policy == "retention:uniform":
        share = even({pair: len(pos) for pair, (pos, _) in free.items()}, n)
        chosen = {pair: reference.top_k({pair: free[pair]}, share[pair])[pair] for pair in free}
    else:
        least = int(run.floor * n / len(held))
        chosen = {pair: reference.top_k({pair: free[pair]}, least)[pair] for pair in free}
        rest = {pair: (pos[~np.isin(pos, chosen[pair])], s[~np.isin(pos, chosen[pair])]) for pair, (pos, s) in free.items()}
        more = reference.top_k(rest, n - sum(map(len, chosen.values())))
        chosen = {pair: np.concatenate([chosen[pair], more[pair]]) for pair in free}
    return {pair: np.sort(np.concatenate([held[pair][protected[pair]], chosen[pair]])).astype(int) for pair in held}


def even(room, n):
    """As equal as room allows; what is left over goes to the first heads."""
    share = dict.fromkeys(room, 0)
    while n and any(share[p] < room[p] for p in room):
        open_ = [p for p in room if share[p] < room[p]]
        each, over = divmod(n, len(open_))
        for i, p in enumerate(open_):
            more = min(each + (i < over), room[p] - share[p])
            share[p] += more
            n -= more
    return share


def z_of(score, pos, seen):
    """What the gate said, from its score."""
    log_beta = score.astype(np.float64) / (seen + 1 - pos)
    return -np.log(np.expm1(-log_beta))


# --- gate outputs and scores -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, kind, tied", EVERY, ids=str)
def test_scores(toy, tmp_path, rng, shape, kind, tied):
    with Run(toy, tmp_path, rng, shape, kind, tied, n_ctx=256) as run:
        run.read(150)
        got, expected = run.ctx.score(), run.net.scores(150)
        for pair, s in expected.items():
            np.testing.assert_allclose(got[pair], s, rtol=RELATIVE)
            assert run.net.said[pair].std() > 1  # there is something to tell apart


@pytest.mark.parametrize("stored", sidecar.TYPES)
@pytest.mark.parametrize("kind", sidecar.KINDS)
@pytest.mark.parametrize("weights", ["F32", "Q4_0"])
def test_types_of_weights(toy, tmp_path, rng, weights, kind, stored):
    """Beside weights of Q4_0, which a CPU rearranges, gates of Q4_0 lie where these do, and are rearranged as well."""
    rms, largest = Z_ERROR[stored] if weights == "F32" else np.multiply(1.5, Z_ERROR["q4_0"])  # what the gates read was rounded, too
    with Run(toy, tmp_path, rng, kind=kind, stored=stored, hidden=64, weights=weights, n_ctx=256) as run:
        run.read(120)
        got = run.ctx.score()
        for pair, z in run.net.said.items():
            error = z_of(got[pair], run.net.pos[pair], 120) - z
            assert np.sqrt((error**2).mean()) < rms and np.abs(error).max() < largest


def test_gelu(toy, tmp_path, rng):
    with Run(toy, tmp_path, rng, activation="gelu", n_ctx=256) as run:
        run.read(120)
        got = run.ctx.score()
        for pair, z in run.net.said.items():
            assert np.abs(z_of(got[pair], run.net.pos[pair], 120) - z).max() < Z_ERROR["f16"][1]


@pytest.mark.parametrize("bias", [18.0, 30.0, -20.0])
def test_far_ends_of_beta(toy, tmp_path, rng, bias):
    """beta = 1 - 1e-8 and nearer to 1, which float32 can't tell from 1, and beta = e^-20."""
    gates = made.random_gates(2, 256, 2, bias=bias)
    with Run(toy, tmp_path, rng, gates=gates, n_ctx=256) as run:
        run.read(100)
        got, expected = run.ctx.score(), run.net.scores(100)
        for pair, s in expected.items():
            assert np.isfinite(got[pair]).all() and (got[pair] < 0).all()
            np.testing.assert_allclose(got[pair], s, rtol=2 * RELATIVE)


def test_untrained_gates_rank_by_age(toy, tmp_path, rng):
    """With weights 0 and the published bias 18, log beta is -1.523e-8 everywhere: the oldest go first."""
    gates = made.random_gates(2, 256, 2)
    layers = [sidecar.Layer(*(None if t is None else np.zeros_like(t) for t in vars(layer).values())) for layer in gates.layers]
    layers = [sidecar.Layer(*[*vars(layer).values()][:5], np.full(2, 18.0, np.float32)) for layer in layers]
    with Run(toy, tmp_path, rng, gates=sidecar.Gates("rg10", "silu", layers), n_ctx=256, budget="60") as run:
        run.read(200)
        np.testing.assert_allclose(run.ctx.score()[0, 0], -1.522998e-8 * (201 - np.arange(200)), rtol=1e-5)
        for kept in run.compress().values():
            assert kept.tolist() == [0, 1, 2, 3, *range(144, 200)]


# --- kept sets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["retention", "retention:uniform"])
@pytest.mark.parametrize("shape, kind, tied", EVERY, ids=str)
def test_prefill_in_chunks(toy, tmp_path, rng, shape, kind, tied, policy):
    """A chunk is appended and attended to, then entries compete: their scores are of the new age."""
    with Run(toy, tmp_path, rng, shape, kind, tied, policy=policy, budget="70", n_ctx=512) as run:
        for n in (120, 64, 90):
            run.read(n)
            run.compress()


@pytest.mark.parametrize("policy", ["retention", "retention:uniform"])
@pytest.mark.parametrize("kind", sidecar.KINDS)
def test_token_by_token(toy, tmp_path, rng, kind, policy):
    with Run(toy, tmp_path, rng, kind=kind, policy=policy, budget="48", n_ctx=256) as run:
        run.read(60)
        run.compress()
        for _ in range(4):
            run.read(12, at_once=False)
            run.compress()


@pytest.mark.parametrize("stored", ["f16", "q8_0"])
def test_kept_sets_with_rounded_gates(toy, tmp_path, rng, stored):
    with Run(toy, tmp_path, rng, stored=stored, hidden=64, budget="60", n_ctx=512) as run:
        run.read(200)
        run.compress(near=8e-2)


@pytest.mark.parametrize("floor", [0.0, 0.25, 1.0])
def test_floor(toy, tmp_path, rng, floor):
    """Gates that make one head win everything; the others keep their share of the average."""
    gates = made.random_gates(2, 256, 2, tied=False, kind="rg", bias=2.0)
    gates.layers[1].gate_out_bias[0] = 12.0
    with Run(toy, tmp_path, rng, gates=gates, floor=floor, budget="60", n_ctx=512) as run:
        run.read(250)
        kept = run.compress()
        assert min(map(len, kept.values())) >= 20 + int(floor * 40)
        assert floor == 1 or len(kept[1, 0]) > 60


@pytest.mark.parametrize("budget", ["60", "61", "63"])
def test_what_entries_were_is_remembered(toy, tmp_path, rng, budget):
    """Gate outputs travel with their entries: through a compression, a copy of a sequence and a saved state. Odd numbers
    of their four bytes don't fill the words of the state's checksum."""
    with Run(toy, tmp_path, rng, budget=budget, n_ctx=512, n_seq_max=2) as run:
        run.read(150)
        run.compress()
        before = run.ctx.score()
        for pair, s in run.net.scores(150).items():
            np.testing.assert_allclose(before[pair], s, rtol=RELATIVE)
        run.ctx.seq_cp(0, 1)
        copied = run.ctx.score(1)
        state = run.ctx.save()
        with engine.Context(run.model, n_ctx=512, n_seq_max=2) as other:
            assert other.load(state)
            loaded = other.score()
        for pair in before:
            np.testing.assert_array_equal(copied[pair], before[pair])
            np.testing.assert_array_equal(loaded[pair], before[pair])


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(toy, gates, **settings):
    with pytest.raises(engine.Refused) as error:
        engine.Model(toy("llama", n_layer=2, n_ff=256, **GQA), engine.params("retention", gates=gates, **settings)).close()
    return str(error.value)


@pytest.mark.parametrize(
    "sizes, reason",
    [((3, 256, 2), "for 3 layers, the model has 2"), ((2, 128, 2), "for 128 dimensions, the model has 256"), ((2, 256, 4), "for 4 KV heads, the model has 2")],
)
def test_gates_of_other_sizes(toy, tmp_path, sizes, reason):
    sidecar.write(tmp_path / "g.gguf", made.random_gates(*sizes))
    text = refused(toy, tmp_path / "g.gguf")
    assert reason in text and "g.gguf" in text


def test_gates_of_another_model(toy, tmp_path):
    about = {"model": "another.gguf", "fingerprint": "0123456789abcdef"}
    sidecar.write(tmp_path / "g.gguf", made.random_gates(2, 256, 2, **about))
    text = refused(toy, tmp_path / "g.gguf")
    assert "another.gguf" in text and "0123456789abcdef" in text


def test_gates_of_this_model(toy, tmp_path):
    path = toy("llama", n_layer=2, n_ff=256, **GQA)
    with engine.Model(path) as model:
        fingerprint = model.fingerprint()
    sidecar.write(tmp_path / "g.gguf", made.random_gates(2, 256, 2, fingerprint=fingerprint))
    engine.Model(path, engine.params("retention", gates=tmp_path / "g.gguf")).close()


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 0.99])
def test_truncated_gates(toy, tmp_path, share):
    path = tmp_path / "g.gguf"
    sidecar.write(path, made.random_gates(2, 256, 2))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "g.gguf" in refused(toy, path)


def test_flipped_bits(toy, tmp_path, rng):
    """Wherever the bit is. The file's metadata that a flip leaves readable is checked against the model, too."""
    path = tmp_path / "g.gguf"
    sidecar.write(path, made.random_gates(2, 256, 2, hidden=32))
    data = path.read_bytes()
    start = len(data) - sum(x.size * (4 if "bias" in n else 2) for n, x in made.random_gates(2, 256, 2).layers[0].tensors().items())
    for at in rng.integers(start, len(data) - 64, 20):
        broken = bytearray(data)
        broken[at] ^= 1 << rng.integers(8)
        path.write_bytes(broken)
        assert "g.gguf" in refused(toy, path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("stored", ["f32", "f16"])
def test_weights_that_are_not_finite(toy, tmp_path, monkeypatch, stored, value):
    gates = made.random_gates(2, 256, 2)
    gates.layers[1].gate_in_bias[3] = value
    with pytest.raises(ValueError, match="blk.1.gate_in.bias has 1 values that are not finite"):
        sidecar.write(tmp_path / "g.gguf", gates, stored)
    monkeypatch.setattr(sidecar.Gates, "check", lambda self: None)  # as another program may write it
    sidecar.write(tmp_path / "g.gguf", gates, stored)
    text = refused(toy, tmp_path / "g.gguf")
    assert "blk.1.gate_in.bias" in text and "isn't a number" in text


def test_no_gates_and_no_gguf(toy, tmp_path):
    assert "gone.gguf" in refused(toy, tmp_path / "gone.gguf")
    (tmp_path / "text.gguf").write_text("gates")
    assert "text.gguf" in refused(toy, tmp_path / "text.gguf")
    model = toy("llama", n_layer=2, n_ff=256, **GQA)
    assert 'has architecture "llama"; accepted: "laprox-gates"' in refused(toy, model)
    assert f"{model.stem}.kv-gates.gguf" in refused(toy, None)  # beside the model, where there is none


def test_gates_are_read_once(toy, tmp_path):
    """And again where the file was replaced."""
    path = tmp_path / "g.gguf"
    sidecar.write(path, made.random_gates(2, 256, 2))
    size, time = path.stat().st_size, path.stat().st_mtime_ns
    with engine.Model(toy("llama", n_layer=2, n_ff=256, **GQA), engine.params("retention", gates=path)) as model:
        path.write_bytes(bytes(size))  # would be refused
        os.utime(path, ns=(time, time))
        model.set_params(engine.params("retention", gates=path))
        os.utime(path, ns=(time, time + 10**9))
        with pytest.raises(engine.Refused, match="g.gguf is absent, truncated"):
            model.set_params(engine.params("retention", gates=path))
