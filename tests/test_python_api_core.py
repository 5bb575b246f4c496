"""laprox._core: the functions of cpp/core on arrays take what they should and nothing else."""

import numpy as np
import pytest

from laprox import LaproxError, _core


def test_budget_entries():
    assert _core.budget_entries("5%", 1000, 16) == 800
    assert _core.budget_entries("100", 1000, 16) == 1600
    with pytest.raises(ValueError):
        _core.budget_entries("abc", 1000, 16)


def test_normalise_layer():
    a, b = _core.normalise_layer([[1, 3], [4]])
    np.testing.assert_allclose(np.concatenate([a, b]), [0.125, 0.375, 0.5], rtol=1e-6)
    assert _core.normalise_layer([[0.0, 0.0]])[0].tolist() == [0, 0]


def test_allocate():
    heads = [0, 1], [0, 0], [[0, 1, 2], [5, 6]], [[0.1, 0.9, 0.2], [0.8, 0.2]]
    chosen = _core.allocate("global-raw", *heads, 3)
    assert [c.tolist() for c in chosen] == [[1], [0, 1]]  # equal scores: the later position first
    chosen = _core.allocate("uniform", *heads, 4, second=[[9, 8, 7], [0, 0]])
    assert [c.tolist() for c in chosen] == [[0, 1], [0, 1]]  # one by score, then one by what comes second


def test_allocate_refuses_what_does_not_fit_together():
    with pytest.raises(ValueError, match="one element per"):
        _core.allocate("global", [0], [0, 1], [[0]], [[1.0]], 1)
    with pytest.raises(ValueError, match="one element per"):
        _core.allocate("global", [0], [0], [[0]], [[1.0]], 1, n_protected=[1, 2])
    with pytest.raises(ValueError, match="same length"):
        _core.allocate("global", [0], [0], [[0, 1]], [[1.0]], 1)
    with pytest.raises(ValueError, match="same length"):
        _core.allocate("global", [0], [0], [[0]], [[1.0]], 1, second=[[]])
    with pytest.raises(ValueError, match="those of layer 0 are not"):
        _core.allocate("global", [0, 1, 0], [0, 0, 1], [[0]] * 3, [[1.0]] * 3, 1)
    with pytest.raises(ValueError, match=r"\(99, layers, KV heads\)"):
        _core.allocate("profile", [0], [0], [[0]], [[1.0]], 1, profile=np.zeros((98, 1, 1)))


def test_plan_classes():
    classes = _core.plan_classes([10, 11, 300], 2, 1)
    assert [(heads.tolist(), rows) for heads, rows in classes] == [([0, 1], 11), ([2], 300)]
    for arguments in [([1], 0, 1), ([1], 1, 0)]:
        with pytest.raises(ValueError, match="at least 1"):
            _core.plan_classes(*arguments)


def test_refusals_carry_the_reason():
    with pytest.raises(ValueError, match='^budget is "abc" .not a number.; accepted: a share'):
        _core.parse_budget("abc")
    assert _core.parse_budget("5%") == ("fraction", 0.05)


def test_contexts_without_the_compressing_cache(toy):
    from laprox import Llama

    llm = Llama(str(toy()), kv=None, n_ctx=256, verbose=False)
    for call in (_core.stats, _core.layers, _core.get_params, _core.compress, _core.score):
        with pytest.raises(LaproxError, match="without the compressing cache"):
            call(llm.ctx)


def test_closed_handles():
    with pytest.raises(LaproxError, match="the model is closed"):
        _core.model_check(0)
    for call in (_core.stats, _core.layers, _core.compress):
        with pytest.raises(LaproxError, match="the context is closed"):
            call(0)
