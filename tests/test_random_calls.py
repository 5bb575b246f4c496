"""Ten thousand calls in random order. scripts/random_calls goes on for as long as you like."""

import pytest
import random_calls


@pytest.mark.parametrize("kind", random_calls.KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_random_calls(toy, kind, seed):
    k = random_calls.KINDS[kind]
    done = random_calls.run(toy(k.arch, **dict(k.shape)), kind, seed, 480)
    assert done >= {*random_calls.Session.NAMES, "clear", "keep"}
