"""seq_rm, seq_cp, clear, and states, of a cache that something was evicted from."""

import copy

import engine
import numpy as np
import pytest
import reference
import worker
from devices import TOLERANCE
from test_compaction import evict


@pytest.fixture
def compressed(toy, rng):
    """A context of two sequences: 300 tokens compressed to 20 % and 40 more in sequence 0. And its NumPy twin."""
    path = toy()
    net = reference.Network(path)
    with engine.Model(path, engine.params(budget="20%")) as model:
        with engine.Context(model, n_ctx=1024, n_seq_max=2, n_ubatch=128) as ctx:
            for n, then in ((300, "compress"), (40, "")):
                tokens = rng.integers(3, 512, n)
                ctx.decode(tokens)
                net.decode(tokens)
                if then:
                    ctx.compress()
                    evict(net, ctx)
            yield ctx, net


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[pair], b[pair]) for pair in a)


def agree(ctx, net, tokens, seq=0):
    return np.abs(ctx.decode(tokens, seq, all_logits=True) - net.decode(tokens)).max() < TOLERANCE


def test_positions_range(compressed):
    """The first position that can be taken back is the first of the tail."""
    ctx, _ = compressed
    assert 0 < ctx.pos_min() <= 300 and ctx.pos_max() == 339
    assert not ctx.can_shift()


def test_removing_the_end_of_the_tail(compressed, rng):
    ctx, net = compressed
    assert ctx.seq_rm(0, 320, -1)
    assert ctx.pos_max() == 319 and ctx.stats().tokens_seen == 320
    for pair, pos in ctx.held().items():
        net.keep(*pair, pos)
        assert pos[-1] == 319
    net.q_pos = net.q_pos[net.q_pos < 320]
    assert agree(ctx, net, rng.integers(3, 512, 10))


def test_replaying_the_last_token_after_a_compression(compressed):
    """llama-cpp-python asks for this when a prompt is repeated: the last token once more, for its logits."""
    ctx, net = compressed
    ctx.compress()
    evict(net, ctx)
    assert ctx.seq_rm(0, 339, -1)
    for (il, h), pos in net.pos.items():
        net.keep(il, h, pos[pos < 339])
    assert np.abs(ctx.decode([9], pos=339) - net.decode([9], [339])[0]).max() < TOLERANCE


@pytest.mark.parametrize("p0, p1", [(0, 10), (100, -1), (0, 339), (2, 3), (250, 320)])
def test_removing_from_the_compressed_region_is_refused(compressed, rng, p0, p1):
    """Never half done: positions, entries and the next logits are what they were."""
    ctx, net = compressed
    held, entries, stats = ctx.held(), ctx.entries(1, 0), ctx.stats()
    assert not ctx.seq_rm(0, p0, p1)
    assert same(held, ctx.held()) and np.array_equal(entries.k, ctx.entries(1, 0).k)
    assert (ctx.pos_max(), ctx.stats().tokens_seen) == (339, stats.tokens_seen)
    assert agree(ctx, net, rng.integers(3, 512, 5))


@pytest.mark.parametrize("p0, p1", [(-1, -1), (0, -1), (0, 340), (0, 5000)])
def test_removing_everything(compressed, rng, p0, p1):
    ctx, net = compressed
    ctx.decode(other := rng.integers(3, 512, 50), seq=1)
    assert ctx.seq_rm(0, p0, p1)
    assert ctx.pos_max() == -1 and all(len(pos) == 0 for pos in ctx.held().values())
    stats = ctx.stats()
    assert (stats.tokens_seen, stats.entries_held) == (0, 0)
    net.clear()
    tokens = rng.integers(3, 512, 60)
    assert agree(ctx, net, tokens)
    ctx.compress()  # with nothing left over from before: neither queries nor scores nor positions
    assert all(set(pos) <= set(range(60)) for pos in ctx.held().values())
    net.clear()
    net.decode(other)
    assert agree(ctx, net, [5, 6], seq=1)


def test_compressing_again_after_a_reset_uses_fresh_scores(toy, rng):
    """Stale windows or scores of the text before would select differently from a new context."""
    path, first, second = toy(), rng.integers(3, 512, 300), rng.integers(3, 512, 250)
    held = []
    with engine.Model(path, engine.params(budget="20%")) as model:
        for reset in (True, False):
            with engine.Context(model) as ctx:
                if reset:
                    ctx.decode(first)
                    ctx.score()
                    ctx.compress()
                    ctx.clear()
                ctx.decode(second)
                ctx.compress()
                held.append(ctx.held())
    assert same(*held)


def test_copy(compressed, rng):
    """A copy holds the same, and the two go separate ways."""
    ctx, net = compressed
    ctx.seq_cp(0, 1)
    twin = copy.deepcopy(net)
    assert same(ctx.held(0), ctx.held(1)) and ctx.pos_max(1) == 339
    assert agree(ctx, twin, rng.integers(3, 512, 30), seq=1)
    assert agree(ctx, net, rng.integers(3, 512, 10))
    ctx.compress(1)
    evict(twin, ctx, 1)
    assert agree(ctx, net, [5, 6, 7])
    assert agree(ctx, twin, [5, 6, 7], seq=1)
    assert ctx.seq_rm(0)
    assert agree(ctx, twin, [8, 9], seq=1)


@pytest.mark.parametrize(
    "call", [("seq_add", 0, 310, 320, 5), ("seq_add", 0, 0, -1, -3), ("seq_div", 0, 0, -1, 2), ("seq_cp", 0, 1, 0, 320), ("seq_cp", 0, 1, 310, 320)]
)
def test_what_cannot_be_done_does_nothing(compressed, rng, call):
    """Positions can't shift and parts can't be copied; the calls have no answer to give, so they must leave things alone."""
    ctx, net = compressed
    name, *args = call
    held = ctx.held()
    getattr(ctx, name)(*args)
    assert same(held, ctx.held()) and (ctx.pos_max(0), ctx.pos_max(1)) == (339, -1)
    assert agree(ctx, net, rng.integers(3, 512, 5))


def test_keeping_one_sequence(toy, rng):
    """With the common pool that --kv-unified stands for, everything else goes."""
    with engine.Model(toy(), engine.params(budget="20%")) as model:
        with engine.Context(model, n_seq_max=3, kv_unified=True) as ctx:
            for seq in range(3):
                ctx.decode(rng.integers(3, 512, 200), seq)
                ctx.compress(seq)
            held = ctx.held(1)
            ctx.seq_keep(1)
            assert same(held, ctx.held(1))
            assert [ctx.stats(seq).entries_held for seq in (0, 2)] == [0, 0]
            assert (ctx.pos_max(0), ctx.pos_max(2)) == (-1, -1)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "lfm2"])
@pytest.mark.parametrize("n_seq_max, stranger", [(1, 1), (1, 255), (1, 4000), (3, 3), (3, 255), (3, -3)])
def test_sequences_that_do_not_exist(toy, rng, arch, n_seq_max, stranger):
    """They have nothing, and whatever is asked of them leaves those that do exist alone."""
    path, tokens = toy(arch), rng.integers(3, 512, 200)
    context = {"n_seq_max": n_seq_max, "kv_unified": n_seq_max > 1}
    with engine.Model(path, engine.params(budget="20%")) as model, engine.Context(model, **context) as ctx:
        ctx.decode(tokens)
        ctx.compress()
        held, k = ctx.held(), ctx.entries(*ctx.pairs()[0]).k
        before = ctx.pos_min(), ctx.pos_max(), ctx.stats().tokens_seen
        saved = ctx.seq_save(0)
        assert (ctx.pos_min(stranger), ctx.pos_max(stranger)) == (-1, -1)
        for p0, p1 in [(-1, -1), (0, 10), (0, 5000)]:
            assert stranger < 0 or ctx.seq_rm(stranger, p0, p1)  # a negative number means all of them
        ctx.seq_cp(0, stranger)
        ctx.seq_cp(stranger, 0)
        ctx.seq_add(stranger, 0, -1, 5)
        ctx.seq_div(stranger, 0, -1, 2)
        assert ctx.seq_save(stranger) == b"" and not ctx.seq_load(saved, stranger)
        assert "doesn't exist" in engine.last_error()
        assert same(held, ctx.held()) and np.array_equal(k, ctx.entries(*ctx.pairs()[0]).k)
        assert (ctx.pos_min(), ctx.pos_max(), ctx.stats().tokens_seen) == before
        logits = ctx.decode([5])
        ctx.seq_keep(stranger)  # of which there is nothing: so nothing stays
        assert (ctx.pos_max(), ctx.stats().entries_held) == (-1, 0)
        assert ctx.seq_load(saved)
        assert np.abs(ctx.decode([5]) - logits).max() < 20 * TOLERANCE


@pytest.mark.parametrize("arch", ["gemma2", "lfm2"])
def test_all_parts_of_a_memory_do_the_same(toy, rng, arch):
    """Sliding windows and recurrent states are never copied, kept or shifted without the full attention beside them."""
    with engine.Model(toy(arch), engine.params(budget="20%")) as model, engine.Context(model, n_ctx=1536, n_seq_max=3) as ctx:
        for seq in (0, 1):
            ctx.decode(rng.integers(3, 512, 200), seq)
            ctx.compress(seq)
        ctx.seq_cp(0, 2, 0, 150)  # a part
        ctx.seq_cp(0, 2, 100, -1)
        ctx.seq_add(0, 0, -1, 3)
        assert [ctx.pos_max(s) for s in range(3)] == [199, 199, -1]
        fresh = ctx.decode([5, 6, 7], seq=2)
        ctx.seq_rm(2)
        ctx.seq_keep(1)
        assert [ctx.pos_max(s) for s in range(3)] == [-1, 199, -1]
        assert ctx.pos_min(1) >= ctx.tail_begin(1) > 0
        for seq in (0, 2):
            assert np.abs(ctx.decode([5, 6, 7], seq) - fresh).max() < TOLERANCE


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("arch, shape, n", [("lfm2", {}, 30), ("lfm2", {}, 300), ("gemma2", {"swa": 16}, 700)])
def test_text_behind_a_mark_is_taken_back(toy, rng, arch, shape, n, compressed):
    """By layers that can't go back by themselves, too; again and again, and of its sequence alone."""
    text, more = rng.integers(3, 512, n), rng.integers(3, 512, 20)
    with engine.Model(toy(arch, **shape), engine.params(budget="20%")) as model:
        with engine.Context(model, n_ctx=2048, n_seq_max=2, n_ubatch=128, swa_full=False) as ctx:
            for seq in (0, 1):
                ctx.decode(rng.integers(3, 512, 300), seq)
            if compressed:
                ctx.compress()
            ctx.decode(text)
            assert not ctx.seq_rm(0, 300, -1)
            ctx.seq_rm(0)
            ctx.decode(rng.integers(3, 512, 300))
            if compressed:
                ctx.compress()
            ctx.mark()
            first = ctx.decode(text)
            for _ in range(2):
                assert not ctx.seq_rm(0, 299, -1)
                ctx.decode(more, 1)
                assert ctx.seq_rm(0, 300, -1)
                assert (ctx.pos_max(0), ctx.stats(0).tokens_seen) == (299, 300)
                ctx.decode(more[:7])  # another text, which the mark stands before, too
                assert ctx.seq_rm(0, 300, -1)
                # a sliding window's rows may be in another order
                assert np.abs(ctx.decode(text) - first).max() <= (20 * TOLERANCE if arch == "gemma2" else 0)
            assert ctx.pos_max(1) == 339


@pytest.mark.parametrize("change", ["load", "copy", "clear", "keep", "remove"])
def test_a_mark_is_of_what_was_there(toy, rng, change):
    """Another text that is as long has none."""
    with engine.Model(toy("lfm2"), engine.params(budget="20%")) as model, engine.Context(model, n_ctx=1024, n_seq_max=2) as ctx:
        for seq in (0, 1):
            ctx.decode(rng.integers(3, 512, 100), seq)
        other = ctx.seq_save(1)
        ctx.mark(0)
        if change == "load":
            ctx.seq_load(other)
        elif change == "copy":
            ctx.seq_cp(1, 0)
        elif change == "clear":
            ctx.clear()
        elif change == "keep":
            ctx.seq_keep(1)
        else:
            ctx.seq_rm(0)
        if ctx.pos_max(0) < 0:
            ctx.decode(rng.integers(3, 512, 100))
        ctx.decode([5, 6, 7])
        assert not ctx.seq_rm(0, 100, -1)
        assert ctx.pos_max(0) == 102


def test_room_is_found_where_there_is_some(toy, rng):
    """llama.cpp restored the search positions of the wrong sequences after a batch that didn't fit at first."""
    with engine.Model(toy(n_layer=1), engine.params(policy="full")) as model:
        with engine.Context(model, n_ctx=3072, n_seq_max=3, n_ubatch=64) as ctx:
            for seq, n in enumerate((160, 100, 10)):
                ctx.decode(rng.integers(3, 512, n), seq)
            ctx.submit([(5, 100 + i, (1,)) for i in range(128)] + [(6, 10 + i, (2,)) for i in range(300)])
            assert [ctx.pos_max(s) for s in range(3)] == [159, 227, 309]


def test_turning_the_policy_off_leaves_live_contexts_alone(toy, rng):
    """Their graphs stay as large as they are, whatever contexts made later get."""
    path = toy(n_layer=16, n_head=8, n_head_kv=4, n_embd=128, head_dim=32, n_ff=64)
    with engine.Model(path, engine.params(budget="10%")) as model, engine.Context(model, n_ctx=2048, n_seq_max=4) as ctx:
        for seq in range(4):
            ctx.decode(rng.integers(3, 512, 200), seq)
            ctx.compress(seq)
        model.set_params(None)
        ctx.reserve_again()
        ctx.decode([5])
        ctx.compress()
        assert ctx.stats().tokens_seen == 201


def test_two_contexts_of_one_model(toy, rng):
    """Each has the settings it was made with, and its own cache."""
    path, tokens = toy(), rng.integers(3, 512, 300)
    with engine.Model(path, engine.params(budget="20%")) as model, engine.Context(model) as a:
        model.set_params(engine.params(budget="60%", policy="streaming"))
        with engine.Context(model) as b:
            for ctx in (a, b):
                ctx.decode(tokens)
                ctx.compress()
            assert (a.stats().entries_held, b.stats().entries_held) == (360, 1080)
            for ctx in (b, a):
                net = reference.Network(path)
                net.decode(tokens)
                evict(net, ctx)
                assert agree(ctx, net, [5, 6, 7])


@pytest.mark.parametrize("how", ["seq_load", "load", "seq_cp", "clear"])
def test_a_cache_replaced_between_equal_batches(compressed, rng, how):
    """A graph that was built for one storage can't be run again on another, though nothing about the batch changed."""
    ctx, net = compressed
    ctx.decode(other := rng.integers(3, 512, 340), seq=1)
    saved, whole, twin = ctx.seq_save(0), ctx.save(), copy.deepcopy(net)
    for token in (5, 6, 7):
        ctx.decode([token], seq=1)
    if how == "seq_load":
        assert ctx.seq_load(saved, 1)
    elif how == "load":
        assert ctx.load(whole)
        twin.clear()
        twin.decode(other)
    elif how == "seq_cp":
        ctx.seq_cp(0, 1)
    else:
        ctx.clear()
        twin.clear()
    for token in (8, 9):
        assert agree(ctx, twin, [token], seq=1)


def test_a_copy_over_a_sequence_of_the_same_shape(toy, rng):
    """Nothing about the batch or the number of cells changes, only where they are."""
    path = toy()
    nets = [reference.Network(path) for _ in range(2)]
    with engine.Model(path, engine.params()) as model, engine.Context(model, n_seq_max=2) as ctx:
        for seq, net in enumerate(nets):
            tokens = rng.integers(3, 512, 100)
            ctx.decode(tokens, seq)
            net.decode(tokens)
        for token in (5, 6, 7):
            assert agree(ctx, nets[1], [token], seq=1)
        ctx.seq_cp(0, 1)
        for token in (8, 9):
            assert agree(ctx, nets[0], [token], seq=1)


# --- states ---


def fresh(compressed, **changes):
    ctx, _ = compressed
    return engine.Context(ctx.model, **({"n_ctx": 1024, "n_seq_max": 2, "n_ubatch": 128} | changes))


def test_state_of_everything(compressed, rng):
    """Loaded into another context of the same kind: the same entries, the same logits and scores to the bit."""
    ctx, _ = compressed
    ctx.decode(rng.integers(3, 512, 100), seq=1)
    data = ctx.save()
    with fresh(compressed) as other:
        assert other.load(data)
        for seq in (0, 1):
            assert same(ctx.held(seq), other.held(seq)) and ctx.pos_max(seq) == other.pos_max(seq)
            assert (ctx.pos_min(seq), ctx.stats(seq).tokens_seen) == (other.pos_min(seq), other.stats(seq).tokens_seen)
            assert same(ctx.score(seq), other.score(seq)), "the observation window was not restored"
        ctx.compress()
        other.compress()
        assert same(ctx.held(), other.held())
        tokens = rng.integers(3, 512, 30)
        for seq in (1, 0):
            assert np.array_equal(ctx.decode(tokens, seq, all_logits=True), other.decode(tokens, seq, all_logits=True))


def test_state_of_one_sequence(compressed, rng):
    """Into another place of the same context, and over a sequence that held something else."""
    ctx, _ = compressed
    data = ctx.seq_save(0)
    ctx.decode(rng.integers(3, 512, 100), seq=1)
    assert ctx.seq_load(data, 1)
    assert same(ctx.held(0), ctx.held(1))
    tokens = rng.integers(3, 512, 30)
    assert np.array_equal(ctx.decode(tokens, 0, all_logits=True), ctx.decode(tokens, 1, all_logits=True))


def test_state_is_small(compressed, toy, rng):
    """A saved session shrinks with the cache."""
    ctx, _ = compressed
    with fresh(compressed) as full:
        full.decode(rng.integers(3, 512, 340))
        assert len(ctx.seq_save(0)) < 0.5 * len(full.seq_save(0))


def broken_states(good, ours, rng):
    """Cut anywhere; with one bit flipped in our part, or in llama.cpp's own header before it (which has no checksum)."""
    yield "empty", b"\0", True
    for n in (4, 11, 60, ours, len(good) // 2, len(good) - 1):
        yield f"first {n} bytes", good[:n], True
    for i in [*range(0, min(96, ours), 5), *range(ours, ours + 96, 5), *rng.integers(ours, len(good), 40)]:
        data = bytearray(good)
        data[i] ^= 1 << rng.integers(8)
        yield f"byte {i} flipped", bytes(data), i >= ours


@pytest.mark.parametrize("whole", [True, False], ids=["context", "sequence"])
def test_broken_and_foreign_states(compressed, toy, rng, whole):
    """Refused, and never half taken: whatever comes, the context goes on from an empty or a complete cache."""
    ctx, _ = compressed
    save, load = (ctx.save, ctx.load) if whole else (ctx.seq_save, ctx.seq_load)
    good, foreign = save(), {}
    path, tokens = toy(), rng.integers(3, 512, 50).tolist()
    name = "save" if whole else "seq_save"
    steps, context = [["prompt", tokens], [name]], {"n_ctx": 1024, "n_seq_max": 2}
    foreign["stock cache"] = worker.run_steps(path, steps, context)[1]
    foreign["another type"] = worker.run_steps(path, steps, context | {"type_k": "f16"}, {})[1]
    foreign["another model"] = worker.run_steps(toy(n_layer=2), steps, context, {})[1]
    net = reference.Network(path)
    net.decode(tokens)
    expected = net.decode([5])[0]
    others = [(name, data, True) for name, data in foreign.items()]
    # our part comes last, after llama.cpp's header and, in the state of a context, the last logits
    ours = len(good) - len(ctx.seq_save(0)) + 96 if whole else 96
    for what, data, refused in [*others, *broken_states(good, ours, rng)]:
        accepted = load(data)
        assert not (accepted and refused), what
        ctx.decode([5])  # whatever is in there now
        ctx.clear()
        ctx.decode(tokens)
        assert np.abs(ctx.decode([5]) - expected).max() < TOLERANCE, what
        ctx.clear()
    assert load(good)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "lfm2"])
def test_state_of_an_empty_sequence(toy, rng, arch):
    """Over a full one: nothing of it is left in any part of the memory."""
    with engine.Model(toy(arch), engine.params()) as model, engine.Context(model) as ctx:
        nothing = ctx.seq_save()
        fresh = ctx.decode([5, 6, 7])
        ctx.decode(rng.integers(3, 512, 50))
        assert ctx.seq_load(nothing)
        assert ctx.pos_max() == -1
        assert np.abs(ctx.decode([5, 6, 7]) - fresh).max() < TOLERANCE


def test_own_state_of_uneven_heads(toy, rng):
    """One ranking may leave a head more than n_ctx tokens, once more have been seen."""
    kv = dict(policy="custom:global-raw", budget="128", recent=8)
    with engine.Model(toy(n_layer=2), engine.params(**kv)) as model, engine.Context(model, n_ctx=256, n_batch=64) as ctx:
        ctx.set_scorer(lambda seq, il, head, pos: np.full(len(pos), 1.0 if (il, head) == (0, 0) else 1e-6, np.float32))
        for _ in range(40):
            ctx.decode(rng.integers(3, 512, 32))
        ctx.compress()
        held, data = ctx.held(), ctx.seq_save()
        assert len(held[0, 0]) > 256
        assert ctx.seq_load(data), engine.last_error()
        assert same(held, ctx.held()) and ctx.stats().tokens_seen == 1280


def test_state_that_is_too_large_names_the_context_it_needs(compressed, rng):
    ctx, _ = compressed
    ctx.decode(rng.integers(3, 512, 900), seq=1) if ctx.pos_max(1) < 0 else None
    data = ctx.seq_save(1)
    with fresh(compressed, n_ctx=512) as small:
        assert not small.seq_load(data, 0)
        assert "-c" in engine.last_error() and "damaged" not in engine.last_error()
        assert small.pos_max(0) == -1


def test_state_of_an_unrotated_cache_is_refused(toy, rng, monkeypatch):
    """llama.cpp rotates what it quantises, unless told not to: such keys must not meet rotated queries."""
    with engine.Model(toy(), engine.params()) as model:
        monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
        with engine.Context(model, type_k="q8_0") as plain:
            plain.decode(rng.integers(3, 512, 50))
            data = plain.seq_save()
            assert plain.seq_load(data)
        monkeypatch.delenv("LLAMA_ATTN_ROT_DISABLE")
        with engine.Context(model, type_k="q8_0") as rotated:
            assert not rotated.seq_load(data) and "rotation" in engine.last_error()


def test_size_of_a_state(compressed):
    """Said without making it, and right to the byte."""
    ctx, _ = compressed
    assert len(ctx.seq_save(0)) == ctx.seq_size(0) and len(ctx.save()) == ctx.size()


def test_compressed_state_in_a_stock_context(compressed, toy, rng):
    """The other way round: a context without our cache refuses what it can't hold."""
    ctx, _ = compressed
    data, whole = ctx.seq_save(0), ctx.save()
    tokens = rng.integers(3, 512, 20).tolist()
    steps = [["seq_load", data, 0], ["clear"], ["load", whole], ["clear"], ["decode", tokens]]
    context = {"n_ctx": 1024, "n_seq_max": 2}
    loaded, _, loaded_whole, _, logits = worker.run_steps(toy(), steps, context)
    assert not loaded and not loaded_whole
    assert np.array_equal(logits, worker.run_steps(toy(), [["decode", tokens]], context)[0])


def test_text_that_would_go_on_before_a_gap_needs_its_sliding_window(toy, rng):
    """Tokens 52 to 58 are removed, then 59: text goes on at 52, and a window of 16 looks back to 37. A restored one has 44 to 59."""
    tokens = rng.integers(3, 512, 60)
    with engine.Model(toy("gemma2", swa=16), engine.params(recent=8)) as model:
        with engine.Context(model, swa_full=True) as ctx, engine.Context(model, swa_full=True) as restored, engine.Context(model) as plain:
            ctx.decode(tokens)
            assert restored.seq_load(ctx.seq_save(0))
            for each, is_there in ((ctx, True), (restored, False)):
                assert each.seq_rm(0, 52, 59)
                assert each.seq_rm(0, 59, -1) == is_there
            assert (ctx.pos_max(0), restored.pos_max(0)) == (51, 59)
            plain.decode(tokens[:52])
            assert np.abs(ctx.decode([7]) - plain.decode([7])).max() < 20 * TOLERANCE
