"""Any order of calls on a cache with an archive: what is held and archived is exactly what was seen, bit by bit."""

from contextlib import contextmanager

import engine
import numpy as np
import pytest

SETTINGS = {"budget": "40", "window": 16, "sink": 2, "recent": 8, "min_tokens": 0, "recall_tokens": 24}
KINDS = {"llama": ("llama", {}), "iswa": ("gemma2", {"swa": 16}), "hybrid": ("lfm2", {})}
POLICIES = ["laprox", "snapkv", "streaming", "keydiff", "random", "laprox:uniform"]


class Session:
    """`seen`: by sequence, the rows of each entry at the time its token was evaluated last: {position: {pair: bytes}}."""

    budgets = ("30", "40", "60%", "100%")

    def __init__(self, ctx, kind, n_seq, kv, rng):
        self.ctx, self.kv, self.rng = ctx, kv, rng
        self.one_way = kind == "hybrid"  # recurrent states can't go back
        self.windowed = kind == "iswa"
        self.seen = [{} for _ in range(n_seq)]
        self.saved = []

    def some(self):
        return int(self.rng.integers(len(self.seen)))

    def rows(self, s):
        for pair in self.ctx.pairs():
            e = self.ctx.entries(*pair, s)
            for i, pos in enumerate(e.pos.tolist()):
                yield pair, pos, e.k[i].tobytes() + e.v[i].tobytes()

    def feed(self, s, tokens):
        """The last token at the end, so that one of few is no generation."""
        start = max(self.seen[s], default=-1) + 1
        self.ctx.decode(tokens, seq=s, pos=start)
        for pair, pos, row in self.rows(s):
            if pos >= start:
                self.seen[s].setdefault(pos, {})[pair] = row

    def cut(self, s, p0):
        self.seen[s] = {pos: rows for pos, rows in self.seen[s].items() if pos < p0}

    # --- calls ---

    def turn(self):
        s = self.some()
        if len(self.seen[s]) > 300:
            return
        self.feed(s, self.rng.integers(3, 512, self.rng.choice([1, 5, 40, 90])))
        while (again := self.ctx.prompt_done(s, most=int(self.rng.choice([0, 4, 100])))) is not None:
            n = len(self.seen[s]) - again
            self.cut(s, again)
            self.feed(s, self.rng.integers(3, 512, n))

    def generate(self):
        s = self.some()
        for _ in range(4):
            if self.seen[s] and len(self.seen[s]) < 300:
                self.feed(s, self.rng.integers(3, 512, 1))

    def compress(self):
        s = self.some()
        if self.seen[s] and len(self.ctx.queries(self.ctx.layers()[0][0], s)[1]):
            budget = str(self.rng.choice(self.budgets))
            self.ctx.set_params(engine.params(**self.kv | {"budget": budget, "policy": str(self.rng.choice(POLICIES))}))
            self.ctx.compress(s)

    def rm(self):
        s = self.some()
        p0 = int(self.rng.integers(0, len(self.seen[s]) + 1))
        removed = self.ctx.seq_rm(s, p0, -1)
        assert removed or (self.one_way and 0 < p0 < len(self.seen[s]))
        if removed:
            self.cut(s, p0)

    def cp(self):
        src, dst = self.some(), self.some()
        self.ctx.seq_cp(src, dst)
        self.seen[dst] = dict(self.seen[src])

    def save(self):
        s = self.some()
        if self.seen[s]:
            self.ctx.set_archive_in_states(True)
            self.saved.append((self.ctx.seq_save(s), dict(self.seen[s])))
            self.ctx.set_archive_in_states(False)
            del self.saved[:-3]

    def load(self):
        if self.saved:
            data, seen = self.saved[self.rng.integers(len(self.saved))]
            s = self.some()
            assert self.ctx.seq_load(data, s), engine.last_error()
            self.one_way = self.one_way or self.windowed  # a restored sliding window holds no more than it needs to go on
            self.seen[s] = dict(seen)
            return s

    def clear(self):
        if self.rng.random() < 0.2:
            self.ctx.clear()
            self.seen = [{} for _ in self.seen]

    # --- what must hold ---

    def check(self, call):
        for s, seen in enumerate(self.seen):
            stats = self.ctx.stats(s)
            assert stats.tokens_seen == len(seen), call
            assert self.ctx.pos_max(s) == max(seen, default=-1), call
            held = {pair: 0 for pair in self.ctx.pairs()}
            for pair, pos, row in self.rows(s):
                assert seen[pos][pair] == row, (call, s, pair, pos)
                held[pair] += 1
            assert stats.entries_held == sum(held.values())

    def check_all(self):
        self.ctx.set_params(engine.params(**self.kv | {"budget": "100%", "policy": "streaming"}))
        for s, seen in enumerate(self.seen):
            self.ctx.compress(s)
            assert {(pair, pos, row) for pair, pos, row in self.rows(s)} == {
                (pair, pos, row) for pos, rows in seen.items() for pair, row in rows.items()
            }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("type_kv", "archive", "n_seq"), [("f16", "ram", 1), ("q8_0", "auto", 3), ("q4_0", "ram", 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_held_and_archived_is_what_was_seen(toy, kind, type_kv, archive, n_seq, seed):
    rng = np.random.default_rng(seed)
    run(toy, Session, kind, type_kv, n_seq, SETTINGS | {"archive": archive}, rng)


def run(toy, made, kind, type_kv, n_seq, kv, rng):
    """120 calls; the session after them."""
    with opened(toy, kind, type_kv, n_seq, kv) as ctx:
        session = made(ctx, kind, n_seq, kv, rng)
        for i in range(120):
            call = str(rng.choice(["turn"] * 4 + ["generate", "compress", "compress", "rm", "rm", "cp", "save", "load", "clear"]))
            getattr(session, call)()
            session.check(call)
            if i % 20 == 19:
                session.check_all()
        return session


@contextmanager
def opened(toy, kind, type_kv, n_seq, kv):
    arch, shape = KINDS[kind]
    with engine.Model(toy(arch, n_layer=2, **(shape | ({"recurrent": (0,)} if kind == "hybrid" else {}))), engine.params(**kv)) as model:
        with engine.Context(model, n_ctx=512 * n_seq, n_batch=128, n_seq_max=n_seq, type_k=type_kv, swa_full=True) as ctx:
            yield ctx


class Limited(Session):
    """An archive without room for all: what is left of a text can come back, whole tokens are gone for good.

    `gone`: by sequence, the tokens that weren't there when everything that is left was brought back.
    """

    budgets = ("20", "30", "40")  # with more, there is little to choose from, and archives are given up

    def __init__(self, *args):
        super().__init__(*args)
        self.gone = [set() for _ in self.seen]
        self.n_lost = 0

    def cut(self, s, p0):
        super().cut(s, p0)
        self.gone[s] = {pos for pos in self.gone[s] if pos < p0}

    def rm(self):
        """Where an archive was given up, a cut is refused."""
        s = self.some()
        p0 = int(self.rng.integers(0, len(self.seen[s]) + 1))
        if self.ctx.seq_rm(s, p0, -1):
            self.cut(s, p0)

    def cp(self):
        src, dst = self.some(), self.some()
        self.ctx.seq_cp(src, dst)
        self.seen[dst], self.gone[dst] = dict(self.seen[src]), set(self.gone[src])

    def load(self):
        if (s := super().load()) is not None:
            self.gone[s] = set()

    def clear(self):
        super().clear()
        self.gone = [gone & set(seen) for gone, seen in zip(self.gone, self.seen)]

    def check_all(self):
        """Everything that is left, while nothing leaves the tail."""
        self.ctx.set_params(engine.params(**self.kv | {"budget": "100%", "policy": "streaming", "recent": 500}))
        for s, seen in enumerate(self.seen):
            self.ctx.compress(s)
            stats = self.ctx.stats(s)
            assert stats.archived_bytes <= 1024 * int(self.kv["archive_limit"].removesuffix("KiB"))
            if stats.archived_bytes == 0:  # all of it is in the tail, or it was given up
                continue
            held = [set(pos.tolist()) for pos in self.ctx.held(s).values()]
            assert all(h == held[0] for h in held), "a hole"
            gone = set(seen) - held[0]
            assert self.gone[s] <= gone
            assert {0, 1} <= held[0]  # attention sinks
            self.gone[s], self.n_lost = gone, self.n_lost + len(gone)
        self.ctx.set_params(engine.params(**self.kv))


@pytest.mark.parametrize(("type_kv", "archive", "n_seq"), [("f16", "ram", 1), ("q8_0", "auto", 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_at_its_limit_what_is_lost_is_lost_and_the_rest_is_not(toy, kind, type_kv, archive, n_seq):
    with opened(toy, kind, type_kv, 1, SETTINGS | {"archive": "ram"}) as ctx:
        ctx.decode(range(3, 103))
        ctx.compress()
        stats = ctx.stats()
    limit = (80 + 30 * n_seq) * stats.archived_bytes // (92 * 1024) + 1  # so many tokens
    kv = SETTINGS | {"archive": archive, "archive_limit": f"{limit}KiB"}
    sessions = [run(toy, Limited, kind, type_kv, n_seq, kv, np.random.default_rng(seed)) for seed in range(3)]
    assert sum(session.n_lost for session in sessions) > 0
