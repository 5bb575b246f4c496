"""laprox.Policy, and policies as scorer:allocator, on small random models."""

import gc
import pickle
import re
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from test_python_api import greedy, pairs, prompt_of

import laprox
from laprox import KVConfig, LaproxError, Llama, Policy, _core

N = 400
DOCS = Path(__file__).parent.parent / "docs" / "python.md"


class Newest(Policy):
    allocator = "uniform"

    def score(self, head):
        return head.positions


class SmallKeys(Policy):
    def __init__(self, allocator="uniform"):
        self.allocator = allocator

    def score(self, head):
        return -np.linalg.norm(head.keys, axis=1)


class Answers(Policy):
    """Whatever a test wants, and how often it was asked."""

    allocator = "uniform"

    def __init__(self, answer):
        self.answer = answer
        self.asked = []

    def score(self, head):
        self.asked.append((head.layer, head.index))
        return self.answer(head) if callable(self.answer) else self.answer


class Broken(Policy):
    """Raises until it is mended."""

    allocator = "uniform"

    def __init__(self, error=None):
        self.error = error or ZeroDivisionError("mine")

    def score(self, head):
        if self.error:
            raise self.error
        return head.positions


@pytest.fixture
def load(toy):
    """load(policy, budget, **kwargs): a Llama on a small random model."""

    def make(policy, budget="20%", arch="llama", **kwargs):
        kwargs = {"kv_min_tokens": 64, "n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False, **kwargs}
        path = toy(arch, **({"n_layer": 2} if arch == "llama" else {}))
        return Llama(str(path), kv_policy=policy, kv_budget=budget, **kwargs)

    return make


@pytest.fixture
def tokens(rng):
    return prompt_of(rng, N)


@pytest.fixture
def read(load, tokens):
    """read(policy, budget, **kwargs): the same, N tokens into a document, nothing evicted yet."""

    def make(*args, **kwargs):
        llm = load(*args, **kwargs)
        llm.eval(tokens)
        return llm

    return make


def held(llm):
    return {(il, head): llm.kv.positions(il, head).tolist() for il, n in llm.kv.layers.items() for head in range(n)}


def compressed(llm):
    llm.kv.compress()
    return held(llm)


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
    assert KVConfig(profile=tmp_path / "a.npy").params().get("profile") == str(tmp_path / "a.npy")
    for wrong in (7, b"a.npy", "", "a\0.npy"):
        with pytest.raises(ValueError, match="^kv profile is .*; accepted: the path of a file$"):
            KVConfig(profile=wrong)
    with pytest.raises(ValueError, match="missing.npy"):
        load("lukv", kv_profile=tmp_path / "missing.npy")


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
    np.save(tmp_path / "p.npy", table)
    ours, theirs = (read(p, "60%", kv_profile=tmp_path / "p.npy") for p in (SmallKeys("profile"), "knorm:profile"))
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


# --- when there is no room -------------------------------------------------------------------------------------------


def feed(llm, tokens, n=64):
    for start in range(0, len(tokens), n):
        llm.eval(tokens[start : start + n])


def chunked(load, policy, n_ctx=1024):
    return load(policy, 64, kv_prefill="chunked", n_ctx=n_ctx, n_batch=64, n_ubatch=64)


def test_compressed_while_a_prompt_comes_in(load, rng):
    ours, theirs, tokens = chunked(load, Newest(), 3072), chunked(load, "streaming", 3072), prompt_of(rng, 2500)
    for llm in (ours, theirs):
        feed(llm, tokens)
    assert held(ours) == held(theirs)
    assert ours.kv.stats().compressions == theirs.kv.stats().compressions >= 1


def test_no_room_because_of_an_exception(load, rng):
    """The batch is refused with the reason, and goes in once the policy works."""
    policy, tokens = Broken(), prompt_of(rng, 900)
    llm = chunked(load, policy)
    with pytest.raises(RuntimeError, match="llama_decode returned 1: no room for 64 more tokens") as raised:
        feed(llm, tokens)
    assert raised.value.__cause__ is policy.error
    n = llm.n_tokens
    assert 0 < n < 900 and llm.kv.stats().tokens_seen == n
    policy.error = None
    feed(llm, tokens[n:])
    assert llm.n_tokens == 900 and llm.kv.stats().compressions > 0


def test_an_interrupt_while_there_is_no_room(load, rng):
    with pytest.raises(KeyboardInterrupt):
        feed(chunked(load, Broken(KeyboardInterrupt())), prompt_of(rng, 900))


def test_room_in_spite_of_an_exception(load, rng):
    """A byte budget that could not be held: the cache grows, with one warning."""
    policy = Broken()
    policy.error = None
    llm = load(policy, "400KiB", n_ctx=2048)
    llm.eval(prompt_of(rng, N))
    llm.kv.compress()
    policy.error = ZeroDivisionError("mine")
    with pytest.warns(RuntimeWarning, match=r"Broken\.score\(\) failed and the cache was not compressed: .*mine") as warned:
        for token in prompt_of(rng, 600):
            llm.eval([token])
    assert len(warned) == 1
    assert llm.kv.stats().compressions == 1 and llm.n_tokens == N + 600


# --- settings, several at once, and the end --------------------------------------------------------------------------


def test_changing_to_a_policy_and_back(read):
    policy = Answers(lambda head: head.positions)
    llm = read("laprox", "50%")
    llm.kv.set(policy=policy)
    assert llm.kv.config.policy is policy
    llm.kv.scores()
    llm.kv.set(budget="40%")
    llm.kv.scores()
    assert len(policy.asked) == 2 * pairs(llm)
    llm.kv.set(policy="streaming")
    llm.kv.scores()
    assert compressed(llm) == compressed(read("streaming", "40%"))
    assert len(policy.asked) == 2 * pairs(llm)


def test_a_refused_change_keeps_the_policy(read):
    before, after = Answers(lambda head: head.positions), Answers(None)
    llm = read(before)
    for wrong in ({"budget": 5000}, {"window": 64}):
        with pytest.raises(LaproxError):
            llm.kv.set(policy=after, **wrong)
        with pytest.raises(LaproxError):
            llm.kv.set(policy="laprox", **wrong)
    llm.kv.compress()
    assert len(before.asked) == pairs(llm) and after.asked == []


def test_two_at_once(load, tokens):
    """Generations taking turns, each with its own policy."""
    expected = greedy(load("streaming"), tokens), greedy(load("knorm"), tokens)
    a, b = (load(policy).generate(tokens, temp=0.0) for policy in (Newest(), SmallKeys()))
    mixed = [(next(a), next(b)) for _ in range(12)]
    assert tuple(map(list, zip(*mixed))) == expected


def test_two_threads(read):
    """Each in its own: what one does inside score() keeps the other's Llama usable."""
    both = threading.Barrier(2, timeout=60)

    def wait(head):
        both.wait()
        return head.positions

    llms = [read(Answers(wait)), read(Answers(wait))]
    threads = [threading.Thread(target=llm.kv.compress) for llm in llms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held(llms[0]) == held(llms[1]) == compressed(read("streaming"))


def test_one_policy_of_two(read):
    policy = Answers(lambda head: head.positions)
    a, b = read(policy), read(policy)
    a.close()
    assert compressed(b) == compressed(read(Newest()))


def test_a_head_is_read_during_score_only(read):
    heads = []
    llm = read(Answers(lambda head: (heads.append(head), head.values, head.positions)[-1]))
    llm.kv.compress()
    assert heads[0].values.shape == (N, 64) and len(heads[0].positions) == N  # what was read stays
    with pytest.raises(LaproxError, match=r"layer 0, head 0: .* only be read inside score\(\)"):
        heads[0].queries


def test_queries_are_those_of_tokens_that_are_there(read):
    """A state brings its window along; tokens taken back take their queries with them."""
    seen = []
    llm = read(Answers(lambda head: (seen.append((head.queries.shape, head.query_positions.tolist())), head.positions)[-1]))
    llm.load_state(llm.save_state())
    llm.kv.scores(0)
    llm.n_tokens = N - 100
    llm.eval([300, 301])
    llm.kv.scores(0)
    llm._ctx.kv_cache_seq_rm(-1, N - 100, -1)
    llm.kv.scores(0)
    assert seen[:: pairs(llm)] == [
        ((32, 4, 64), [*range(N - 32, N)]),
        ((2, 4, 64), [N - 100, N - 99]),
        ((0, 4, 64), []),
    ]


def test_score_leaves_its_llama_alone(read):
    policy = Answers(None)
    llm = read(policy)
    kv = llm.kv
    for call in (kv.compress, kv.scores, kv.stats, lambda: kv.set(sink=1), lambda: llm.eval([5]), llm.reset, llm.close):
        policy.answer = lambda head: call()
        with pytest.raises(LaproxError, match="inside score"):
            llm.kv.compress()
    policy.answer = lambda head: head.positions
    assert compressed(llm) == compressed(read(Newest()))


def test_pickled(read, tokens):
    llm = read(SmallKeys("global"), "30%")
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.kv.config.policy.allocator == "global" and copy.kv.config.budget == "30%"
    assert "SmallKeys" in repr(copy.kv.config)
    copy.eval(tokens)
    assert compressed(copy) == compressed(llm)


def test_closed(read):
    policy = Newest()
    llm, gone = read(policy), weakref.ref(policy)
    del policy
    llm.close()
    llm.close()
    with pytest.raises(LaproxError, match="closed"):
        llm.kv.compress()
    llm.kv_config = None
    assert gone() is None


def test_the_policy_lives_as_long_as_its_llama(read):
    llm = read(Newest())
    policy = weakref.ref(llm.kv.config.policy)
    llm.kv_config = KVConfig(policy="streaming")  # the last reference but the one that the engine depends on
    gc.collect()
    llm.kv.compress()
    assert policy() is not None
    llm.kv.set(policy="streaming")
    assert policy() is None


@pytest.mark.filterwarnings("error")
def test_a_policy_that_knows_its_llama_is_collected(read):
    policy = Newest()
    policy.llm = read(policy)
    policy.llm.kv.compress()
    gone = weakref.ref(policy.llm)
    del policy
    gc.collect()
    assert gone() is None


@pytest.mark.filterwarnings("error")
def test_a_refused_instance_closes_quietly(load):
    with pytest.raises(ValueError, match="larger than the context"):
        load(Newest(), 4096)
