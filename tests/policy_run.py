"""A random model that reads, scores and compresses, compared with the NumPy oracles: what tests of policies share."""

import zlib
from dataclasses import dataclass

import allocators_reference as ar
import devices
import engine
import gguf
import numpy as np
import pytest
import reference
import scorers_reference as sr

MHA = {"n_head": 4, "n_head_kv": 4}
GQA = {"n_head": 8, "n_head_kv": 2}
MQA = {"n_head": 7, "n_head_kv": 1}
D128 = {"head_dim": 128}
SHARP = {"qk_scale": 3.0}  # few entries have most of a head's attention


@dataclass(frozen=True)
class Case:
    shape: dict
    weights: str
    cache: str  # type of K, or of K/V
    error: float  # largest relative error of a raw score
    near: float  # how near the threshold float32 may disagree, relative

    def __str__(self):
        heads = f"{self.shape['n_head']}h{self.shape['n_head_kv']}kv"
        more = [name for name, changes in (("d128", D128), ("sharp", SHARP)) if changes.items() <= self.shape.items()]
        return "-".join([heads, *more, self.weights, self.cache])


F32, F16, QUANTISED = (1e-4, 1e-4), (1e-2, 1e-2), (1e-1, 5e-2)
if devices.ROUNDS:
    F32 = F16 = QUANTISED

EXACT = [
    Case(GQA, "F32", "f32", *F32),
    Case(MHA | D128 | SHARP, "F32", "f32", *F32),
    Case(MQA, "Q8_0", "f32", *F32),
]
ROUNDED = [
    Case(GQA | D128, "Q4_K", "f16", *F16),
    Case(MHA, "F16", "f16", *F16),
    Case(GQA, "Q4_0", "q8_0", *QUANTISED),
    Case(MQA | D128, "F32", "q8_0/f16", *QUANTISED),
    Case(MHA, "Q6_K", "q4_0", *QUANTISED),
    Case(GQA | D128, "F32", "f16/q4_0", *QUANTISED),
]
DEFAULT = EXACT[0]
each_case = pytest.mark.parametrize("case", EXACT + ROUNDED, ids=str)
each_exact = pytest.mark.parametrize("case", EXACT, ids=str)
each_rounded = pytest.mark.parametrize("case", ROUNDED, ids=str)


def parts(policy):
    """Scorer and allocator."""
    return tuple(engine.meanings().get(policy, policy).split(":"))


PRESETS = [p for p in engine.policies() if parts(p)[0] in [*sr.SCORES, "random"]]


class Run:
    """A model with a context, and what it has seen."""

    def __init__(self, toy, rng, policy="laprox", case=DEFAULT, arch="llama", n_layer=2, budget="30%", window=32, sink=4, recent=32, profile=None, **context):
        shape = {"n_layer": n_layer, "n_ff": 256} | case.shape if arch == "llama" else {}
        self.path = toy(arch, weights=case.weights, **shape)
        self.net, self.rng, self.case = reference.Network(self.path), rng, case
        self.policy, self.budget, self.sink, self.recent = policy, budget, sink, recent
        self.settings = {"window": window, "sink": sink, "recent": recent, "profile": profile}
        self.model = engine.Model(self.path, engine.params(policy, budget, **self.settings))
        type_k, type_v = case.cache.split("/") if "/" in case.cache else (case.cache, case.cache)
        self.ctx = engine.Context(self.model, type_k=type_k, type_v=type_v, **context)
        self.seen = 0
        self.queries = {}  # of all tokens, for Expected Attention: {layer: [(queries, positions), ...]}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.ctx.close()
        self.model.close()

    def set(self, policy=None, budget=None):
        self.policy, self.budget = policy or self.policy, budget or self.budget
        self.ctx.set_params(engine.params(self.policy, self.budget, **self.settings))

    def read(self, n):
        self.ctx.decode(self.rng.integers(3, 512, n))
        self.observe(n)

    def observe(self, n):
        self.seen += n
        if parts(self.policy)[0] == "expected":
            for il, _ in self.ctx.layers():
                q, pos = self.ctx.queries(il)
                assert len(q) >= n, "the window must have room for all that is read at once"
                self.queries.setdefault(il, []).append((q[-n:], pos[-n:]))

    def hole(self, p0, p1):
        """Take tokens out of the tail."""
        assert self.ctx.seq_rm(0, p0, p1)
        self.seen -= p1 - p0

    def heads(self) -> dict[int, list[sr.Head]]:
        out = {il: sr.heads_of(self.ctx, self.net, il, self.sink, self.recent) for il, _ in self.ctx.layers()}
        for il, seen in self.queries.items():
            q, pos = (np.concatenate(x) for x in zip(*seen))
            group = q.shape[1] // len(out[il])
            for i, h in enumerate(out[il]):
                mine = q[:, i * group : (i + 1) * group].astype(np.float64)
                h.expected = sr.expected_logits(h, mine, pos, self.sink, self.net.rope_base, self.net.arch != "llama")
        return out

    def layers(self) -> ar.Layers:
        heads, scorer = self.heads(), parts(self.policy)[0]
        return ar.Layers(
            pos={(il, i): h.pos[h.candidates] for il, layer in heads.items() for i, h in enumerate(layer)},
            scores={(il, i): s for il, layer in heads.items() for i, s in enumerate(sr.SCORES[scorer](layer))},
            preference={il: sr.cake_preference(layer) for il, layer in heads.items()} if scorer == "cake" else {},
            tokens_seen=self.seen,
            n_protected=self.sink + self.recent,
        )

    def compress(self) -> dict[tuple[int, int], np.ndarray]:
        """Which candidates are kept. Exactly the budget is held, and every protected entry."""
        before = self.ctx.held()
        self.ctx.compress()
        after = self.ctx.held()
        entries = reference.budget_entries(self.budget, self.seen, len(before), self.sink, self.recent)
        assert sum(map(len, after.values())) == min(entries, sum(map(len, before.values()))) == self.ctx.stats().entries_held
        out = {}
        for pair, pos in after.items():
            held = before[pair]
            protected = np.concatenate([held[held < self.sink], held[-self.recent :]])
            assert set(protected) <= set(pos) <= set(held)
            out[pair] = np.setdiff1d(pos, protected)
        return out

    def check(self, budget=None, profile=None):
        """Compress, and hold what was kept against what scores and allocator of the books give."""
        self.set(budget=budget)
        m = self.layers()
        m.profile = profile
        kept = self.compress()
        assert_best(kept, m, self.case.near)
        assert_counts({pair: len(pos) for pair, pos in kept.items()}, m, parts(self.policy)[1], self.case.near)


def nearly(score, n, near):
    """Which scores are so near the n-th best that rounding may put them on its other side. Ties stay what they are."""
    if not 0 < n <= len(score):
        return np.zeros(len(score), bool)
    threshold = np.sort(score)[-n]
    unsure = np.abs(score - threshold) <= near * np.abs(threshold)
    return unsure if len(set(score[unsure])) > 1 else np.zeros(len(score), bool)


def assert_best(kept, m: ar.Layers, near: float):
    """Every head holds the best of its candidates, as many as it holds."""
    for pair in m.pairs:
        s, pos, got = m.scores[pair], m.pos[pair], kept[pair]
        want = sr.best(pos, s, len(got))
        swapped = np.flatnonzero(np.isin(pos, np.setxor1d(got, want)))
        if not len(swapped):
            continue
        unsure = np.zeros(len(pos), bool) if s.loose is None else s.loose.copy()
        spare = 0
        if s.second is None:
            unsure |= nearly(s.score, len(got), near)
        else:
            half = len(got) // 2
            unsure |= nearly(s.score, half, near)
            rest = ~np.isin(pos, sr.best(pos, sr.Scores(s.score), half))
            unsure[rest] |= nearly(s.second[rest], len(got) - half, near)
        if s.second is not None or s.loose is not None:
            spare = int(unsure.sum())  # one entry more or less in the first stage is one less or more in the second
        stray = swapped[~unsure[swapped]]
        assert len(stray) <= spare, f"{pair}: {pos[stray]} of {s.score[stray]}, {len(got)} are kept of {np.sort(s.score)[::-1]}"


def assert_counts(got, m: ar.Layers, allocator: str, near: float):
    """Heads hold as many as the allocator of the books gives them, but for scores that are nearly equal."""
    want = ar.ALLOCATORS[allocator](m, sum(got.values()))
    assert sum(want.values()) == sum(got.values())
    slack = 0 if allocator in ("uniform", "pyramid", "profile") else int(near * sum(want.values()))
    assert max(abs(got[pair] - want[pair]) for pair in want) <= slack, f"{got} instead of {want}"


def write_profile(path, table, dtype=np.float64, architecture="laprox-profile", version=1, crc32=None, name="evicted", **texts):
    """A profile, by the gguf package."""
    table = np.ascontiguousarray(table, dtype)
    w = gguf.GGUFWriter(path, architecture)
    w.add_uint32("laprox.profile.version", version)
    w.add_uint32("laprox.profile.crc32", zlib.crc32(table.tobytes()) if crc32 is None else crc32)
    for key, text in texts.items():
        w.add_string(f"laprox.profile.{key}", text)
    w.add_tensor(name, table)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def read_profile(path):
    """Its table, and the texts about it."""
    reader = gguf.GGUFReader(path)
    (tensor,) = reader.tensors
    table = np.array(tensor.data).reshape(tensor.shape[::-1])
    fields = {key.removeprefix("laprox.profile."): field.contents() for key, field in reader.fields.items() if "laprox.profile." in key}
    assert fields.pop("version") == 1 and fields.pop("crc32") == zlib.crc32(table.tobytes())
    return table, fields


def random_table(rng, n_layer, n_head_kv, spread=0.7):
    """Shares to evict whose mean over the heads is the row's own."""
    lean = rng.uniform(-1, 1, (n_layer, n_head_kv))
    lean -= lean.mean()
    share = np.arange(1, 100)[:, None, None] / 100
    return share + np.minimum(share, 1 - share) * spread * lean


def profile_for(policy, rng, shape, folder, n_layer=2):
    if parts(policy)[1] != "profile":
        return {}, None
    table = random_table(rng, n_layer, shape["n_head_kv"])
    return {"profile": write_profile(folder / "curve.gguf", table)}, table
