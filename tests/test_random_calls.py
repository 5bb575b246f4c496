"""Any order of calls, against a model of what must be cached: entries, positions, and the logits that follow from them."""

import copy

import numpy as np
import pytest

import engine
import reference
from test_compaction import TOLERANCE

N_SEQ, N_CTX = 3, 384
KV = {"budget": "40", "window": 16, "sink": 2, "recent": 8}


class Twin:
    """What one sequence must hold: a NumPy model, and where its tail begins."""

    def __init__(self, net):
        self.net, self.tail, self.seen = net, 0, 0

    @property
    def end(self):
        """One past the last position, which need not be held: all of the tail may have been taken back."""
        return max([self.tail] + [int(p.max()) + 1 for p in self.net.pos.values() if len(p)])

    def remove(self, p0, p1):
        for pair, pos in self.net.pos.items():
            self.net.keep(*pair, pos[(pos < p0) | (pos >= p1)])
        stays = (self.net.q_pos < p0) | (self.net.q_pos >= p1)
        self.net.q_pos = self.net.q_pos[stays]
        self.net.q = {il: q[stays] for il, q in self.net.q.items()}


class Session:
    def __init__(self, ctx, path, rng):
        self.ctx, self.rng = ctx, rng
        empty = reference.Network(path)
        self.empty = lambda: Twin(copy.copy(empty))
        self.seqs = [self.new() for _ in range(N_SEQ)]
        self.saved = []  # (kind, bytes, twins)

    def new(self):
        twin = self.empty()
        twin.net.clear()
        return twin

    def clone(self, twin):
        other = copy.copy(twin)
        other.net = copy.copy(twin.net)
        for name in ("pos", "k", "v", "q", "conv"):
            setattr(other.net, name, dict(getattr(twin.net, name)))
        return other

    def some(self):
        return int(self.rng.integers(N_SEQ))

    def step(self):
        names = ["decode"] * 5 + ["together"] * 2 + ["compress"] * 3 + ["rm"] * 4 + ["cp", "save", "seq_save", "load", "load", "score"]
        names += ["clear"] if self.rng.random() < 0.2 else []
        name = names[self.rng.integers(len(names))]
        getattr(self, name)()
        self.check(name)
        return name

    # --- calls ---

    def feed(self, batches):
        """{sequence: tokens} in one batch; follows an eviction for want of room."""
        before = {s: self.ctx.stats(s).compressions for s in batches}
        start = {s: self.seqs[s].end for s in batches}
        rows = [(int(t), start[s] + i, (s,)) for s, tokens in batches.items() for i, t in enumerate(tokens)]
        got = self.ctx.submit(rows, range(len(rows)))
        for s, tokens in batches.items():
            twin = self.seqs[s]
            if self.ctx.stats(s).compressions != before[s]:
                self.evicted(s, start[s])
            want = twin.net.decode(tokens, np.arange(start[s], start[s] + len(tokens)))
            twin.seen += len(tokens)
            rows = got[: len(tokens)]
            got = got[len(tokens) :]
            assert np.abs(rows - want).max() < TOLERANCE

    def evicted(self, s, end):
        twin = self.seqs[s]
        for pair, pos in self.ctx.held(s).items():
            pos = pos[pos < end]
            assert set(pos) <= set(twin.net.pos[pair])
            twin.net.keep(*pair, pos)
        twin.tail = self.ctx.pos_min(s)

    def decode(self):
        self.feed({self.some(): self.rng.integers(3, 512, self.rng.choice([1, 2, 20, 90]))})

    def together(self):
        self.feed({s: self.rng.integers(3, 512, self.rng.integers(1, 30)) for s in range(N_SEQ)})

    def compress(self):
        s = self.some()
        twin = self.seqs[s]
        if twin.end == 0:
            return
        before = sum(map(len, twin.net.pos.values()))
        too_much = before > 40 * len(twin.net.pos)
        if too_much and len(self.ctx.queries(0, s)[1]) == 0:  # just restored, or cut further back than the window reaches
            with pytest.raises(engine.Refused, match="queries"):
                self.ctx.compress(s)
            return
        self.ctx.compress(s)
        if too_much:
            self.evicted(s, twin.end)
        assert self.ctx.stats(s).entries_held == min(before, 40 * len(twin.net.pos))

    def rm(self):
        """One sequence, or all at once: then all of them agree, or nothing is removed."""
        s = self.some()
        chosen = [s] if self.rng.random() < 0.7 else range(N_SEQ)
        twin = self.seqs[s]
        end = twin.end
        p0 = int(self.rng.choice([-1, 0, self.rng.integers(end + 5), max(twin.tail, end - 5), end - 1, twin.tail]))
        p1 = int(self.rng.choice([-1, -1, end, self.rng.integers(end + 5)]))
        lo, hi = max(p0, 0), p1 if p1 >= 0 else 1 << 30
        twins = [self.seqs[i] for i in chosen]
        whole = [lo == 0 and hi >= t.end for t in twins]
        allowed = all(w or lo >= t.tail or hi <= lo for t, w in zip(twins, whole))
        assert self.ctx.seq_rm(s if len(chosen) == 1 else -1, p0, p1) == allowed, (p0, p1, [(t.tail, t.end) for t in twins])
        for i, twin, w in zip(chosen, twins, whole):
            if allowed and w and hi > lo:
                self.seqs[i] = self.new()
            elif allowed:
                twin.seen -= len({int(p) for pos in twin.net.pos.values() for p in pos if lo <= p < hi})
                twin.remove(lo, hi)

    def cp(self):
        src, dst = self.some(), self.some()
        if src != dst and self.seqs[src].end:
            self.ctx.seq_rm(dst)
            self.ctx.seq_cp(src, dst)
            self.seqs[dst] = self.clone(self.seqs[src])

    def save(self):
        self.saved.append((None, self.ctx.save(), [self.clone(t) for t in self.seqs]))

    def seq_save(self):
        s = self.some()
        if self.seqs[s].end:
            self.saved.append((s, self.ctx.seq_save(s), [self.clone(self.seqs[s])]))

    def load(self):
        if not self.saved:
            return
        kind, data, twins = self.saved[self.rng.integers(len(self.saved))]
        if kind is None:
            assert self.ctx.load(data)
            self.seqs = [self.clone(t) for t in twins]
        else:
            s = self.some()
            assert self.ctx.seq_load(data, s)
            self.seqs[s] = self.clone(twins[0])

    def score(self):
        s = self.some()
        if len(self.ctx.queries(0, s)[1]):
            assert {p: len(x) for p, x in self.ctx.score(s).items()} == {p: len(x) for p, x in self.seqs[s].net.pos.items()}

    def clear(self):
        self.ctx.clear()
        self.seqs = [self.new() for _ in range(N_SEQ)]

    # --- what must hold after each ---

    def check(self, name):
        for s, twin in enumerate(self.seqs):
            held = self.ctx.held(s)
            for pair, pos in twin.net.pos.items():
                assert np.array_equal(held[pair], pos), (name, s, pair)
            stats = self.ctx.stats(s)
            assert stats.entries_held == sum(map(len, held.values())), name
            assert stats.tokens_seen == twin.seen, (name, s)
            assert self.ctx.pos_max(s) == twin.end - 1, (name, s)
            self.check_window(name, s, twin)

    def check_window(self, name, s, twin):
        """Every observed query is one of this sequence, still there, and the last one is among them."""
        for il, _ in self.ctx.layers():
            q, pos = self.ctx.queries(il, s)
            assert len(pos) <= 16 and set(pos) <= set(twin.net.q_pos), (name, s)
            assert len(pos) == 0 or pos[-1] == twin.net.q_pos[-1], (name, s)
            want = twin.net.q[il][np.searchsorted(twin.net.q_pos, pos)]
            assert np.abs(q - want).max(initial=0) < TOLERANCE, (name, s)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kv_unified", [False, True])
def test_random_calls(toy, seed, kv_unified):
    path = toy(n_layer=2, n_embd=64, n_head=4, n_head_kv=2, n_ff=64)
    with engine.Model(path, engine.params(**KV)) as model:
        with engine.Context(model, n_ctx=N_CTX * (1 if kv_unified else N_SEQ), n_batch=256, n_seq_max=N_SEQ, kv_unified=kv_unified) as ctx:
            session = Session(ctx, path, np.random.default_rng(seed))
            done = [session.step() for _ in range(120)]
            for s in range(N_SEQ):
                session.feed({s: [5, 6]})
            assert len(set(done)) >= 8
