"""Damaged, foreign and forged documents, opened and loaded: shared by test_document_files.py and scripts/fuzz_documents.

Whatever comes, there is no crash. A file that differs from every one that was written is refused with a reason, before anything
of it is used. A forged one, whose checksum was made right again, may be accepted; then the context must stand it.
"""

from __future__ import annotations

import struct

import devices
import engine
import numpy as np
from state_fuzz import CONTEXT, HEADER, KINDS, KV, checksum, damage, forge, parts

END = 16  # the file's length, and the checksum
STATE = b"\x05\0\0\0\0\0\0\0state"  # the tensor's name


def sealed(data: bytes) -> bytes:
    """With the end that such a file would have."""
    data += struct.pack("<Q", len(data) + END)
    return data + struct.pack("<Q", checksum(data))


def split(data: bytes) -> tuple[bytes, bytes, bytes]:
    """What describes a document, its state, and the padding behind that."""
    at = data.index(STATE) + len(STATE)  # then: the number of dimensions, size, type, offset
    (size,) = struct.unpack_from("<q", data, at + 4)
    begin = (at + 4 + 8 + 4 + 8 + 31) // 32 * 32
    return data[:begin], data[begin : begin + size], data[begin + size : -END]


def with_text(data: bytes, old: bytes, new: bytes) -> bytes:
    """A document in which one text is another."""
    head, state, padding = split(data)
    at = head.index(struct.pack("<Q", len(old)) + old)
    head = head[:at] + struct.pack("<Q", len(new)) + new + head[at + 8 + len(old) :]
    end = head.index(STATE) + len(STATE) + 24
    return sealed(head[:end].ljust((end + 31) // 32 * 32, b"\0") + state + padding)


class Target:
    """A context of one kind, and documents of it, of another and of stock files."""

    def __init__(self, toy, kind: str, folder, seed: int):
        self.kind, self.rng, self.path = kind, np.random.default_rng(seed), folder / f"{kind}-{seed}.kv"
        arch, shape = KINDS[kind]
        self.model = engine.Model(toy(arch, **shape), engine.params(**KV))
        self.ctx = engine.Context(self.model, **CONTEXT)
        self.good = self._documents(self.ctx)
        with engine.Context(self.model, **CONTEXT | {"type_k": "bf16"}) as another:
            self.foreign = self._documents(another)
        self.foreign.append(toy(arch, **shape).read_bytes()[:100_000])  # a GGUF, too
        self.ctx.clear()
        self.fresh = self.ctx.decode([5, 6, 7])
        self.ctx.clear()

    def close(self) -> None:
        self.ctx.close()
        self.model.close()

    def _documents(self, ctx) -> list[bytes]:
        made = []
        for n, archive in [(20, False), (90, False), (100, True)]:
            ctx.set_archive_in_states(archive)
            ctx.clear()
            tokens = self.rng.integers(3, 512, n)
            ctx.decode(tokens)
            ctx.compress()
            ctx.document_save(self.path, tokens, {"title": f"{n} tokens", "text": "words " * 40, "settings": '{"budget": "24"}'})
            made.append(self.path.read_bytes())
        ctx.set_archive_in_states(False)
        return made

    def _spoilt(self) -> tuple[str, bytes, bool]:
        """What was done to a document, what came of it, and whether its checksum is right."""
        rng = self.rng
        good = self.good[rng.integers(len(self.good))]
        others = [d for d in self.good if d is not good] + self.foreign
        how = rng.random()
        if how < 0.5:
            return *damage(rng, good, others), False
        head, state, padding = split(good)
        if how < 0.75:  # what describes it
            what, head = damage(rng, head, [split(d)[0] for d in self.good])
        else:  # the state, whose own checksums are right, too
            ours, rest = parts(bytes(HEADER) + state)
            what, ours = damage(rng, ours, [parts(bytes(HEADER) + split(d)[1])[0] for d in self.good])
            state = forge(b"", ours, rest)
            at = good.index(STATE) + len(STATE) + 4
            head = head[:at] + struct.pack("<q", len(state)) + head[at + 8 :]
            padding = bytes(-len(state) % 32)
        return f"forged, {what}", sealed(head + state + padding), True

    def step(self) -> str:
        """One spoilt document. Raises AssertionError with what was done."""
        ctx = self.ctx
        what, data, forged = self._spoilt()
        self.path.write_bytes(data)
        what = f"{self.kind}: {what}"
        if self.rng.random() < 0.3:
            ctx.decode([9, 10, 11], seq=1)
        try:
            document = engine.Document(self.path)
        except engine.Refused as refusal:
            self._refused(what, refusal)
            return what
        assert forged or data in self.good + self.foreign, f"{what}: opened"
        assert all(isinstance(document.get(key), str) for key in ("fingerprint", "llama.cpp", "ggml")), what
        try:
            ctx.document_load(document, 1)
        except engine.Refused as refusal:
            self._refused(what, refusal)
            return what
        assert forged or data in self.good, f"{what}: loaded"
        assert ctx.pos_max(1) + 1 == len(document.tokens()), what
        self._use()
        return what

    def _refused(self, what: str, refusal: engine.Refused) -> None:
        assert str(refusal).isprintable() and str(self.path) not in str(refusal), f"{what}: {refusal!s}"
        self.ctx.seq_rm(1)
        assert np.abs(self.ctx.decode([5, 6, 7], seq=1) - self.fresh).max() < devices.AGAIN, f"{what}: not usable"
        self.ctx.seq_rm(1)

    def _use(self) -> None:
        """An accepted document need not make sense, but questions can be asked about it."""
        try:
            self.ctx.decode([5], seq=1)
            self.ctx.compress(1)
            self.ctx.seq_rm(1, max(0, self.ctx.pos_max(1) // 2), -1)
        except engine.Refused:
            pass  # positions that no text has; a window without queries
        self.ctx.clear()

    def takes_own(self) -> None:
        for data in self.good:
            self.path.write_bytes(data)
            document = engine.Document(self.path)
            self.ctx.document_load(document, 1)
            assert self.ctx.pos_max(1) + 1 == len(document.tokens())
        self.ctx.clear()


def main() -> None:
    import argparse
    import sys
    import tempfile
    import time
    from pathlib import Path

    import gguf_factory

    parser = argparse.ArgumentParser(description="Spoilt documents, as many as you like.")
    parser.add_argument("-n", type=int, default=5000, help="how many")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--kind", choices=list(KINDS))
    args = parser.parse_args()
    kinds, done, seed = [args.kind] if args.kind else list(KINDS), 0, args.seed
    with tempfile.TemporaryDirectory() as folder:

        def toy(arch, **shape):
            return getattr(gguf_factory, f"write_{arch}")(Path(folder) / f"{arch}.gguf", **shape)

        while done < args.n:
            for kind in kinds:
                target = Target(toy, kind, Path(folder), seed)
                target.takes_own()
                for _ in range(min(500, args.n - done)):
                    target.step()
                    done += 1
                target.close()
                print(f"\rseed {seed}, {kind}: {done} documents so far ", end="", file=sys.stderr, flush=True)
            seed += 1
    print(f"\n{done} spoilt documents, seeds {args.seed} to {seed - 1}: none accepted that shouldn't be, no crash")


if __name__ == "__main__":
    main()
