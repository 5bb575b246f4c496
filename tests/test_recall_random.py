"""Any order of calls on a cache with an archive: what is held and archived is exactly what was seen, bit by bit."""

import engine
import numpy as np
import pytest

SETTINGS = {"budget": "40", "window": 16, "sink": 2, "recent": 8, "min_tokens": 0, "recall_tokens": 24}
KINDS = {"llama": ("llama", {}), "iswa": ("gemma2", {"swa": 16}), "hybrid": ("lfm2", {})}
POLICIES = ["laprox", "snapkv", "streaming", "keydiff", "random", "laprox:uniform"]


class Session:
    """`seen`: by sequence, the rows of each entry at the time its token was evaluated last: {position: {pair: bytes}}."""

    def __init__(self, ctx, kind, n_seq, archive, rng):
        self.ctx, self.archive, self.rng = ctx, archive, rng
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
            budget = str(self.rng.choice(["30", "40", "60%", "100%"]))
            self.ctx.set_params(engine.params(**SETTINGS | {"archive": self.archive, "budget": budget, "policy": str(self.rng.choice(POLICIES))}))
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
        self.ctx.set_params(engine.params(**SETTINGS | {"archive": self.archive, "budget": "100%", "policy": "streaming"}))
        for s, seen in enumerate(self.seen):
            self.ctx.compress(s)
            assert {(pair, pos, row) for pair, pos, row in self.rows(s)} == {
                (pair, pos, row) for pos, rows in seen.items() for pair, row in rows.items()
            }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("type_kv", "archive", "n_seq"), [("f16", "ram", 1), ("q8_0", "auto", 3), ("q4_0", "ram", 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_held_and_archived_is_what_was_seen(toy, kind, type_kv, archive, n_seq, seed):
    arch, shape = KINDS[kind]
    rng = np.random.default_rng(seed)
    kv = engine.params(**SETTINGS | {"archive": archive})
    with engine.Model(toy(arch, n_layer=2, **(shape | ({"recurrent": (0,)} if kind == "hybrid" else {}))), kv) as model:
        with engine.Context(model, n_ctx=512 * n_seq, n_batch=128, n_seq_max=n_seq, type_k=type_kv, swa_full=True) as ctx:
            session = Session(ctx, kind, n_seq, archive, rng)
            for i in range(120):
                call = str(rng.choice(["turn"] * 4 + ["generate", "compress", "compress", "rm", "rm", "cp", "save", "load", "clear"]))
                getattr(session, call)()
                session.check(call)
                if i % 20 == 19:
                    session.check_all()
