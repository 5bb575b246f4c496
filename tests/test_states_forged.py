"""States that were written to be believed, and memories of several parts that are given half of one."""

import struct

import devices
import engine
import numpy as np
import pytest
from state_fuzz import CONTEXT, HEADER, KINDS, KV, forge, parts

# of a sequence, behind magic, version, the model's name, the layout and the number of sequences
FIELDS = {"tail_begin": "i", "n_absorbed": "q", "compressed_for": "i", "turn_begin": "i", "gen_begin": "i", "n_entries": "q", "n_cells": "I"}


def field(ctx, name):
    """Where a number is in our part, and its format."""
    at = 4 + 4 + 17 + 8 * (1 + 8 * len(ctx.layers()) + 2) + 4
    for other, kind in FIELDS.items():
        if other == name:
            return at, "<" + kind
        at += struct.calcsize(kind)
    raise KeyError(name)


def assert_empty_and_usable(ctx, fresh):
    assert (ctx.pos_max(), ctx.stats().tokens_seen, ctx.stats().entries_held, ctx.stats().entries_full) == (-1, 0, 0, 0)
    assert np.abs(ctx.decode([5, 6, 7]) - fresh).max() < devices.AGAIN


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_no_text_has(toy, rng, kind):
    """With the checksums made right again: counts that would overflow, run past the file or ask for all memory there is."""
    arch, shape = KINDS[kind]
    with engine.Model(toy(arch, **shape), engine.params(**KV)) as model, engine.Context(model, **CONTEXT) as ctx:
        fresh = ctx.decode([5, 6, 7])
        ctx.clear()
        ctx.decode(rng.integers(3, 512, 120))
        ctx.compress()
        good = ctx.seq_save(0)
        ours, rest = parts(good)
        told = {"tail_begin": 112, "n_absorbed": 112, "compressed_for": 120, "turn_begin": 120}
        told |= {"gen_begin": 120, "n_cells": 8, "n_entries": ctx.stats().entries_held - 8 * len(ctx.pairs())}
        for name, value in told.items():
            at, kind = field(ctx, name)
            assert struct.unpack_from(kind, ours, at)[0] == value, name
        assert ctx.seq_load(forge(good[:HEADER], ours, rest))
        lies = [(n, v) for n in ("n_absorbed", "n_entries") for v in (2**62, 2**63 - 1, -1, 2**31, 2**32 + 1)]
        lies += [(n, v) for n in ("tail_begin", "compressed_for", "turn_begin", "gen_begin") for v in (2**31 - 1, -(2**31), -2)]
        lies += [("n_cells", v) for v in (2**32 - 1, 2**31, 513)]
        for name, value in lies:
            at, kind = field(ctx, name)
            bad = bytearray(ours)
            struct.pack_into(kind, bad, at, value)
            assert not ctx.seq_load(forge(good[:HEADER], bytes(bad), rest)), (name, value)
            assert "damaged" in engine.last_error() or "has room for" in engine.last_error(), engine.last_error()
            assert_empty_and_usable(ctx, fresh)
        assert ctx.seq_load(good)


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_state(toy, rng, kind):
    """Our part and another cache's are read one after the other: without the second, nothing of the first is left."""
    arch, shape = KINDS[kind]
    with engine.Model(toy(arch, **shape), engine.params(**KV)) as model, engine.Context(model, **CONTEXT) as ctx:
        fresh = ctx.decode([5, 6, 7])
        ctx.clear()
        ctx.decode(rng.integers(3, 512, 100))
        ctx.compress()
        good, (ours, rest) = ctx.seq_save(0), parts(ctx.seq_save(0))
        ends = {HEADER + len(ours) + 8, HEADER + len(ours) + 16, len(good) - 8, len(good) - 1, HEADER + len(ours) + 16 + len(rest) // 2}
        for end in sorted(ends):
            assert not ctx.seq_load(good[:end]) and engine.last_error(), end
            assert_empty_and_usable(ctx, fresh)
        assert ctx.seq_load(good)
