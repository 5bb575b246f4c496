"""Thousands of spoilt states. scripts/fuzz_states goes on for as long as you like."""

import pytest
import state_fuzz


@pytest.mark.parametrize("kind", state_fuzz.KINDS)
def test_spoilt_states(toy, kind):
    target = state_fuzz.Target(toy, kind, seed=1)
    target.takes_own()
    seen = {target.step().split()[1] for _ in range(1000)}
    target.takes_own()
    target.close()
    assert len(seen) == 10  # every way to spoil one
