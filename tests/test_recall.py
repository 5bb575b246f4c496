"""An archive behind the cache: what was evicted comes back, bit by bit, when another question needs it."""

import engine
import numpy as np
import pytest
import reference
from devices import TOLERANCE

KV = {"budget": "20%", "min_tokens": 0, "window": 16, "archive": "ram"}
KINDS = {"llama": ("llama", {}), "mha": ("llama", {"n_head": 4, "n_head_kv": 4}), "iswa": ("gemma2", {"swa": 16}), "hybrid": ("lfm2", {})}


@pytest.fixture(params=KINDS)
def kind(request, toy):
    arch, shape = KINDS[request.param]
    return toy(arch, **shape)


def everything(ctx, seq=0):
    """What every KV head of every layer holds: positions, and the bytes of K and V."""
    return {pair: (e.pos.tolist(), e.k.tobytes(), e.v.tobytes()) for pair in ctx.pairs() for e in [ctx.entries(*pair, seq)]}


def whole(ctx, **settings):
    """Bring everything back."""
    ctx.set_params(engine.params(**KV | {"budget": "100%"} | settings))
    ctx.compress()


@pytest.mark.parametrize("archive", ["ram", "auto"])
@pytest.mark.parametrize("type_kv", ["f32", "f16", "q8_0", "q4_0"])
def test_every_entry_comes_back_bit_by_bit(kind, rng, type_kv, archive):
    kv = engine.params(**KV | {"archive": archive})
    with engine.Model(kind, kv) as model, engine.Context(model, n_ctx=1024, type_k=type_kv) as ctx:
        ctx.decode(rng.integers(3, 512, 400))
        before = everything(ctx)
        ctx.compress()
        assert ctx.stats().entries_held < 0.3 * ctx.stats().entries_full
        whole(ctx, archive=archive)
        assert everything(ctx) == before


def test_after_any_turns_what_is_seen_can_be_held(kind, rng):
    """Entries of several compressions; those of a turn are the ones that were computed last."""
    with engine.Model(kind, engine.params(**KV)) as model, engine.Context(model, n_ctx=2048) as ctx:
        for n in (300, 40, 1, 200, 3, 90):
            ctx.decode(rng.integers(3, 512, n))
            ctx.compress()
        whole(ctx)
        n = ctx.stats().tokens_seen
        assert all(pos == list(range(n)) for pos, _, _ in everything(ctx).values())


@pytest.mark.parametrize("policy", ["laprox", "snapkv", "expected", "tova", "keydiff", "streaming", "cake"])
def test_a_selection_from_the_archive_is_one_from_the_full_cache(kind, rng, policy):
    """Kept by one policy's choice, then chosen anew by another's: as if the first had never been."""
    tokens = rng.integers(3, 512, 400)
    settings = KV | {"policy": policy}
    with engine.Model(kind, engine.params(**settings)) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(tokens)
        ctx.compress()
        wanted = {pair: pos.tolist() for pair, pos in ctx.held().items()}
    with engine.Model(kind, engine.params(**settings)) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(tokens)
        ctx.set_params(engine.params(**KV | {"policy": "random", "budget": "15%"}))
        ctx.compress()
        assert {pair: pos.tolist() for pair, pos in ctx.held().items()} != wanted
        ctx.set_params(engine.params(**settings))
        ctx.compress()
        assert {pair: pos.tolist() for pair, pos in ctx.held().items()} == wanted


def test_without_an_archive_what_is_evicted_is_gone(kind, rng):
    with engine.Model(kind, engine.params(**KV | {"archive": "off"})) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(rng.integers(3, 512, 400))
        ctx.compress()
        held = everything(ctx)
        whole(ctx, archive="off")
        assert everything(ctx) == held
        assert ctx.tail_begin() > 0
        assert not ctx.seq_rm(0, 100, -1)


@pytest.mark.parametrize("archive", ["ram", "auto"])
def test_nothing_of_it_shows_before_a_second_prompt(kind, rng, archive):
    """The first compression, and what is generated after it, are bit by bit those without an archive."""
    tokens, outputs = rng.integers(3, 512, 400), []
    for where in ("off", archive):
        with engine.Model(kind, engine.params(**KV | {"archive": where})) as model, engine.Context(model, n_ctx=1024) as ctx:
            ctx.decode(tokens)
            ctx.compress()
            outputs.append((everything(ctx), [ctx.decode([5 + i]).tobytes() for i in range(8)], ctx.stats().kv_bytes))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_a_cut_into_what_was_compressed(toy, rng, arch):
    path, tokens = toy(arch), rng.integers(3, 512, 400)
    with engine.Model(path, engine.params(**KV)) as model, engine.Context(model, n_ctx=1024, swa_full=True) as ctx:
        ctx.decode(tokens)
        before = everything(ctx)
        ctx.compress()
        held = ctx.held()
        assert ctx.tail_begin() == 0
        assert ctx.pos_min() == 0
        assert ctx.seq_rm(0, 250, -1)
        assert ctx.pos_max() == 249
        assert ctx.stats().tokens_seen == 250
        for pair, pos in ctx.held().items():  # what it held, and the last `recent` tokens whole
            assert set(pos) == {p for p in held[pair] if p < 250} | set(range(218, 250))
        ctx.decode(tokens[250:300])
        assert ctx.pos_max() == 299
        whole(ctx)
        for pair, (pos, k, v) in everything(ctx).items():
            assert pos == list(range(300))
            width = len(before[pair][1]) // 400
            assert k[: 250 * width] == before[pair][1][: 250 * width]


def test_recent_tokens_stay_after_a_cut(toy, rng):
    """They aren't in the tail any more, which is of what came since."""
    with engine.Model(toy(), engine.params(**KV)) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(rng.integers(3, 512, 400))
        ctx.prompt_done()
        assert ctx.seq_rm(0, 300, -1)
        ctx.decode(rng.integers(3, 512, 5))
        ctx.compress()
        assert all(set(range(305 - 32, 305)) <= set(pos.tolist()) for pos in ctx.held().values())
        assert ctx.stats().entries_held == reference.budget_entries("20%", 305, len(ctx.pairs()), 4, 32)


def test_a_state_after_a_cut_to_what_never_was_compressed(toy, rng):
    with engine.Model(toy(), engine.params(**KV)) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(rng.integers(3, 512, 300))
        assert ctx.seq_rm(0, 0, 10)
        ctx.compress()
        assert ctx.seq_rm(0, 5, -1)
        ctx.decode([5, 6, 7], pos=5)
        assert ctx.seq_load(ctx.seq_save()), engine.last_error()


def test_a_cut_to_almost_nothing_and_to_nothing(toy, rng):
    with engine.Model(toy(), engine.params(**KV)) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(rng.integers(3, 512, 400))
        ctx.compress()
        assert ctx.seq_rm(0, 1, -1)
        assert ctx.stats().tokens_seen == 1
        ctx.decode(rng.integers(3, 512, 100))
        ctx.compress()
        assert ctx.seq_rm(0, 0, -1)
        assert ctx.stats().tokens_seen == 0
        assert ctx.stats().archived_bytes == 0
        ctx.decode(rng.integers(3, 512, 100))


def test_a_piece_out_of_the_middle_is_refused(toy, rng):
    with engine.Model(toy(), engine.params(**KV)) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(rng.integers(3, 512, 400))
        ctx.compress()
        before = everything(ctx)
        assert not ctx.seq_rm(0, 100, 200)
        assert everything(ctx) == before


def test_a_turn_is_evaluated_again_on_what_it_brought_back(toy, rng):
    """recall = 2: after a first selection and after a second one, those tokens are cut off for the caller to evaluate."""
    path, document, turn = toy(), rng.integers(3, 512, 400), rng.integers(3, 512, 30)
    with engine.Model(path, engine.params(**KV | {"recall": 2})) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(document)
        assert ctx.prompt_done() is None  # nothing was evicted before
        assert ctx.stats().compressions == 1
        ctx.decode(turn)
        for _ in range(2):
            assert ctx.prompt_done() == 400
            assert ctx.pos_max() == 399
            ctx.decode(turn)
        assert ctx.prompt_done() is None
        assert ctx.stats().recalls == 2
        assert all({*range(400, 430)} <= set(pos) for pos in ctx.held().values())
        budget = 0.2 * 430 + 30
        assert ctx.stats().entries_held <= budget * len(ctx.pairs())
        ctx.decode([7])
        assert ctx.pos_max() == 430


def test_the_longest_turn_to_be_evaluated_again(toy, rng):
    path = toy()
    with engine.Model(path, engine.params(**KV | {"recall_tokens": 50})) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(rng.integers(3, 512, 400))
        ctx.prompt_done()
        ctx.decode(rng.integers(3, 512, 200))
        assert ctx.prompt_done() == 550
        ctx.decode(rng.integers(3, 512, 50))
        assert ctx.prompt_done(most=20) == 580
        ctx.decode(rng.integers(3, 512, 20))
        assert ctx.prompt_done() is None


def test_layers_that_cannot_be_cut_are_not_evaluated_again(toy, rng):
    """A recurrent state has no way back: entries come back, and the turn stays as it was computed."""
    with engine.Model(toy("lfm2"), engine.params(**KV)) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(rng.integers(3, 512, 400))
        ctx.prompt_done()
        ctx.decode(rng.integers(3, 512, 30))
        assert ctx.prompt_done() is None
        assert ctx.stats().recalls == 1
        ctx.decode([7])


def test_a_turn_behind_a_mark_is_evaluated_again(toy, rng):
    """On what came back for it, and on the recurrent state that there was when it began."""
    path, tokens, turn = toy("lfm2"), rng.integers(3, 512, 400), rng.integers(3, 512, 30)
    with engine.Model(path, engine.params(**KV)) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(tokens)
        ctx.prompt_done()
        first = ctx.held()
        ctx.mark()
        ctx.decode(turn)
        for recalls in (1, 2):
            assert ctx.prompt_done() == 400
            assert ctx.pos_max() == 399 and ctx.stats().recalls == recalls
            held = ctx.held()
            logits = ctx.decode(turn, all_logits=True)
        assert ctx.prompt_done() is None
        assert any(not np.array_equal(held[pair], first[pair]) for pair in held)
    net = reference.Network(path)
    net.decode(tokens)
    for pair, pos in held.items():
        net.keep(*pair, pos)
    assert np.abs(logits - net.decode(turn)).max() < TOLERANCE


def test_a_mark_within_a_turn(toy, rng):
    """What comes before it was evaluated once and stays; what is at most evaluated again bounds it as ever."""
    for n_before, most, again in ((0, 100, 400), (20, 100, 420), (20, 30, 420), (20, 29, None)):
        with engine.Model(toy("lfm2"), engine.params(**KV)) as model, engine.Context(model, n_ctx=1024) as ctx:
            ctx.decode(rng.integers(3, 512, 400))
            ctx.prompt_done()
            if n_before:
                ctx.decode(rng.integers(3, 512, n_before))
            ctx.mark()
            ctx.decode(rng.integers(3, 512, 30))
            assert ctx.prompt_done(most=most) == again
            assert ctx.stats().recalls == 1


def test_a_copy_shares_what_was_archived_and_goes_its_own_way(toy, rng):
    with engine.Model(toy(), engine.params(**KV)) as model, engine.Context(model, n_ctx=2048, n_seq_max=2) as ctx:
        ctx.decode(rng.integers(3, 512, 400), seq=0)
        before = everything(ctx)
        ctx.compress(0)
        alone = ctx.stats(0).archived_bytes
        ctx.seq_cp(0, 1)
        assert ctx.stats(1).archived_bytes == alone
        assert ctx.stats(-1).archived_bytes == alone  # once, for both
        assert ctx.seq_rm(1, 200, -1)
        ctx.decode(rng.integers(3, 512, 100), seq=1)
        ctx.seq_rm(1)
        whole(ctx)
        assert everything(ctx) == before


def test_a_long_generation_is_archived_too(toy, rng):
    with engine.Model(toy(), engine.params(**KV | {"budget": "64"})) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(rng.integers(3, 512, 200))
        ctx.prompt_done()
        for token in rng.integers(3, 512, 1500):
            ctx.decode([token])
        stats = ctx.stats()
        assert stats.compressions > 3
        assert stats.archived_entries > 1000 * len(ctx.pairs())
        assert stats.entries_held < 400 * len(ctx.pairs())


@pytest.mark.parametrize(("archive", "limit", "why"), [("ram", "100KiB", "archive_limit"), ("auto", "100KiB", "archive_limit")])
def test_an_archive_that_is_full(toy, rng, archive, limit, why):
    kv = engine.params(**KV | {"archive": archive, "archive_limit": limit})
    with engine.Model(toy(), kv) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(rng.integers(3, 512, 400))
        ctx.compress()
        assert why in engine.recent_log()
        assert ctx.stats().archived_bytes == 0
        assert ctx.stats().tokens_lost == ctx.tail_begin() > 0  # as without one
        ctx.decode(rng.integers(3, 512, 100))
        assert ctx.prompt_done() is None


def lowest(before, held, n_archived, sink=4, recent=32):
    """Tokens that an archive loses which has room for so many: of those that left the tail, what the fewest heads hold now."""
    n = len(before) - recent
    holders = sum(np.bincount(pos[pos < n], minlength=n) for pos in held.values())
    order = sorted(range(sink, n), key=lambda pos: (holders[pos], pos))
    return set(order[: n - n_archived])


@pytest.mark.parametrize("archive", ["ram", "auto"])
@pytest.mark.parametrize("type_kv", ["f16", "q4_0"])
def test_at_its_limit_an_archive_loses_what_the_fewest_heads_hold(kind, rng, archive, type_kv):
    """All that is left can come back; the answer's tokens are lost for later ones, too."""
    with engine.Model(kind, engine.params(**KV)) as model, engine.Context(model, n_ctx=1024, type_k=type_kv) as ctx:
        ctx.decode(rng.integers(3, 512, 100))
        ctx.compress()
        bytes_per_token = ctx.stats().archived_bytes // (100 - 32)
    limit = 240 * bytes_per_token // 1024 + 1
    room = 1024 * limit // bytes_per_token // 8 * 7
    assert 200 < room < 220
    with engine.Model(kind, engine.params(**KV | {"archive": archive, "archive_limit": f"{limit}KiB"})) as model:
        with engine.Context(model, n_ctx=1024, type_k=type_kv) as ctx:
            ctx.decode(rng.integers(3, 512, 400))
            rows = {pair: {p: (k, v) for p, k, v in zip(e.pos.tolist(), map(bytes, e.k), map(bytes, e.v))} for pair in ctx.pairs() for e in [ctx.entries(*pair)]}
            ctx.compress()
            lost = lowest(range(400), ctx.held(), room)
            assert len(lost) == 368 - room and f"{len(lost)} of the 368 tokens" in (said := engine.recent_log()) and "gone for good" in said
            assert ctx.stats().archived_entries == room * len(ctx.pairs()) and ctx.stats().archived_bytes == room * bytes_per_token

            def check():
                assert ctx.stats().tokens_lost == len(lost)
                for pair in ctx.pairs():
                    e = ctx.entries(*pair)
                    assert set(e.pos.tolist()) == set(range(ctx.pos_max() + 1)) - lost
                    assert all((bytes(k), bytes(v)) == rows[pair].get(p, (bytes(k), bytes(v))) for p, k, v in zip(e.pos.tolist(), e.k, e.v))

            ctx.set_archive_in_states(True)
            state = ctx.seq_save()
            whole(ctx, archive=archive, archive_limit=f"{limit}KiB")
            check()
            assert ctx.seq_load(state)
            whole(ctx, archive=archive, archive_limit=f"{limit}KiB")
            check()
            assert ctx.stats().tokens_seen == 400
            if ctx.seq_rm(0, 300, -1):  # recurrent layers can't
                lost = {pos for pos in lost if pos < 300}
                rows = {pair: {p: row for p, row in mine.items() if p < 300} for pair, mine in rows.items()}
                assert (ctx.stats().tokens_seen, ctx.pos_max()) == (300, 299)
                ctx.decode([5])
                whole(ctx, archive=archive, archive_limit=f"{limit}KiB")
                check()
                before = lost
                ctx.decode(rng.integers(3, 512, 300))
                ctx.set_params(engine.params(**KV | {"archive": archive, "archive_limit": f"{limit}KiB"}))
                ctx.compress()
                assert ctx.stats().archived_entries <= room * len(ctx.pairs())
                assert ctx.stats().archived_bytes <= 1024 * limit
                whole(ctx, archive=archive, archive_limit=f"{limit}KiB")
                held = [set(pos.tolist()) for pos in ctx.held().values()]
                lost = set(range(601)) - held[0]
                assert before < lost and all(h == held[0] for h in held)
                check()


def test_what_copies_share_is_not_lost(toy, rng):
    """One of them gives its archive up, the other keeps what it has."""
    with engine.Model(toy(), engine.params(**KV)) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(rng.integers(3, 512, 400))
        ctx.compress()
        limit = f"{ctx.stats().archived_bytes * 5 // 4 // 1024}KiB"
    with engine.Model(toy(), engine.params(**KV | {"archive_limit": limit})) as model, engine.Context(model, n_ctx=2048, n_seq_max=2) as ctx:
        ctx.decode(rng.integers(3, 512, 400))
        before = everything(ctx)
        ctx.compress()
        ctx.seq_cp(0, 1)
        ctx.decode(rng.integers(3, 512, 300), seq=1)
        ctx.compress(1)
        assert "can't come back: what it shares with a copy" in engine.recent_log()
        assert (ctx.stats(1).archived_bytes, ctx.tail_begin(1) > 0) == (0, True)
        whole(ctx, archive_limit=limit)
        assert everything(ctx) == before


def test_a_folder_that_is_none(toy, tmp_path):
    with engine.Model(toy(), engine.params(**KV | {"archive": str(tmp_path / "no")})) as model:
        with pytest.raises(engine.Refused, match="is no folder; accepted: auto, ram, off, or a folder"):
            engine.Context(model)


def test_files_have_no_names(toy, rng, tmp_path):
    with engine.Model(toy(), engine.params(**KV | {"archive": str(tmp_path)})) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(rng.integers(3, 512, 400))
        ctx.compress()
        assert ctx.stats().archived_bytes > 0
        assert not list(tmp_path.iterdir())


def test_a_state_without_the_archive_is_as_before(toy, rng):
    with engine.Model(toy(), engine.params(**KV)) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(rng.integers(3, 512, 400))
        ctx.compress()
        held, state = everything(ctx), ctx.seq_save()
        assert ctx.seq_load(state)
        assert everything(ctx) == held
        assert ctx.tail_begin() > 0  # what was evicted is gone
        assert ctx.prompt_done() is None


def test_short_texts_come_back_whole(toy, rng):
    """min_tokens holds for what a cut left, too."""
    with engine.Model(toy(), engine.params(**KV | {"min_tokens": 256})) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(rng.integers(3, 512, 400))
        ctx.compress()
        assert ctx.seq_rm(0, 200, -1)
        ctx.decode(rng.integers(3, 512, 20))
        while ctx.prompt_done() is not None:
            ctx.decode(rng.integers(3, 512, 220 - ctx.pos_max() - 1))
        assert all(pos.tolist() == list(range(220)) for pos in ctx.held().values())


def test_byte_budgets_hold_after_a_recall(toy, rng):
    with engine.Model(toy(), engine.params(**KV | {"budget": "800KiB"})) as model, engine.Context(model, n_ctx=2048, type_k="f16") as ctx:
        ctx.decode(rng.integers(3, 512, 900))
        ctx.prompt_done()
        assert ctx.stats().kv_bytes <= 800 * 1024
        turn = rng.integers(3, 512, 40)
        ctx.decode(turn)
        while (again := ctx.prompt_done()) is not None:
            assert ctx.stats().kv_bytes <= 800 * 1024
            ctx.decode(turn[again - 900 :])
        assert ctx.stats().kv_bytes <= 800 * 1024


def test_a_scorer_of_ones_own_chooses_from_what_is_held(toy, rng):
    with engine.Model(toy(), engine.params(**KV | {"policy": "custom"})) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.set_scorer(lambda seq, il, head, pos: np.arange(len(pos), dtype=np.float32))
        ctx.decode(rng.integers(3, 512, 400))
        ctx.compress()
        held = everything(ctx)
        ctx.compress()
        assert everything(ctx) == held
        assert ctx.prompt_done() is None


# --- what a review found ---------------------------------------------------------------------------------------------


def test_what_queries_chose_is_chosen_anew_for_another_prompt_whatever_the_policy_is_now(toy, rng):
    """knorm asks no queries; what is held was chosen by some."""
    with engine.Model(toy(), engine.params(**KV)) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(rng.integers(3, 512, 400))
        ctx.prompt_done()
        ctx.set_params(engine.params(**KV | {"policy": "knorm", "min_tokens": 256}))
        ctx.decode(rng.integers(3, 512, 30))
        assert ctx.prompt_done() == 400
        ctx.decode(rng.integers(3, 512, 30))
        assert ctx.prompt_done() is None  # now it was chosen by knorm, which needs no second pass


def test_a_state_with_its_archive_is_cut_before_any_batch(toy, rng):
    kv = engine.params(**KV)
    with engine.Model(toy(), kv) as model, engine.Context(model, n_ctx=1024) as ctx, engine.Context(model, n_ctx=1024) as fresh:
        ctx.decode(rng.integers(3, 512, 400))
        before = everything(ctx)
        ctx.compress()
        ctx.set_archive_in_states(True)
        assert fresh.seq_load(ctx.seq_save())
        assert fresh.seq_rm(0, 300, -1) and fresh.pos_max() == 299
        fresh.decode([5])
        whole(fresh)
        for pair, (pos, k, _) in everything(fresh).items():
            width = len(before[pair][1]) // 400
            assert pos == list(range(301)) and k[: 300 * width] == before[pair][1][: 300 * width]


def test_a_cut_gives_the_archive_s_room_back(toy, rng):
    with engine.Model(toy(), engine.params(**KV)) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(rng.integers(3, 512, 800))
        ctx.compress()
        full = ctx.stats().archived_bytes
        assert ctx.seq_rm(0, 80, -1)
        assert ctx.stats().archived_bytes <= 0.11 * full


def test_a_turn_that_was_given_up_costs_the_next_one_nothing(toy, rng):
    with engine.Model(toy(), engine.params(**KV)) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(rng.integers(3, 512, 400))
        ctx.prompt_done()
        ctx.decode(rng.integers(3, 512, 30))
        for _ in range(2):
            assert ctx.prompt_done() == 400
            ctx.decode(rng.integers(3, 512, 30))
        ctx._again.clear()  # the client is gone
        assert ctx.seq_rm(0, 400, -1)
        ctx.decode(rng.integers(3, 512, 30))  # as long
        assert ctx.prompt_done() == 400


@pytest.mark.parametrize("n_turn", [100, 300, 700])
def test_a_byte_budget_holds_a_long_turn(toy, rng, n_turn):
    with engine.Model(toy(), engine.params(**KV | {"budget": "900KiB"})) as model, engine.Context(model, n_ctx=4096, type_k="f16") as ctx:
        ctx.decode(rng.integers(3, 512, 1200))
        ctx.prompt_done()
        turn = rng.integers(3, 512, n_turn)
        ctx.decode(turn[:500])
        ctx.decode(turn[500:]) if n_turn > 500 else None
        while (again := ctx.prompt_done()) is not None:
            ctx.decode(turn[again - 1200 :])
        assert ctx.stats().recalls > 0
        assert ctx.stats().kv_bytes <= 900 * 1024


def test_no_room_for_a_layer_of_it(toy, rng):
    """Then nothing comes back, which llama.cpp's log says, and the answer comes from what is held."""
    with engine.Model(toy(), engine.params(**KV | {"min_tokens": 256})) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(rng.integers(3, 512, 400))
        ctx.prompt_done()
        ctx.decode(rng.integers(3, 512, 20))
        held = everything(ctx)
        with engine.Full(0):
            assert ctx.prompt_done() is None
            assert "nothing came back" in engine.last_error()
            assert not ctx.seq_rm(0, 100, -1)
        assert "nothing came back" in engine.recent_log()
        assert everything(ctx) == held
        ctx.decode([7])


def test_without_recall_nothing_is_archived(toy, rng):
    with engine.Model(toy(), engine.params(**KV | {"recall": 0})) as model, engine.Context(model, n_ctx=1024) as ctx:
        ctx.decode(rng.integers(3, 512, 400))
        ctx.compress()
        assert ctx.stats().archived_bytes == 0 and ctx.tail_begin() > 0
