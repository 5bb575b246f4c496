"""laprox.Policy, and policies as scorer:allocator, on small random models."""

# ruff: noqa: F811 - fixtures are imported

import re
from pathlib import Path

import numpy as np
import pytest
from policy_run import write_profile
from python_policies import Answers, Broken, N, Newest, SmallKeys, compressed, held, load, read, tokens  # noqa: F401
from test_python_api import pairs, prompt_of

import laprox
from laprox import KVConfig, LaproxError, Llama, Policy, _core

DOCS = Path(__file__).parent.parent / "docs" / "python.md"


# --- names -----------------------------------------------------------------------------------------------------------


def test_lists_are_the_engines():
    assert {"laprox", "full", "streaming", "pyramidkv"} <= set(laprox.policies())
    assert {"laprox", "snapkv", "streaming"} <= set(laprox.scorers())
    assert {"uniform", "global", "ada"} <= set(laprox.allocators())
    assert "custom" not in laprox.policies() + laprox.scorers()  # that is a Policy
    assert dict(zip(_core.policies(), _core.meanings()))["pyramidkv"] == "snapkv:pyramid"


@pytest.mark.parametrize("policy", ["snapkv", "pyramidkv", "snapkv:ada", "laprox:uniform", "streaming:global", Newest()])
def test_policies(policy):
    assert KVConfig(policy=policy).policy is policy


@pytest.mark.parametrize(
    "policy", ["snap", "snapkv:", ":ada", "snapkv:adda", "pyramidkv:ada", "snapkv:ada:ada", "custom", "custom:ada", "off:ada"]
)
def test_no_policies(policy):
    with pytest.raises(ValueError) as refused:
        KVConfig(policy=policy)
    message = str(refused.value)
    assert message.startswith(f'kv policy is "{policy}"') and "; accepted: off, " in message
    for name in [*laprox.policies(), *laprox.scorers(), *laprox.allocators()]:
        assert name in message


def test_no_objects():
    with pytest.raises(ValueError, match=r"accepted: an instance of it, Newest\(\)"):
        KVConfig(policy=Newest)
    with pytest.raises(ValueError, match='^kv policy is "custom:best" .there is no allocator "best".; accepted: .*uniform'):
        KVConfig(policy=SmallKeys(allocator="best"))
    with pytest.raises(ValueError, match="^kv policy is <object .*; accepted: off, .*, or a laprox.Policy$"):
        KVConfig(policy=object())
    with pytest.raises(TypeError, match="abstract.*score"):
        type("Empty", (Policy,), {})()


def test_an_allocator_that_needs_more_than_scores(load):
    with pytest.raises(ValueError, match="preference"):
        load(SmallKeys(allocator="cake"))


def test_a_name_is_its_scorer_and_allocator(read):
    kept = {policy: compressed(read(policy)) for policy in ("pyramidkv", "snapkv:pyramid", "snapkv", "snapkv:uniform")}
    assert kept["pyramidkv"] == kept["snapkv:pyramid"] != kept["snapkv"] == kept["snapkv:uniform"]


def test_profiles(load, tmp_path):
    assert KVConfig().params().get("profile") == ""
    assert KVConfig(profile=tmp_path / "a.gguf").params().get("profile") == str(tmp_path / "a.gguf")
    for wrong in (7, b"a.gguf", "", "a\0.gguf"):
        with pytest.raises(ValueError, match="^kv profile is .*; accepted: the path of a file$"):
            KVConfig(profile=wrong)
    with pytest.raises(ValueError, match='^kv profile is "curves.npy" .*; accepted: .*`laprox profile MODEL --convert curves.npy '):
        KVConfig(profile="curves.npy")
    with pytest.raises(ValueError, match="missing.gguf"):
        load("lukv", kv_profile=tmp_path / "missing.gguf")


# --- the same as the engine's own ------------------------------------------------------------------------------------


def test_the_example_of_the_docs(toy, tokens, tmp_path, monkeypatch):
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S) if "(Policy)" in code]
    assert len(list(filter(None, example.splitlines()))) <= 10
    (tmp_path / "model.gguf").symlink_to(toy())
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(example, namespace)
    ours, theirs = namespace["llm"], Llama("model.gguf", kv_policy="knorm", kv_budget="10%", verbose=False)
    for llm in (ours, theirs):
        llm.kv.set(min_tokens=0)
        llm.eval(tokens)
    assert compressed(ours) == compressed(theirs)
    assert ours.kv.stats().entries_held == N // 10 * pairs(ours)


def test_newest_is_streaming(read):
    assert compressed(read(Newest())) == compressed(read("streaming"))


@pytest.mark.parametrize("allocator", ["uniform", "global", "global-raw", "ada", "pyramid"])
def test_every_allocator(read, allocator):
    assert compressed(read(SmallKeys(allocator))) == compressed(read(f"knorm:{allocator}"))


def test_a_profile_is_for_custom_policies_too(read, tmp_path):
    """Its first layer keeps all, its last the rest."""
    table = np.zeros((99, 2, 2))
    table[:, 1] = np.clip(2 * np.arange(1, 100) / 100, 0, 1)[:, None]
    profile = write_profile(tmp_path / "p.gguf", table)
    ours, theirs = (read(p, "60%", kv_profile=profile) for p in (SmallKeys("profile"), "knorm:profile"))
    kept = compressed(ours)
    assert kept == compressed(theirs)
    assert len(kept[0, 0]) > 2 * len(kept[1, 0])


@pytest.mark.parametrize("arch, cache", [("llama", {}), ("llama", {"type_k": 8, "type_v": 8}), ("gemma2", {}), ("lfm2", {})])
def test_what_a_head_sees(load, rng, arch, cache):
    """Attention of the window over the keys, in NumPy, is the engine's. gemma2 scales its queries, and caps logits."""

    def attention(head):
        assert head.queries.shape[0] == len(head.query_positions) == 16
        assert head.queries.dtype == head.keys.dtype == head.values.dtype == np.float32
        assert head.keys.shape == head.values.shape == (len(head.positions), 64)
        logits = np.einsum("wgd,nd->wgn", head.queries, head.keys) / (1 if arch == "gemma2" else 8)
        if arch == "gemma2":
            logits = 8 * np.tanh(logits / 8)
        logits[np.broadcast_to(head.positions > head.query_positions[:, None, None], logits.shape)] = -np.inf
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return (weights / weights.sum(-1, keepdims=True)).mean((0, 1))

    llm = load(Answers(attention), arch=arch, kv_window=16, **cache)
    llm.eval(prompt_of(rng, 200))
    ours = llm.kv.scores()
    llm.kv.set(policy="snapkv")
    for il, heads in llm.kv.scores().items():
        for head, theirs in enumerate(heads):
            np.testing.assert_allclose(ours[il][head], theirs, rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("budget, n", [("10%", 40), ("33%", 132), (50, 50)])
def test_budgets_are_exact(read, budget, n):
    llm = read(SmallKeys("global-raw"), budget)
    llm.kv.compress()
    assert llm.kv.stats().entries_held == n * pairs(llm)


# --- masks -----------------------------------------------------------------------------------------------------------


PROTECTED = [*range(4), *range(N - 32, N)]


@pytest.mark.parametrize("false", [False, -np.inf])
def test_a_mask_decides_alone_within_the_budget(read, false):
    def every_third(head):
        wanted = head.positions % 3 == head.index
        return wanted if false is False else np.where(wanted, head.positions % 7, -np.inf)

    for (_, head), positions in compressed(read(Answers(every_third), "99%")).items():
        assert positions == sorted({*range(head, N, 3), *PROTECTED})


def test_a_mask_over_the_budget_keeps_the_latest(read):
    for positions in compressed(read(Answers(lambda head: head.positions % 2 == 1), "20%")).values():
        odd = [p for p in range(4, N - 32) if p % 2]
        assert positions == sorted({*PROTECTED, *odd[-(80 - len(PROTECTED)) :]})


def test_a_mask_of_nothing_keeps_what_is_protected(read):
    assert set(map(tuple, compressed(read(Answers(lambda head: head.positions < 0))).values())) == {tuple(PROTECTED)}


def test_not_asked_where_nothing_has_to_go(read):
    for policy, settings in ((Answers(None), {"budget": "100%"}), (Answers(None), {"kv_min_tokens": N})):
        llm = read(policy, **settings)
        llm.kv.compress()
        assert policy.asked == [] and llm.kv.stats().compressions == 0


def test_every_head_is_asked_once(read):
    policy = Answers(lambda head: head.positions)
    llm = read(policy)
    llm.kv.compress()
    assert policy.asked == [(il, head) for il, n in llm.kv.layers.items() for head in range(n)]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, error, reason",
    [
        (None, TypeError, f"returned None; accepted: {N} numbers, or booleans"),
        ("newest", TypeError, "returned 'newest'"),
        (lambda head: head.positions.astype(str), TypeError, "returned an array of <U"),
        (lambda head: head.positions + 1j, TypeError, "returned an array of complex"),
        (1.0, ValueError, r"returned an array of shape \(\)"),
        (lambda head: head.positions[1:], ValueError, rf"returned an array of shape \({N - 1},\); accepted: {N} numbers"),
        (lambda head: head.keys, ValueError, rf"returned an array of shape \({N}, 64\)"),
        (lambda head: np.where(head.positions == 17, np.nan, 1), ValueError, "returned nan for position 17"),
        (lambda head: np.where(head.positions == 17, np.inf, 1), ValueError, "returned inf for position 17"),
        (lambda head: np.full(N, 1e300), ValueError, r"returned 1e\+300 for position 0; accepted: .*float32"),
    ],
)
def test_answers_that_are_none(read, answer, error, reason):
    llm = read(Answers(answer))
    before = held(llm)
    for call in (llm.kv.compress, llm.kv.scores):
        with pytest.raises(error, match=rf"^Answers\.score\(\), layer 0, head 0, {reason}"):
            call()
    assert held(llm) == before and llm.kv.stats().compressions == 0
    llm.kv.set(policy="streaming")
    assert compressed(llm)[1, 1] == [*range(4), *range(N - 76, N)]


def test_an_exception_comes_out_as_it_was_raised(read, tokens):
    error = ZeroDivisionError("mine")
    llm = read(Broken(error))
    before = held(llm)
    for call in (
        llm.kv.compress,
        llm.kv.scores,
        lambda: llm.create_completion(tokens, max_tokens=4),
        lambda: list(llm.create_completion(tokens, max_tokens=4, stream=True)),
        lambda: next(llm.generate(tokens)),
    ):
        with pytest.raises(ZeroDivisionError) as raised:
            call()
        assert raised.value is error
        assert [frame.name for frame in raised.traceback][-1] == "score"
        assert isinstance(error.__cause__, LaproxError)  # the engine's side of it
        error.__cause__ = None
        assert held(llm) == before

    llm.kv.config.policy.error = None
    llm.kv.compress()
    assert llm.kv.stats().compressions == 1


def test_an_exception_keeps_its_own_cause(read):
    class Careful(Policy):
        def score(self, head):
            try:
                return {}["weights"]
            except KeyError as error:
                raise RuntimeError("no weights") from error

    with pytest.raises(RuntimeError, match="no weights") as raised:
        read(Careful()).kv.compress()
    assert isinstance(raised.value.__cause__, KeyError)


def test_after_an_exception_the_cache_is_exact(read):
    llm, exact = read(Broken()), read("full")
    with pytest.raises(ZeroDivisionError):
        llm.kv.compress()
    for each in (llm, exact):
        each.eval([300, 301])
    assert llm.sample(temp=0.0) == exact.sample(temp=0.0)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_an_interrupt_is_one(read, error):
    with pytest.raises(type(error)):
        read(Broken(error)).kv.compress()
