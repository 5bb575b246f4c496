"""Policies written in Python, and a random model that has read a text: what their tests share."""

import numpy as np
import pytest
from test_python_api import prompt_of

from laprox import Llama, Policy

N = 400


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
