"""Every scorer, and every policy made of one, against NumPy float64 oracles on random models."""

import shutil
from dataclasses import dataclass

import devices
import engine
import numpy as np
import policies_reference as pr
import pytest
import reference

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


PRESETS = [p for p in engine.policies() if parts(p)[0] in [*pr.SCORES, "random"]]


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

    def heads(self) -> dict[int, list[pr.Head]]:
        out = {il: pr.heads_of(self.ctx, self.net, il, self.sink, self.recent) for il, _ in self.ctx.layers()}
        for il, seen in self.queries.items():
            q, pos = (np.concatenate(x) for x in zip(*seen))
            group = q.shape[1] // len(out[il])
            for i, h in enumerate(out[il]):
                mine = q[:, i * group : (i + 1) * group].astype(np.float64)
                h.expected = pr.expected_logits(h, mine, pos, self.sink, self.net.rope_base, self.net.arch != "llama")
        return out

    def layers(self) -> pr.Layers:
        heads, scorer = self.heads(), parts(self.policy)[0]
        return pr.Layers(
            pos={(il, i): h.pos[h.candidates] for il, layer in heads.items() for i, h in enumerate(layer)},
            scores={(il, i): s for il, layer in heads.items() for i, s in enumerate(pr.SCORES[scorer](layer))},
            preference={il: pr.cake_preference(layer) for il, layer in heads.items()} if scorer == "cake" else {},
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


def assert_best(kept, m: pr.Layers, near: float):
    """Every head holds the best of its candidates, as many as it holds."""
    for pair in m.pairs:
        s, pos, got = m.scores[pair], m.pos[pair], kept[pair]
        want = pr.best(pos, s, len(got))
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
            rest = ~np.isin(pos, pr.best(pos, pr.Scores(s.score), half))
            unsure[rest] |= nearly(s.second[rest], len(got) - half, near)
        if s.second is not None or s.loose is not None:
            spare = int(unsure.sum())  # one entry more or less in the first stage is one less or more in the second
        stray = swapped[~unsure[swapped]]
        assert len(stray) <= spare, f"{pair}: {pos[stray]} of {s.score[stray]}, {len(got)} are kept of {np.sort(s.score)[::-1]}"


def assert_counts(got, m: pr.Layers, allocator: str, near: float):
    """Heads hold as many as the allocator of the books gives them, but for scores that are nearly equal."""
    want = pr.ALLOCATORS[allocator](m, sum(got.values()))
    assert sum(want.values()) == sum(got.values())
    slack = 0 if allocator in ("uniform", "pyramid", "profile") else int(near * sum(want.values()))
    assert max(abs(got[pair] - want[pair]) for pair in want) <= slack, f"{got} instead of {want}"


def test_every_scorer_has_an_oracle():
    """Random has none, custom is anything, and retention is what a trained network says."""
    assert set(engine.scorers()) - {"random", "custom", "retention"} <= set(pr.SCORES)
    assert set(engine.allocators()) == set(pr.ALLOCATORS)


# --- finished scores ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", pr.SCORES)
def test_finished_scores(toy, rng, scorer):
    """What a head's candidates are ranked by. What is protected has none."""
    with Run(toy, rng, f"{scorer}:uniform", window=200 if scorer == "expected" else 32, n_ctx=512) as run:
        run.read(200)
        run.ctx.score()
        for il, layer in run.heads().items():
            for i, (h, want) in enumerate(zip(layer, pr.SCORES[scorer](layer))):
                got = run.ctx.finished_scores(il, i)
                assert np.isnan(np.delete(got, range(h.first, h.last))).all() and len(got) == len(h.pos)
                got, want = got[h.candidates], want.score
                if scorer == "defensivekv":  # those that come before all others only need to
                    assert np.array_equal(got > 1, want > 1)
                    got, want = got[got <= 1], want[want <= 1]
                assert np.abs(got - want).max() < 10 * DEFAULT.error * np.abs(want).max()


# --- raw scores ------------------------------------------------------------------------------------------------------


def check_raw(run: Run, scorers=tuple(s for s in pr.RAW if s != "expected")):
    heads = run.heads()
    for scorer in scorers:
        run.set(f"{scorer}:uniform")
        got = run.ctx.score()
        assert got.keys() == {(il, i) for il in heads for i in range(len(heads[il]))}
        for (il, i), numbers in got.items():
            want = pr.RAW[scorer](heads[il][i])
            assert len(numbers) == len(want)
            # a cosine may be 0: what it is made of sets the scale
            size = np.maximum(np.abs(want), 0.1 if scorer == "keydiff" else 1e-9 * np.abs(want).max())
            error = np.abs(numbers - want) / size
            assert error.max() < run.case.error, f"{scorer}, layer {il}, head {i}: worst error {error.max():.1e}"


@each_case
def test_raw_scores(toy, rng, case):
    """Over everything, then over ragged heads, then with a hole in the tail."""
    with Run(toy, rng, "laprox:ada", case, n_ubatch=128) as run:
        run.read(200)
        check_raw(run)
        run.set("laprox:ada", "40%")
        run.compress()
        assert len({len(pos) for pos in run.ctx.held().values()}) > 1 or case.shape["n_head_kv"] == 1
        check_raw(run)
        run.read(30)
        run.hole(210, 217)
        run.read(9)
        check_raw(run)


@each_case
def test_raw_scores_of_expected_attention(toy, rng, case):
    """Statistics go on over all queries, whatever became of their tokens."""
    with Run(toy, rng, "expected", case, window=256, n_ubatch=128) as run:
        run.read(200)
        check_raw(run, ["expected"])
        run.set("expected:ada", "40%")
        run.compress()
        check_raw(run, ["expected"])
        run.read(30)
        run.hole(210, 217)
        run.read(9)
        check_raw(run, ["expected"])


@pytest.mark.parametrize("arch", ["gemma2", "lfm2"])
def test_raw_scores_of_other_architectures(toy, rng, arch):
    """Soft-capped attention and queries that the model scales; normalised queries; halves that rotate, not neighbours."""
    for policy in ("laprox", "expected"):
        with Run(toy, rng, policy, arch=arch, window=256) as run:
            run.read(200)
            check_raw(run, ["expected"] if policy == "expected" else [s for s in pr.RAW if s != "expected"])


@pytest.mark.parametrize("kv_unified", [False, True])
def test_sequences_have_their_own_statistics(toy, rng, kv_unified):
    """Three sequences of different lengths that share batches; one of them starts again."""
    with Run(toy, rng, "expected", window=256, n_seq_max=3, n_ubatch=32, kv_unified=kv_unified) as run:
        ctx = run.ctx
        ctx.decode(rng.integers(3, 512, 90), seq=1)
        ctx.decode(rng.integers(3, 512, 70), seq=2)
        ctx.seq_rm(2)
        for i in range(50):
            batch = [(0, i), (1, 90 + i), *([(2, i // 3)] if i % 3 == 0 else [])]
            ctx.submit([(int(rng.integers(3, 512)), pos, (seq,)) for seq, pos in batch])
        for seq in range(3):
            got = ctx.score(seq)
            for il, n in ctx.layers():
                q, pos = ctx.queries(il, seq)
                for i, h in enumerate(pr.heads_of(ctx, run.net, il, run.sink, run.recent, seq)):
                    group = q.shape[1] // n
                    h.expected = pr.expected_logits(h, q[:, i * group : (i + 1) * group].astype(np.float64), pos, run.sink, run.net.rope_base, False)
                    assert np.allclose(got[il, i], pr.expected(h), rtol=run.case.error, atol=0)


def test_expected_attention_needs_its_statistics(toy, rng):
    """Of a context made for another policy there are none; what has no candidates needs none."""
    with Run(toy, rng, "laprox") as run:
        run.read(100)
        with pytest.raises(engine.Refused, match="expected"):
            run.set("expected")
            run.compress()
    with Run(toy, rng, "expected") as run:
        run.read(3)
        run.compress()


# --- what a policy keeps ---------------------------------------------------------------------------------------------


def write_profile(path, table, **notes):
    """As `laprox profile` does; the authors' have no notes."""
    with open(path, "wb") as f:
        np.save(f, table)
        if notes:
            f.write("".join(["\nlaprox-profile\n", *(f"{key} {value}\n" for key, value in notes.items())]).encode())
    return path


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
    return {"profile": write_profile(folder / "curve.npy", table)}, table


@each_exact
@pytest.mark.parametrize("policy", [p for p in PRESETS if p != "random"])
def test_presets(toy, rng, tmp_path, policy, case):
    """Three times: over everything, over ragged heads, with tokens that came later and some that were taken back."""
    settings, table = profile_for(policy, rng, case.shape, tmp_path)
    with Run(toy, rng, policy, case, window=256 if policy == "expected" else 32, **settings) as run:
        run.read(230)
        run.check("71%", table)
        run.check("37%", table)
        run.read(60)
        run.hole(240, 247)
        run.read(21)
        run.check("60", table)


@each_rounded
@pytest.mark.parametrize("scorer", [s for s in pr.SCORES if s != "streaming"])
def test_scorers_on_rounded_caches(toy, rng, scorer, case):
    with Run(toy, rng, f"{scorer}:uniform", case, window=256 if scorer == "expected" else 32) as run:
        run.read(200)
        run.check("45%")
        run.read(20)
        run.check("30%")


@pytest.mark.parametrize(
    "policy",
    [
        "snapkv:global",
        "keydiff:global",
        "knorm:ada",
        "laprox:uniform",
        "laprox:ada",
        "laprox:global-raw",
        "criticalkv:ada",
        "criticalkv:global",
        "defensivekv:global-raw",
        "defensivekv:uniform",
        "tova:global",
        "cake:ada",
        "cake:pyramid",
        "lava:uniform",
        "keydiff:lava",
        "expected:ada",
        "expected:lava",
        "rkv:global",
        "vnorm:global",
        "oracle:pyramid",
        "streaming:lava",
        "snapkv:profile",
        "keydiff:profile",
    ],
)
def test_combinations(toy, rng, tmp_path, policy):
    settings, table = profile_for(policy, rng, GQA, tmp_path, n_layer=3)
    with Run(toy, rng, policy, n_layer=3, window=256 if policy.startswith("expected") else 32, **settings) as run:
        run.read(220)
        run.check("62%", table)
        run.read(40)
        run.check("20%", table)


@pytest.mark.parametrize("policy", ["lava", "cake", "adakv", "laprox", "pyramidkv"])
def test_layers_of_different_lengths(toy, rng, policy):
    """One policy after another: what remains of a pyramid is shared out anew."""
    with Run(toy, rng, "snapkv:pyramid", n_layer=3, sink=2, recent=8) as run:
        run.read(240)
        run.check("50%")
        run.set(policy)
        run.check("25%")


@pytest.mark.parametrize("window, sink, recent", [(1, 0, 1), (31, 0, 1), (64, 4, 8), (2, 9, 40)])
@pytest.mark.parametrize("policy", ["laprox", "criticalkv", "defensivekv", "cake", "lava", "rkv", "tova:global"])
def test_windows(toy, rng, policy, window, sink, recent):
    """Also wider than what is protected, so that queries are older than everything a head still holds."""
    with Run(toy, rng, policy, window=window, sink=sink, recent=recent) as run:
        run.read(150)
        run.check("80%")
        run.check("40%")
        run.check("15%")


@pytest.mark.parametrize("policy, window, n", [(p, 600, 1100) for p in ("laprox", "criticalkv", "defensivekv", "cake", "lava")] + [("rkv", 300, 2100)])
def test_long_inputs(toy, rng, policy, window, n):
    """Too much for one tensor of a score graph: query heads, and R-KV's blocks of keys, take turns."""
    case = Case(MQA, "F32", "f32", *F32)
    with Run(toy, rng, policy, case, n_layer=1, window=window, recent=window, n_ctx=2304) as run:
        run.read(n)
        run.check("75%")


def test_random_draws(toy, rng):
    """The same for an entry in every run, whatever else is held; without a pattern."""
    draws = []
    for budget in ("50%", "20%"):
        with Run(toy, rng, "random") as run:
            run.read(300)
            everything = run.ctx.score()
            for numbers in everything.values():
                assert (numbers >= 0).all() and (numbers < 1).all()
                assert abs(numbers.mean() - 0.5) < 0.08 and abs(numbers.std() - 12**-0.5) < 0.04
                assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.25
            table = np.array([everything[pair] for pair in run.ctx.pairs()])
            assert np.abs(np.corrcoef(table) - np.eye(len(table))).max() < 0.25
            draws.append(table)
            run.set(budget=budget)
            kept = run.compress()
            for pair, pos in run.ctx.held().items():
                assert np.array_equal(run.ctx.score()[pair], everything[pair][pos])
                assert np.array_equal(kept[pair], pr.best(np.arange(4, 268), pr.Scores(everything[pair][4:268]), len(kept[pair])))
            assert max(map(len, kept.values())) - min(map(len, kept.values())) <= 1
    assert np.array_equal(*draws)


# --- every policy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [*PRESETS, "expected:ada", "criticalkv:ada", "laprox:profile"])
def test_deterministic(toy, rng, tmp_path, policy):
    """From run to run and with more threads."""
    settings, _ = profile_for(policy, rng, GQA, tmp_path)
    first, second = rng.integers(3, 512, 200), rng.integers(3, 512, 30)
    runs = []
    for n_threads in (1, 1, 2):
        with Run(toy, rng, policy, n_threads=n_threads, **settings) as run:
            for tokens, budget in ((first, "40%"), (second, "25%")):
                run.ctx.decode(tokens)
                run.seen += len(tokens)
                run.set(budget=budget)
                run.compress()
            runs.append({pair: pos.tolist() for pair, pos in run.ctx.held().items()})
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("policy", [*PRESETS, "custom"])
def test_budgets(toy, rng, tmp_path, policy):
    """Exactly, from all but one entry down to what is protected; and inputs that have nothing to evict."""
    settings, _ = profile_for(policy, rng, GQA, tmp_path)
    with Run(toy, rng, policy, window=256 if policy == "expected" else 32, **settings) as run:
        if policy == "custom":
            run.ctx.set_scorer(lambda seq, il, head, pos: np.sin(pos))
        for n in (1, 3, 32, 36, 37, 41):
            run.ctx.clear()
            run.queries, run.seen = {}, 0
            run.read(n)
            run.set(budget="5%")
            run.compress()
        run.ctx.clear()
        run.queries, run.seen = {}, 0
        run.read(131)
        for budget in ("100%", "99.9%", "99%", "0.777", "77", "61.3%", "38", "37", "36", "1%"):
            run.set(budget=budget)
            run.compress()
        assert {len(pos) for pos in run.ctx.held().values()} == {36}


# --- scores of one's own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["custom", "custom:uniform", "custom:ada"])
def test_custom_scorer(toy, rng, monkeypatch, policy):
    """It is asked once per head, for what the head holds, and may look inside."""
    monkeypatch.setitem(pr.SCORES, "custom", pr.plain(lambda h: np.abs(h.v).max(1)))
    with Run(toy, rng, policy) as run:
        run.read(200)
        asked = []

        def score(seq, il, head, pos):
            e = run.ctx.entries(il, head)
            assert seq == 0 and np.array_equal(e.pos, pos)
            asked.append((il, head))
            return np.abs(e.v).max(1)

        run.ctx.set_scorer(score)
        for budget, n in (("50%", 40), ("30%", 0)):
            run.set(budget=budget)
            heads = run.heads()
            for (il, i), numbers in run.ctx.score().items():
                assert np.array_equal(numbers, np.abs(heads[il][i].v).max(1).astype(np.float32))
            assert asked == run.ctx.pairs()
            run.check()
            if n:
                run.read(n)
            asked.clear()


def test_custom_scorer_says_no(toy, rng):
    """Then, and without any, nothing is evicted. NaN is the worst score, and -inf is not kept, whatever the budget."""
    with Run(toy, rng, "custom:uniform", budget="50%") as run:
        run.read(200)
        for attempt in (run.ctx.compress, run.ctx.score):
            with pytest.raises(engine.Refused, match="laprox_set_scorer"):
                attempt()
        run.ctx.set_scorer(lambda *_: None)
        for attempt in (run.ctx.compress, run.ctx.score):
            with pytest.raises(engine.Refused):
                attempt()
        assert run.ctx.stats().entries_held == 200 * 4 and run.ctx.stats().compressions == 0
        run.ctx.set_scorer(lambda seq, il, head, pos: np.where(pos % 3 == 0, np.nan, -pos))
        for pos in run.compress().values():
            assert pos.tolist() == [p for p in range(4, 168) if p % 3][:64]
        run.read(20)
        run.ctx.set_scorer(lambda seq, il, head, pos: np.where(pos < 100, -np.inf, 1))
        run.ctx.compress()
        for pos in run.ctx.held().values():
            assert pos.tolist() == [0, 1, 2, 3, *range(168, 220)]
        run.ctx.set_scorer(None)
        with pytest.raises(engine.Refused, match="laprox_set_scorer"):
            run.ctx.score()


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy, words",
    [
        ("snap", ["snap", "snapkv", "laprox", "pyramidkv"]),
        ("snapkv:adda", ["adda", "ada", "global", "uniform"]),
        ("snapk:ada", ["snapk", "snapkv", "keydiff"]),
        ("snapkv:", ["uniform", "global"]),
        (":ada", ["laprox", "snapkv"]),
        ("snapkv:ada:ada", ["ada:ada"]),
        ("pyramidkv:ada", ["pyramidkv", "snapkv"]),
        ("snapkv:cake", ["cake", "snapkv", "cake:cake"]),
        ("custom:cake", ["cake", "custom"]),
        ("full:ada", ["full"]),
        ("", ["laprox"]),
        ("SnapKV", ["SnapKV", "snapkv"]),
        ("snapkv ", ["snapkv "]),
    ],
)
def test_unknown_policies(toy, policy, words):
    """The message names what was asked for and what there is; a live context goes on as it was."""
    with engine.Model(toy(n_layer=2), engine.params()) as model, engine.Context(model) as ctx:
        for holder in (model, ctx):
            with pytest.raises(engine.Refused) as refused:
                holder.set_params(engine.params(policy))
            assert all(word in str(refused.value) for word in words), refused.value
        assert ctx.get_params().get("policy") == "laprox"


@pytest.fixture
def refused_profile(toy, rng):
    """refused_profile(path, policy): what is said about a profile, for a model and for a live context."""

    def ask(path, policy="lukv", model_path=None):
        said = []
        with engine.Model(model_path or toy(n_layer=2)) as model:
            with pytest.raises(engine.Refused) as refused:
                model.set_params(engine.params(policy, profile=path))
            said.append(str(refused.value))
            model.set_params(engine.params())
            with engine.Context(model) as ctx:
                with pytest.raises(engine.Refused) as refused:
                    ctx.set_params(engine.params(policy, profile=path))
                said.append(str(refused.value))
                ctx.decode(rng.integers(3, 512, 100))
                ctx.compress()
                assert ctx.stats().entries_held == 36 * 4 and ctx.get_params().get("policy") == "laprox"
        assert said[0] == said[1]
        return said[0]

    return ask


def test_absent_profiles(refused_profile, tmp_path):
    assert "none.npy" in refused_profile(tmp_path / "none.npy")
    message = refused_profile(None)
    assert "kv-profile.npy" in message and "laprox profile" in message
    assert str(tmp_path) in refused_profile(tmp_path)  # a folder


@pytest.mark.parametrize("shape", [(99, 3, 2), (99, 2, 4), (99, 2, 1), (98, 2, 2), (99, 2), (99, 2, 2, 1), (2, 2, 99), (0,), ()])
def test_profiles_of_the_wrong_shape(refused_profile, tmp_path, shape):
    """Both shapes are named: the model's where the file's is that of some model."""
    path = write_profile(tmp_path / "curve.npy", np.full(shape, 0.5))
    message = refused_profile(path)
    assert str(path) in message and (str(shape) in message or str(list(shape)) in message), message
    assert ("[99, 2, 2]" if len(shape) == 3 and shape[0] == 99 else "(99, layers, KV heads)") in message, message


@pytest.mark.parametrize("dtype", ["<f8", "<f4", ">f8", "<f2", "<i4", "?", "<c16", "<U3"])
def test_types_of_profiles(toy, refused_profile, tmp_path, dtype):
    """Whatever is not understood is refused, not misread."""
    table = np.full((99, 2, 2), 0.5)
    path = write_profile(tmp_path / "curve.npy", table.astype(dtype))
    if dtype in ("<f8", "<f4"):
        with engine.Model(toy(n_layer=2)) as model:
            model.set_params(engine.params("lukv", profile=path))
    else:
        message = refused_profile(path)
        assert "curve.npy" in message and "float" in message, message


@pytest.mark.parametrize("value", [-0.01, 1.01, np.nan, np.inf])
def test_shares_out_of_range(refused_profile, tmp_path, value):
    table = np.full((99, 2, 2), 0.5)
    table[50, 1, 0] = value
    assert "curve.npy" in refused_profile(write_profile(tmp_path / "curve.npy", table))


def test_damaged_profiles(refused_profile, toy, tmp_path):
    """Cut anywhere in what is needed; another kind of file; the wrong order."""
    path = tmp_path / "curve.npy"
    np.save(path, np.full((99, 2, 2), 0.5))
    data = path.read_bytes()
    for n in (0, 5, 9, 60, 127, 128, 129, len(data) - 1):
        path.write_bytes(data[:n])
        assert "curve.npy" in refused_profile(path)
    for other in (b"\x93NUMPX" + data[6:], b"x" * len(data), toy(n_layer=2).read_bytes()[:5000], data[:6] + b"\x09" + data[7:]):
        path.write_bytes(other)
        assert "curve.npy" in refused_profile(path)
    np.save(path, np.asfortranarray(np.random.default_rng(0).random((99, 2, 2))))
    assert "curve.npy" in refused_profile(path)


def test_profiles_of_others(toy, refused_profile, tmp_path):
    """Both models, both scorers are named. Without notes there is nothing to compare."""
    table, path = np.full((99, 2, 2), 0.5), tmp_path / "curve.npy"
    with engine.Model(toy(n_layer=2)) as model, engine.Model(toy(n_layer=2, seed=1)) as other:
        mine, theirs = model.fingerprint(), other.fingerprint()
    write_profile(path, table, model="another one", fingerprint=theirs, scorer="laprox")
    message = refused_profile(path)
    assert theirs in message and mine in message and "another one" in message
    write_profile(path, table, model="toy", fingerprint=mine, scorer="keydiff")
    message = refused_profile(path)
    assert "keydiff" in message and "laprox" in message and "keydiff:profile" in message
    assert "keydiff" in refused_profile(path, "snapkv:profile")

    with engine.Model(toy(n_layer=2)) as model:
        model.set_params(engine.params("keydiff:profile", profile=path))
        write_profile(path, table, model="toy", fingerprint=mine, scorer="laprox")
        model.set_params(engine.params("lukv", profile=path))
        write_profile(path, table)
        for policy in ("lukv", "snapkv:profile", "keydiff:profile"):
            model.set_params(engine.params(policy, profile=path))


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_profile_beside_the_model(toy, rng, tmp_path, version):
    """Found by name, and followed: heads hold what the row of the budget says, less what is protected."""
    path = shutil.copy(toy(n_layer=2), tmp_path / "model.gguf")
    table = random_table(rng, 2, 2)
    with open(tmp_path / "model.kv-profile.npy", "wb") as f:
        np.lib.format.write_array(f, table, version)
    with engine.Model(path, engine.params("lukv", "40%")) as model, engine.Context(model) as ctx:
        ctx.decode(rng.integers(3, 512, 400))
        ctx.compress()
        for (il, h), pos in ctx.held().items():
            assert abs(len(pos) - 400 * (1 - table[59, il, h])) <= 1
