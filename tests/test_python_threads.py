"""A Llama works for one thread at a time: the others are refused, or wait."""

import threading

import pytest

import laprox
from laprox import KVConfig, LaproxError

KV = KVConfig(budget="20%", min_tokens=64)
TEXT = "the code of Ada is 48, of Bob 77, of Eve 12. " * 12


@pytest.fixture(scope="module")
def load(chatting):
    return lambda kv=KV, **kwargs: chatting(kv, **kwargs)


def elsewhere(call):
    """What comes of it in another thread."""
    outcome = []

    def run():
        try:
            outcome.append(call())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return outcome[0]


USES = {
    "stats": lambda kv: kv.stats(),
    "layers": lambda kv: kv.layers,
    "positions": lambda kv: kv.positions(0, 0),
    "held": lambda kv: kv.held(),
    "scores": lambda kv: kv.scores(),
    "compress": lambda kv: kv.compress(),
    "prompt_done": lambda kv: kv.prompt_done(),
    "set": lambda kv: kv.set(budget="30%"),
}


def test_in_the_midst_of_a_step(load):
    llm, outcomes = load(), {}

    def look(tokens, logits):
        outcomes.update({name: elsewhere(lambda use=use: use(llm.kv)) for name, use in USES.items()})
        return True

    assert next(llm.generate(llm.tokenize(TEXT.encode()), stopping_criteria=look), None) is None
    for name, outcome in outcomes.items():
        assert isinstance(outcome, LaproxError) and str(outcome) == "this Llama is being used in another thread", name
    assert outcomes.keys() == USES.keys()
    assert elsewhere(llm.kv.stats) == llm.kv.stats()


def test_in_the_midst_of_a_compression(load):
    class Watched(laprox.Policy):
        def score(self, head):
            outcomes.append(elsewhere(llm.kv.stats))
            return head.positions

    outcomes = []
    llm = load(KVConfig(policy=Watched(), budget="20%", min_tokens=64))
    llm.eval(llm.tokenize(TEXT.encode()))
    llm.kv.compress()
    assert outcomes and all(str(outcome) == "this Llama is being used in another thread" for outcome in outcomes)


def test_between_steps(load):
    """Which may come from several threads."""
    llm = load()
    tokens = llm.tokenize(TEXT.encode())
    expected = [token for token, _ in zip(load().generate(tokens, temp=0.0), range(4))]
    generator = llm.generate(tokens, temp=0.0)
    found = []
    for _ in range(4):
        found.append(elsewhere(lambda: next(generator)))
        assert elsewhere(llm.kv.stats) == llm.kv.stats()
    assert found == expected
    elsewhere(generator.close)
    llm.eval([300])


def test_reading_waits_for_nobody_and_a_step_for_those_that_read(load):
    llm = load()
    llm.eval([1, 300])
    reading, done = threading.Event(), threading.Event()

    def read():
        with llm._in_use:
            reading.set()
            done.wait()
            assert llm.n_tokens == 2

    reader = threading.Thread(target=read)
    reader.start()
    reading.wait()
    with pytest.raises(LaproxError, match="another thread"):
        llm.kv.stats()
    evaluating = threading.Thread(target=lambda: llm.eval([301]))
    evaluating.start()
    assert llm.n_tokens == 2
    done.set()
    reader.join()
    evaluating.join()
    assert llm.n_tokens == 3
