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


@pytest.mark.parametrize("type_kv", ["f16", "q8_0"])
def test_queries_of_layers_without_rope_are_not_rotated(toy, rng, monkeypatch, type_kv):
    """Which layers these are, architectures say in their graphs alone; a quantised cache rotates queries on its own account."""
    with engine.Model(toy("smollm3"), engine.params("expected", "20%", min_tokens=0, window=256)) as model:
        with engine.Context(model, n_ctx=512, type_k=type_kv, type_v=type_kv) as ctx:
            ctx.decode(rng.integers(3, 512, 200))
            got = ctx.score()
            for il in range(4):
                if il == 3:
                    monkeypatch.setattr(sr, "rope", lambda x, *_: x)
                    monkeypatch.setattr(sr, "mean_rotation", lambda *_: np.eye(model.head_dim))
                q, q_pos = ctx.queries(il)
                for i in range(2):
                    e, mine = ctx.entries(il, i), slice(i * model.n_head // 2, (i + 1) * model.n_head // 2)
                    h = sr.Head(e.pos, e.k.astype(np.float64), e.v.astype(np.float64), q, q_pos, None, model.head_dim**-0.5, 0.0, first=4, last=168)
                    h.expected = sr.expected_logits(h, q[:, mine].astype(np.float64), q_pos, 4, 10000.0, False)
                    want = sr.expected(h)
                    assert np.abs(got[il, i] - want).max() < 10 * DEFAULT.error * want.max(), (il, i)


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


def expected_scores(ctx):
    """Of everything, whatever was evicted before."""
    ctx.set_params(engine.params("expected", "100%", min_tokens=0, archive="ram"))
    ctx.compress()
    return ctx.score()


def test_what_a_recall_evaluates_again_counts_once(toy, rng):
    """In the first layer, queries don't depend on what is held: its scores are those of a cache that was never compressed."""
    doc, turn = rng.integers(3, 512, 300), rng.integers(3, 512, 40)
    with engine.Model(toy(n_layer=1), engine.params("expected", "20%", min_tokens=0, archive="ram")) as model:
        with engine.Context(model, n_ctx=1024) as ctx, engine.Context(model, n_ctx=1024) as whole:
            ctx.decode(doc)
            ctx.prompt_done()
            ctx.decode(turn)
            while (again := ctx.prompt_done()) is not None:
                ctx.decode(turn[again - 300 :])
            assert ctx.stats().recalls >= 2
            whole.decode([*doc, *turn])
            wanted = expected_scores(whole)
            for pair, got in expected_scores(ctx).items():
                assert np.allclose(got, wanted[pair], rtol=1e-4, atol=0)


@pytest.mark.parametrize("after", [10, 30, 50, 70])
def test_an_aborted_batch_that_comes_again_counts_once(toy, rng, after):
    """Some layers had added its queries, others hadn't."""
    first, tokens = rng.integers(3, 512, 200), rng.integers(3, 512, 150)
    with engine.Model(toy(n_layer=3), engine.params("expected", "20%", min_tokens=0, archive="ram")) as model:
        with engine.Context(model, n_ctx=1024) as ctx, engine.Context(model, n_ctx=1024) as whole:
            ctx.decode(first)
            ctx.abort_after(after)
            with pytest.raises(engine.Refused, match="returned 2"):
                ctx.decode(tokens)
            ctx.abort_after(None)
            whole.decode(first)
            for c in (ctx, whole):
                c.decode(tokens)
            assert all(np.array_equal(got, want) for got, want in zip(ctx.score().values(), whole.score().values()))


@pytest.mark.parametrize(("cut", "others"), [(100, 150), (4, 150), (2, 150), (190, 30)])
def test_other_tokens_take_the_share_of_those_that_were_cut_off(toy, rng, cut, others):
    """The mean stays, its weight is the number of positions. A few, drafts say, stay in place of those that come."""
    with Run(toy, rng, "expected", window=256, n_layer=1, n_ubatch=128) as run:
        run.read(200)
        assert run.ctx.seq_rm(0, cut, -1)
        run.read(others)
        (q, pos), (q_new, pos_new) = run.queries[0]
        drafts = 200 - cut <= 64
        counts = np.full(200, 1.0 if drafts else max(0, cut - 4) / 196)
        new = np.where(pos_new < 200, 0.0, 1.0) if drafts else np.ones(others)
        assert counts[4:].sum() + new[pos_new >= 4].sum() == pytest.approx(cut + others - 4)
        q, pos, counts = np.concatenate([q, q_new]), np.concatenate([pos, pos_new]), np.concatenate([counts, new])
        got = run.ctx.score()
        for i, h in enumerate(sr.heads_of(run.ctx, run.net, 0, run.sink, run.recent)):
            group = q.shape[1] // run.ctx.layers()[0][1]
            mine = q[:, i * group : (i + 1) * group].astype(np.float64)
            h.expected = sr.expected_logits(h, mine, pos, run.sink, run.net.rope_base, False, weights=counts)
            assert np.allclose(got[0, i], sr.expected(h), rtol=run.case.error, atol=0)


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
