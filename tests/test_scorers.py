"""Every scorer against NumPy float64 oracles on random models, and scores of one's own."""

import allocators_reference as ar
import engine
import numpy as np
import pytest
import scorers_reference as sr
from policy_run import DEFAULT, Run, each_case


def test_every_scorer_has_an_oracle():
    """Random has none, custom is anything, and retention is what a trained network says."""
    assert set(engine.scorers()) - {"random", "custom", "retention"} <= set(sr.SCORES)
    assert set(engine.allocators()) == set(ar.ALLOCATORS)


# --- finished scores ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", sr.SCORES)
def test_finished_scores(toy, rng, scorer):
    """What a head's candidates are ranked by. What is protected has none."""
    with Run(toy, rng, f"{scorer}:uniform", window=200 if scorer == "expected" else 32, n_ctx=512) as run:
        run.read(200)
        run.ctx.score()
        for il, layer in run.heads().items():
            for i, (h, want) in enumerate(zip(layer, sr.SCORES[scorer](layer))):
                got = run.ctx.finished_scores(il, i)
                assert np.isnan(np.delete(got, range(h.first, h.last))).all() and len(got) == len(h.pos)
                got, want = got[h.candidates], want.score
                if scorer == "defensivekv":  # those that come before all others only need to
                    assert np.array_equal(got > 1, want > 1)
                    got, want = got[got <= 1], want[want <= 1]
                assert np.abs(got - want).max() < 10 * DEFAULT.error * np.abs(want).max()


# --- raw scores ------------------------------------------------------------------------------------------------------


def check_raw(run: Run, scorers=tuple(s for s in sr.RAW if s != "expected")):
    heads = run.heads()
    for scorer in scorers:
        run.set(f"{scorer}:uniform")
        got = run.ctx.score()
        assert got.keys() == {(il, i) for il in heads for i in range(len(heads[il]))}
        for (il, i), numbers in got.items():
            want = sr.RAW[scorer](heads[il][i])
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
            check_raw(run, ["expected"] if policy == "expected" else [s for s in sr.RAW if s != "expected"])


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
                for i, h in enumerate(sr.heads_of(ctx, run.net, il, run.sink, run.recent, seq)):
                    group = q.shape[1] // n
                    h.expected = sr.expected_logits(h, q[:, i * group : (i + 1) * group].astype(np.float64), pos, run.sink, run.net.rope_base, False)
                    assert np.allclose(got[il, i], sr.expected(h), rtol=run.case.error, atol=0)


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


# --- scores of one's own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["custom", "custom:uniform", "custom:ada"])
def test_custom_scorer(toy, rng, monkeypatch, policy):
    """It is asked once per head, for what the head holds, and may look inside."""
    monkeypatch.setitem(sr.SCORES, "custom", sr.plain(lambda h: np.abs(h.v).max(1)))
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
