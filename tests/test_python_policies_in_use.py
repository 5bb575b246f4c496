"""Policies in Python: without room, changed, several at once, and at the end."""

# ruff: noqa: F811 - fixtures are imported

import gc
import pickle
import threading
import weakref

import pytest
from python_policies import Answers, Broken, N, Newest, SmallKeys, compressed, held, load, read, tokens  # noqa: F401
from test_python_api import greedy, pairs, prompt_of

from laprox import KVConfig, LaproxError

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
