"""Probes: what text behind a document looks at decides what stays, and what stays is refitted to it. Oracles in NumPy float64."""

from dataclasses import replace

import allocators_reference as ar
import devices
import engine
import numpy as np
import pytest
import scorers_reference as sr
from policy_run import DEFAULT, EXACT, ROUNDED, Run, assert_best, assert_counts, parts

REFITTED = 1e-2 if devices.ROUNDS else 1e-3  # largest error of a value, relative to the largest change
N_TEXT, N_PREFIX, WINDOW = 300, 12, 48
PARTS = [(12, 130), (130, 300)]
PROBE = 110  # tokens behind the text for each part

CASES = [*EXACT, *ROUNDED[:4]]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


class Probed(Run):
    """A text, and what a probe with random tokens finds."""

    def __init__(self, toy, rng, policy, case=DEFAULT, every=0, stride=0, **more):
        settings = {"budget": "30%", "window": WINDOW, "recent": 8, "n_ctx": 512, "n_batch": 256} | more
        super().__init__(toy, rng, policy, case, **settings)
        self.every, self.stride = every, stride
        self.read(N_TEXT - 200)
        self.read(200)
        self.numbers = {}  # of the entries of the text, by layer and head
        self.kept = {}  # queries for the refit, by layer: [n, heads, d]
        self.n_looked = 0

    def look_everywhere(self):
        for part in PARTS:
            self.look(*part)
            assert self.ctx.seq_rm(0, N_TEXT, -1)

    def look(self, first, last, n=PROBE):
        for begin in range(0, n, WINDOW):
            n_now = min(WINDOW, n - begin)
            self.ctx.decode(self.rng.integers(3, 512, n_now))
            self.remember(first, last, n_now)
            self.ctx.probe(N_TEXT, N_PREFIX, first, last, self.every, self.stride)

    def remember(self, first, last, n_now):
        scorer = parts(self.policy)[0]
        raw, over_looks = sr.RAW[scorer], np.hypot if scorer == "energy" else np.maximum
        for il, heads in self.heads().items():
            for i, head in enumerate(heads):
                seen = (head.pos < N_PREFIX) | ((head.pos >= first) & (head.pos < last)) | (head.pos >= N_TEXT)
                q, q_pos = head.q[-n_now:], head.q_pos[-n_now:]
                asked = (q_pos - N_TEXT) % max(1, self.stride) == 0
                q, q_pos = q[asked], q_pos[asked]
                sub = replace(head, pos=head.pos[seen], k=head.k[seen], v=head.v[seen], q=q, q_pos=q_pos)
                best = self.numbers.setdefault((il, i), np.zeros(N_TEXT))
                if not asked.any():
                    continue
                got, text = raw(sub), sub.pos < N_TEXT
                best[sub.pos[text]] = over_looks(best[sub.pos[text]], got[text])
            if self.every:
                q, _ = self.ctx.queries(il)
                mine = [j for j in range(n_now) if (self.n_looked + j) % self.every == 0]
                self.kept.setdefault(il, []).extend(q[-n_now:][mine].astype(np.float64))
        self.n_looked += n_now

    def found(self, pool=lambda x: x) -> ar.Layers:
        candidates = slice(self.sink, N_TEXT - self.recent)
        return ar.Layers(
            pos={pair: np.arange(N_TEXT)[candidates] for pair in self.numbers},
            scores={pair: sr.Scores(pool(numbers[candidates])) for pair, numbers in self.numbers.items()},
            preference={},
            tokens_seen=N_TEXT,
            n_protected=self.sink + self.recent,
        )


@each_case
@pytest.mark.parametrize("policy", ["kvzip", "energy", "oracle:global-raw", "laprox", "snapkv:ada"])
def test_what_a_probe_looks_at_stays(toy, rng, policy, case):
    """A query's attention is shared out between prefix, part and probe; the most over all looks counts, or of energies, all of it."""
    with Probed(toy, rng, policy, case) as run:
        run.look_everywhere()
        pool = {"laprox": lambda x: sr.average_pool(x, 7), "snapkv": sr.max_pool}.get(parts(policy)[0], lambda x: x)
        m = run.found(pool)
        kept = run.compress()
        assert_best(kept, m, case.near)
        assert_counts({pair: len(pos) for pair, pos in kept.items()}, m, parts(policy)[1], case.near)


@pytest.mark.parametrize("stride", [2, 5, 64])
def test_only_some_of_its_tokens_may_look(toy, rng, stride):
    """The others are attended to, and asked nothing; nor need every look have one that is."""
    with Probed(toy, rng, "kvzip", stride=stride, every=4) as run:
        run.look_everywhere()
        assert_best(run.compress(), run.found(), run.case.near)


@pytest.mark.parametrize("every", [0, 4])
def test_what_was_found_counts_again(toy, rng, every):
    """For another budget of the same text, as if the probe had looked again; in another context, too, and after the first is gone."""
    tokens, behind = rng.integers(3, 512, N_TEXT), rng.integers(3, 512, 32)

    def held(budget, found=None):
        with engine.Model(toy("llama"), engine.params("kvzip", budget, window=32)) as model, engine.Context(model, n_ctx=512) as ctx:
            ctx.decode(tokens)
            if found is None:
                ctx.decode(behind)
                ctx.probe(N_TEXT, 0, 0, N_TEXT, every)
                ctx.seq_rm(0, N_TEXT, -1)
                found = ctx.probe_found()
            else:
                ctx.probe_again(found)
            ctx.compress()
            with pytest.raises(engine.Refused, match="no probe has looked at this sequence"):
                ctx.probe_found()
            entries = {pair: ctx.entries(*pair) for pair in ctx.pairs()}
            return found, {pair: (e.pos.tolist(), e.k.tobytes(), e.v.tobytes(), ctx.bias(*pair)) for pair, e in entries.items()}

    found, first = held("30%")
    assert held("30%", found)[1] == first
    assert held("10%", found)[1] == held("10%")[1] != first
    engine.laprox("found_free", found)


def test_what_was_found_belongs_to_a_text_and_a_policy(toy, rng):
    tokens = rng.integers(3, 512, 120)
    with engine.Model(toy("llama"), engine.params("kvzip", "30%", window=32, min_tokens=0)) as model, engine.Context(model, n_ctx=512) as ctx:
        ctx.decode(tokens[:110])
        ctx.probe(100, 0, 0, 100, 2)
        ctx.seq_rm(0, 100, -1)
        found = ctx.probe_found()
        ctx.decode(tokens[100:])
        with pytest.raises(engine.Refused, match="a text of 100 tokens; here are 120"):
            ctx.probe_again(found)
        ctx.seq_rm(0, 100, -1)
        ctx.set_params(engine.params("laprox", "30%", window=32, min_tokens=0))
        with pytest.raises(engine.Refused, match="scored the text by kvzip, and the policy is laprox"):
            ctx.probe_again(found)
        ctx.set_params(engine.params("kvzip", "30%", window=32, min_tokens=0))
        ctx.compress()
        with pytest.raises(engine.Refused, match="here are 100, of which entries were evicted"):
            ctx.probe_again(found)
    for other in ({"n_layer": 2}, {"n_head": 8, "n_head_kv": 8}):
        with engine.Model(toy("llama", **other), engine.params("kvzip", "30%", window=32)) as model, engine.Context(model, n_ctx=512) as ctx:
            ctx.decode(tokens[:100])
            with pytest.raises(engine.Refused, match="a probe of another model"):
                ctx.probe_again(found)
    engine.laprox("found_free", found)


@pytest.mark.parametrize("policy", ["kvzip", "laprox"])
def test_capped_attention_beside_sliding_windows(toy, rng, policy):
    with Probed(toy, rng, policy, arch="gemma2", swa_full=True) as run:
        run.look_everywhere()
        m = run.found(lambda x: sr.average_pool(x, 7) if policy == "laprox" else x)
        assert_best(run.compress(), m, run.case.near)


def test_a_probe_leaves_no_trace_but_its_scores(toy, rng):
    """The text is what it was, and what another policy keeps of it, too."""
    tokens = rng.integers(3, 512, N_TEXT)
    held = []
    for probes in (False, True):
        with engine.Model(toy("llama"), engine.params("kvzip", "30%", window=32)) as model, engine.Context(model, n_ctx=512) as ctx:
            ctx.decode(tokens)
            before = {pair: ctx.entries(*pair) for pair in ctx.pairs()}
            if probes:
                ctx.decode(rng.integers(3, 512, 32))
                ctx.probe(N_TEXT, 0, 0, N_TEXT)
                ctx.seq_rm(0, N_TEXT, -1)
                for pair, entries in before.items():
                    now = ctx.entries(*pair)
                    assert np.array_equal(now.k, entries.k) and np.array_equal(now.v, entries.v)
                assert ctx.seq_rm(0, N_TEXT - 1, -1)  # the scores are gone with a token of the text
                ctx.decode(tokens[-1:])
            else:
                assert ctx.seq_rm(0, N_TEXT - 1, -1)
                ctx.decode(tokens[-1:])
            ctx.set_params(engine.params("keydiff", "30%", window=32))
            ctx.compress()
            held.append({pair: ctx.positions(*pair).tolist() for pair in ctx.pairs()})
    assert held[0] == held[1]


def test_a_question_needs_no_probe(toy, rng):
    """Where a prompt goes on instead, its own end decides, as if nothing had been looked at."""
    tokens, held = rng.integers(3, 512, N_TEXT + 20), []
    for probes in (False, True):
        with engine.Model(toy("llama"), engine.params("kvzip", "30%", window=32)) as model, engine.Context(model, n_ctx=512) as ctx:
            ctx.decode(tokens[:N_TEXT])
            if probes:
                ctx.decode(rng.integers(3, 512, 32))
                ctx.probe(N_TEXT, 0, 0, N_TEXT, 4)
                ctx.seq_rm(0, N_TEXT, -1)
            ctx.decode(tokens[N_TEXT:])
            ctx.prompt_done()
            held.append({pair: (ctx.positions(*pair).tolist(), ctx.bias(*pair)) for pair in ctx.pairs()})
    assert held[0] == held[1]


def test_refusals(toy, rng):
    with engine.Model(toy("llama"), engine.params("kvzip", "30%", window=32, min_tokens=0)) as model, engine.Context(model, n_ctx=512) as ctx:
        ctx.decode(rng.integers(3, 512, 100))
        with pytest.raises(engine.Refused, match=r"n_text is 100; accepted: 1 to 99"):
            ctx.probe(100, 0, 0, 100)
        ctx.decode(rng.integers(3, 512, 33))
        with pytest.raises(engine.Refused, match=r"33 tokens were evaluated since the last look; accepted: 1 to 32"):
            ctx.probe(100, 0, 0, 100)
        ctx.seq_rm(0, 100, -1)
        ctx.decode(rng.integers(3, 512, 5))
        for part in [(5, 4, 50), (0, 50, 50), (0, 0, 101), (-1, 0, 5)]:
            with pytest.raises(engine.Refused, match="doesn't lie within a text of 100 tokens"):
                ctx.probe(100, *part)
        with pytest.raises(engine.Refused, match="every is -1; accepted: 0 or more"):
            ctx.probe(100, 0, 0, 100, -1)
        with pytest.raises(engine.Refused, match="stride is -1; accepted: 0 or more"):
            ctx.probe(100, 0, 0, 100, 0, -1)
        ctx.probe(100, 0, 0, 100)
        with pytest.raises(engine.Refused, match="0 tokens were evaluated since the last look"):
            ctx.probe(100, 0, 0, 100)
        with pytest.raises(engine.Refused, match="a text of 100 tokens, and the sequence has 105; remove those behind the text first"):
            ctx.compress()
        ctx.seq_rm(0, 100, -1)
        ctx.set_params(engine.params("laprox", "30%", window=32, min_tokens=0))
        with pytest.raises(engine.Refused, match="scored the text by kvzip, and the policy is laprox now"):
            ctx.compress()
        assert ctx.stats().entries_held == ctx.stats().entries_full
        ctx.set_params(engine.params("kvzip", "30%", window=32, min_tokens=0))
        ctx.compress()
        assert ctx.stats().entries_held < ctx.stats().entries_full
        ctx.decode(rng.integers(3, 512, 5))
        with pytest.raises(engine.Refused, match="entries of this sequence were evicted already"):
            ctx.probe(100, 0, 0, 100)
        ctx.clear()
        ctx.decode(rng.integers(3, 512, 20))
        ctx.seq_rm(0, 5, 8)
        with pytest.raises(engine.Refused, match="without gaps"):
            ctx.probe(10, 0, 0, 10)
        for policy in ("keydiff", "random", "full"):
            ctx.set_params(engine.params(policy, "30%", window=32))
            with pytest.raises(engine.Refused, match=f"policy {policy} doesn't score by queries"):
                ctx.probe(10, 0, 0, 10)


# --- refit -------------------------------------------------------------------------------------------------------------


def attention(q, k, scale, softcap, bias=0.0):
    logits = q @ k.T * scale
    if softcap:
        logits = softcap * np.tanh(logits / softcap)
    return sr.softmax(logits + bias)


def refitted(head, kept, q, n_prefix, recent):
    """(values, bias) by the formulas, or None where the error of the queries held out doesn't fall. q: [n, g, d]."""
    if len(kept) > 0.75 * len(head.pos):
        return None
    tests = np.array([i // 4 % 5 == 4 for i in range(len(q))])
    rows = [q[which].transpose(1, 0, 2).reshape(-1, q.shape[2]) for which in (~tests, tests)]  # by query head, then query
    at = np.isin(head.pos, kept)
    k, v = head.k[at], head.v[at]
    biased = (kept >= n_prefix) & (kept < len(head.pos) - recent)
    full = [attention(x, head.k, head.scale, head.softcap) for x in rows]
    wanted = [a @ head.v for a in full]
    free, bound = (full[0][:, at][:, which].sum(1) for which in (~biased, biased))
    bias = np.clip(np.log((bound * (1 - free)).sum() / (bound**2).sum()), -3, 3)
    added = np.where(biased, np.float16(bias), 0.0)
    x = attention(rows[0], k, head.scale, head.softcap, added)
    fitted = v + np.linalg.solve(x.T @ x + np.eye(len(k)), x.T @ (wanted[0] - x @ v))
    held_out = [((attention(rows[1], k, head.scale, head.softcap, b) @ values - wanted[1]) ** 2).sum() for b, values in ((0, v), (added, fitted))]
    return (fitted, np.float16(bias), held_out[1] / held_out[0])


@pytest.mark.parametrize("budget", ["8%", "30%", "60%"])
@each_case
def test_refit(toy, rng, case, budget):
    """Ridge of absolute size towards the values there were, one bias per KV head: both against NumPy's, in float64."""
    with Probed(toy, rng, "kvzip", case, every=3, budget=budget) as run:
        check_refit(run)


def test_refit_of_capped_attention_beside_sliding_windows(toy, rng):
    with Probed(toy, rng, "kvzip", every=3, budget="20%", arch="gemma2", swa_full=True) as run:
        check_refit(run)


def check_refit(run):
    run.look_everywhere()
    full = run.heads()
    run.compress()
    n_fitted, case = 0, run.case
    rough = case.error > 1e-3
    for il, heads in full.items():
        group = heads[0].w_o.shape[0]
        for i, head in enumerate(heads):
            now = run.ctx.entries(il, i)
            head.k, head.v, head.pos = head.k[:N_TEXT], head.v[:N_TEXT], head.pos[:N_TEXT]
            q = np.array(run.kept[il])[:, i * group : (i + 1) * group]
            want = refitted(head, now.pos, q, N_PREFIX, run.recent)
            before, bias = head.v[now.pos], run.ctx.bias(il, i)
            if want is not None and abs(want[2] - 1) < 1e-3:
                continue  # by rounding, one or the other
            if want is None or want[2] > 1:
                assert bias == 0 and np.array_equal(now.v, before)
                continue
            n_fitted += 1
            assert bias == pytest.approx(want[1], abs=2e-2 if rough else 2e-3)
            # a quantised row is as coarse as its type, whatever was fitted
            near = {"f32": 1e-3, "f16": 0.05}.get(case.cache)
            if near is not None:
                assert np.abs(now.v - want[0]).max() < near * np.abs(want[0] - before).max() + (2e-3 * np.abs(want[0]).max() if rough else 0)
            assert not np.array_equal(now.v, before)
    assert n_fitted > 0


def test_refit_of_heads_with_more_entries_than_queries(toy, rng):
    """Solved over queries then, with the same result."""
    with Probed(toy, rng, "kvzip", DEFAULT, every=10, budget="60%") as run:
        run.look_everywhere()
        full = run.heads()
        run.compress()
        for il, heads in full.items():
            for i, head in enumerate(heads):
                now = run.ctx.entries(il, i)
                head.k, head.v, head.pos = head.k[:N_TEXT], head.v[:N_TEXT], head.pos[:N_TEXT]
                q = np.array(run.kept[il])[:, i * 4 : (i + 1) * 4]
                assert q.shape[0] * q.shape[1] < len(now.pos)
                want = refitted(head, now.pos, q, N_PREFIX, run.recent)
                if want is not None and want[2] < 0.999:
                    assert np.abs(now.v - want[0]).max() < REFITTED * np.abs(want[0] - head.v[now.pos]).max() + 1e-6


def test_a_bias_is_attended_with(toy, rng):
    """What the engine computes after a refit is what NumPy does with its biases, and a saved state and a copy carry them."""
    with Probed(toy, rng, "kvzip", DEFAULT, every=3, budget="20%", n_ctx=1024, n_seq_max=2) as run:
        run.look_everywhere()
        run.compress()
        ctx = run.ctx
        biases = {pair: ctx.bias(*pair) for pair in ctx.pairs()}
        assert any(biases.values())
        for (il, i), bias in biases.items():
            e = ctx.entries(il, i)
            run.net.pos[il, i], run.net.k[il, i], run.net.v[il, i] = e.pos, e.k.astype(float), e.v.astype(float)
            run.net.bias[il, i] = lambda pos, bias=bias: np.where((pos >= N_PREFIX) & (pos < N_TEXT - run.recent), bias, 0)
        state = ctx.seq_save(0)
        ctx.seq_cp(0, 1)
        token = run.rng.integers(3, 512, 1)
        logits = ctx.decode(token)
        want = run.net.decode(token, [N_TEXT])
        assert np.abs(logits - want).max() < 1e-3 * np.abs(want).max()
        assert np.array_equal(ctx.decode(token, seq=1), logits)
        assert {pair: ctx.bias(*pair, seq=1) for pair in ctx.pairs()} == biases
        ctx.clear()
        assert not any(ctx.bias(*pair) for pair in ctx.pairs())
        assert ctx.seq_load(state, 0)
        assert {pair: ctx.bias(*pair) for pair in ctx.pairs()} == biases
        assert np.array_equal(ctx.decode(token), logits)


def test_a_state_of_what_was_refitted_behind_a_long_prefix(toy, rng):
    """More of it than leaves the tail: the biases are of none of what is kept."""
    with engine.Model(toy(), engine.params("kvzip", "60%", min_tokens=0, window=64)) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(rng.integers(3, 512, 400))
        ctx.decode(rng.integers(3, 512, 40))
        ctx.probe(400, 380, 380, 400, every=1)
        assert ctx.seq_rm(0, 400, -1)
        ctx.compress()
        assert ctx.stats().entries_held < ctx.stats().entries_full
        assert ctx.seq_load(ctx.seq_save()), engine.last_error()
