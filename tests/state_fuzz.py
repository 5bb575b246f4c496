"""Damaged, foreign, oversized and forged states, thrown at a context: shared by test_fuzz_states.py and scripts/fuzz_states.

Whatever comes, there is no crash. What isn't a state of this context is refused with a reason; the sequence is then empty
(or untouched, where llama.cpp's own header before our part was wrong) and works as a new one would. A forged state, whose
checksums were made right again, may be accepted; then the context must stand it.
"""

from __future__ import annotations

import struct

import devices
import engine
import numpy as np

SIZE = {"n_embd": 64, "n_head": 2, "n_head_kv": 2, "head_dim": 32, "n_ff": 64}
# the memories of llama.cpp that can hold a compressing cache
KINDS = {
    "llama": ("llama", SIZE | {"n_layer": 2}),
    "iswa": ("gemma2", SIZE | {"n_layer": 4, "swa": 16}),
    "hybrid": ("lfm2", SIZE | {"n_layer": 4}),
}
CONTEXT = {"n_ctx": 512, "n_batch": 64, "n_seq_max": 2}
KV = {"budget": "24", "window": 8, "sink": 2, "recent": 8, "archive": "ram"}
HEADER = 8  # llama.cpp's magic, and a sequence number that it doesn't look at
_MASK = (1 << 64) - 1


def checksum(data: bytes) -> int:
    """The engine's."""

    def mix(value, word):
        value = ((value ^ word) * 0x9E3779B97F4A7C15) & _MASK
        return value ^ (value >> 29)

    value, whole = 0xCBF29CE484222325, len(data) // 8 * 8
    for word in np.frombuffer(data[:whole], "<u8").tolist():
        value = mix(value, word)
    return mix(value, int.from_bytes(data[whole:], "little"))


def parts(data: bytes) -> tuple[bytes, bytes]:
    """Our part of a sequence's state and what other caches wrote behind it, both without their checksums."""
    for n_rest in range(len(data) - HEADER - 24 + 1):
        at = len(data) - 16 - n_rest
        if struct.unpack_from("<Q", data, at)[0] == n_rest and checksum(data[at + 8 : -8]) == struct.unpack_from("<Q", data, len(data) - 8)[0]:
            return data[HEADER : at - 8], data[at + 8 : -8]
    raise ValueError("not a state of a sequence")


def forge(header: bytes, ours: bytes, rest: bytes) -> bytes:
    return header + ours + struct.pack("<QQ", checksum(ours), len(rest)) + rest + struct.pack("<Q", checksum(rest))


def damage(rng: np.random.Generator, data: bytes, others: list[bytes], first: int = 0) -> tuple[str, bytes]:
    """One of many ways to spoil bytes from `first` on; mostly where the numbers are, in front."""
    end = min(len(data), first + 600) if rng.random() < 0.6 else len(data)
    at = int(rng.integers(first, end))
    other = others[rng.integers(len(others))]
    there = min(at, len(other))
    out = bytearray(data)
    how = str(rng.choice(["truncate", "flip", "flips", "word", "long", "zero", "splice", "drop", "repeat", "foreign"]))
    if how == "truncate":
        out = out[:at]
    elif how == "flip":
        out[at] ^= 1 << int(rng.integers(8))
    elif how == "flips":
        for i in rng.integers(first, end, 8):
            out[i] ^= int(rng.integers(1, 256))
    elif how == "word":
        value = int(rng.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 20, 255, 257]))
        at -= (at - first) % 4
        out[at : at + 4] = struct.pack("<I", value)[: len(out) - at]
    elif how == "long":
        value = int(rng.choice(np.array([2**31, 2**32, 2**40, 2**62, 2**63 - 1], np.uint64)))
        at -= (at - first) % 4
        out[at : at + 8] = struct.pack("<Q", value)[: len(out) - at]
    elif how == "zero":
        n = min(int(rng.integers(1, 64)), len(out) - at)
        out[at : at + n] = bytes([int(rng.choice([0, 255]))]) * n
    elif how == "splice":
        out = out[:at] + other[there:]
    elif how == "drop":
        del out[at : at + int(rng.integers(1, 40))]
    elif how == "repeat":
        out[at:at] = out[at : at + int(rng.integers(1, 40))]
    else:
        out = bytearray(other)
    return f"{how} at {at}", bytes(out)


class Target:
    """A context of one kind, and states that it may be given."""

    def __init__(self, toy, kind: str, seed: int):
        self.kind, self.rng = kind, np.random.default_rng(seed)
        arch, shape = KINDS[kind]
        self.path = toy(arch, **shape)
        self.model = engine.Model(self.path, engine.params(**KV))
        self.ctx = engine.Context(self.model, **CONTEXT)
        self.good, self.foreign = self._states(self.ctx), []
        self.model.set_params(None)
        with engine.Context(self.model, **CONTEXT) as stock:
            stock.decode(self.rng.integers(3, 512, 40))
            self.foreign.append(stock.seq_save())
        self.model.set_params(engine.params(**KV))
        with engine.Context(self.model, **CONTEXT | {"type_k": "bf16"}) as another:
            self.foreign += self._states(another)
        self.ctx.clear()
        self.fresh = self.ctx.decode([5, 6, 7])
        self.ctx.clear()

    def close(self) -> None:
        self.ctx.close()
        self.model.close()

    def _states(self, ctx) -> list[bytes]:
        states = []
        for n, compress, more, archive in [(20, False, 0, True), (90, True, 0, False), (120, True, 9, False), (100, True, 9, True)]:
            ctx.set_archive_in_states(archive)
            ctx.clear()
            ctx.decode(self.rng.integers(3, 512, n))
            if compress:
                ctx.compress()
            if more:
                ctx.decode(self.rng.integers(3, 512, more))
            states.append(ctx.seq_save())
        return states

    def step(self) -> str:
        """One spoilt state. Raises AssertionError with what was done."""
        rng, ctx = self.rng, self.ctx
        good = self.good[rng.integers(len(self.good))]
        others = [s for s in self.good if s is not good] + self.foreign
        forged = rng.random() < 0.25
        if forged:
            ours, rest = parts(good)
            what, ours = damage(rng, ours, [parts(s)[0] for s in self.good])
            data = forge(good[:HEADER], ours, rest)
        else:
            what, data = damage(rng, good, others)
        what = f"{self.kind}: {what} of {len(good)} bytes{', checksums made right' if forged else ''}"
        full = rng.random() < 0.3
        if full:
            ctx.decode([9, 10, 11], seq=1)
        before = ctx.pos_max(1)
        accepted = ctx.seq_load(data, 1)
        if accepted:
            same = any(data[HEADER:].startswith(s[HEADER:]) for s in self.good)
            assert forged or same, f"{what}: accepted"
            self._use(what)
        else:
            assert engine.last_error().isprintable() and engine.last_error(), f"{what}: no reason"
            untouched = data[:4] != good[:4] or len(data) < HEADER
            left = ctx.pos_max(1), ctx.stats(1).tokens_seen
            assert left == ((before, before + 1) if untouched else (-1, 0)), f"{what}: {left} left"
            ctx.seq_rm(1)
            assert np.abs(ctx.decode([5, 6, 7], seq=1) - self.fresh).max() < devices.AGAIN, f"{what}: not usable"
        ctx.seq_rm(1)
        return what

    def _use(self, what: str) -> None:
        """An accepted state need not make sense, but it can be used, saved and loaded again."""
        ctx = self.ctx
        try:
            ctx.decode([5], seq=1)
            ctx.compress(1)
            ctx.seq_rm(1, max(0, ctx.pos_max(1) // 2), -1)  # from what was archived
        except engine.Refused:
            pass  # positions that no text has; a window without queries
        again = ctx.seq_save(1)
        assert ctx.seq_load(again, 1), f"{what}: then its own state was refused: {engine.last_error()}"
        ctx.clear()  # of numbers that are none, too, which recurrent states never get rid of otherwise

    def takes_own(self) -> None:
        """Every state that it wrote, whole ones and those with something behind them too."""
        for data in self.good:
            for extra in (b"", b"\0" * 100):
                assert self.ctx.seq_load(data + extra, 1), engine.last_error()
                assert self.ctx.seq_load(self.ctx.seq_save(1), 0), engine.last_error()
        whole = self.ctx.save()
        self.ctx.clear()
        assert self.ctx.load(whole), engine.last_error()
        self.ctx.clear()


def main() -> None:
    import argparse
    import sys
    import tempfile
    import time
    from pathlib import Path

    import gguf_factory

    parser = argparse.ArgumentParser(description="Spoilt states for as long as you like.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--kind", choices=list(KINDS))
    args = parser.parse_args()
    end, seed, done = time.time() + args.seconds, args.seed, 0
    with tempfile.TemporaryDirectory() as folder:

        def toy(arch, **shape):
            return getattr(gguf_factory, f"write_{arch}")(Path(folder) / f"{arch}.gguf", **shape)

        while time.time() < end:
            for kind in [args.kind] if args.kind else KINDS:
                print(f"\rseed {seed}, {kind}: {done} states so far ", end="", file=sys.stderr, flush=True)
                target = Target(toy, kind, seed)
                target.takes_own()
                for _ in range(2000):
                    target.step()
                    done += 1
                    if time.time() >= end:
                        break
                target.close()
            seed += 1
    print(f"\n{done} spoilt states, seeds {args.seed} to {seed - 1}: none accepted that shouldn't be, no crash")


if __name__ == "__main__":
    main()
