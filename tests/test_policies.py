"""What every policy keeps, against NumPy float64 oracles on random models; and what is no policy."""

import engine
import numpy as np
import pytest
import scorers_reference as sr
from policy_run import F32, GQA, MQA, PRESETS, Case, Run, each_exact, each_rounded, profile_for


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
@pytest.mark.parametrize("scorer", [s for s in sr.SCORES if s != "streaming"])
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
                assert np.array_equal(kept[pair], sr.best(np.arange(4, 268), sr.Scores(everything[pair][4:268]), len(kept[pair])))
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


# --- no policies -----------------------------------------------------------------------------------------------------


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
