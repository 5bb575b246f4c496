"""laprox-server with an archive, as it is by default: whatever is asked next, a slot reads nothing twice."""

import threading
from itertools import islice

import pytest
from gguf_factory import CHATML
from server import PROGRAM, Server, tokens

from laprox import KVConfig, Llama

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="built without the server (scripts/build --server)")

KV = ("--kv-budget", "20%", "--kv-min-tokens", "64")


WINDOW = 32  # --kv-window: at least so many tokens of a prompt are evaluated where its slot was cut

DOCUMENT = tokens(700)


def question(seed, n=20):
    return tokens(n + 1, seed=seed)[1:]


@pytest.fixture(scope="module")
def model(toy):
    return toy(chat_template=CHATML, n_ctx_train=4096)


@pytest.fixture(scope="module")
def start(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("slots")
    return lambda *options: Server(model, *KV, "-c", "4096", "--metrics", "--slot-save-path", folder, *options)


def test_each_question_reads_itself_alone(start):
    with start() as server:
        server.complete(DOCUMENT + question(1), n=8)
        for seed in (2, 3, 1):
            reply = server.complete(DOCUMENT + question(seed), n=8)
            kv = reply["kv"]
            assert "stale" not in kv
            assert reply["timings"]["cache_n"] == 720 - WINDOW and reply["timings"]["prompt_n"] == WINDOW
            assert kv["tokens_reread"] == 0 and kv["entries_recalled"] > 0
            assert kv["entries_held"] < 0.3 * kv["entries_full"]
            assert kv["archived_entries"] > 0.9 * kv["entries_full"] - 64 * 6
        assert server.metrics()["laprox:recalls_total"] >= 4
        assert server.metrics()["laprox:archived_bytes"] > 0


def test_what_an_archive_has_no_room_for_is_counted(start):
    with start("--kv-archive-limit", "600KiB") as server:
        kv = server.complete(DOCUMENT + question(1), n=8)["kv"]
        assert 0 < kv["archived_bytes"] <= 600 * 1024
        archived = kv["archived_entries"] // (kv["entries_full"] // kv["tokens_seen"])  # tokens
        assert kv["tokens_lost"] > 100 and 0 < kv["tokens_seen"] - archived - kv["tokens_lost"] <= 64  # the tail
        assert server.metrics()["laprox:tokens_lost"] == kv["tokens_lost"]


def test_a_conversation_a_regenerated_answer_an_edit_and_a_branch(start):
    with start() as server:
        first = server.complete(DOCUMENT + question(1), n=8, return_tokens=True)
        prompt = DOCUMENT + question(1) + first["tokens"]
        for more in (question(2), question(2), question(3), question(4, n=90)):
            reply = server.complete(prompt + more, n=8)
            assert reply["kv"]["tokens_reread"] == 0
            assert reply["timings"]["prompt_n"] <= max(len(more) + 1, WINDOW)
        reply = server.complete(DOCUMENT[:300] + question(5), n=8)
        assert reply["kv"]["tokens_reread"] == 0 and reply["timings"]["prompt_n"] == WINDOW


def test_a_prompt_goes_on_after_others_took_the_slot(start):
    """The RAM cache keeps archives."""
    with start("-np", "1") as server:
        server.complete(DOCUMENT + question(1), n=8)
        server.complete(tokens(600, seed=9), n=4)
        reply = server.complete(DOCUMENT + question(2), n=8)
        assert reply["kv"]["tokens_reread"] == 0 and reply["timings"]["prompt_n"] == WINDOW
        assert reply["kv"]["entries_recalled"] > 0


def test_a_saved_slot_has_it_where_it_is_asked_for(start):
    with start() as server:
        server.complete(DOCUMENT + question(1), n=8)
        small = server.post("/slots/0?action=save", filename="small.bin")["n_written"]
        large = server.post("/slots/0?action=save", filename="large.bin", archive=True)["n_written"]
        assert large > 3 * small
    for filename, reread in (("large.bin", 0), ("small.bin", 700)):
        with start() as server:
            server.post("/slots/0?action=restore", filename=filename)
            reply = server.complete(DOCUMENT + question(2), n=8)
            assert reply["kv"]["tokens_reread"] == reread


def test_progress_only_goes_on(start):
    """Nothing is said while tokens are evaluated again."""
    with start("-b", "64") as server:
        server.complete(DOCUMENT + question(1), n=8)
        prompt = DOCUMENT + question(2, n=200)
        events = server.events("/completion", prompt=prompt, n_predict=1, return_progress=True)
        said = [event["prompt_progress"]["processed"] for event in events if "prompt_progress" in event]
        assert events[-1]["kv"]["entries_recalled"] > 0 and len(said) > 3
        assert said == sorted(set(said)) and said[-1] == len(prompt)


@pytest.mark.parametrize("n", [8, 40, 150])
def test_a_prompt_again_after_any_answer_and_in_a_slot_that_was_restored(start, n):
    """The answer has taken the place of the prompt's queries, and a file has no others: they are made again."""
    prompt = DOCUMENT + question(1)
    with start() as server, start() as other:
        server.complete(prompt, n=n, ignore_eos=True)
        server.post("/slots/0?action=save", filename="answered.bin", archive=True)["n_saved"]
        other.post("/slots/0?action=restore", filename="answered.bin")["n_restored"]
        again, there = (s.complete(prompt, n=8, n_probs=1) for s in (server, other))
        assert again["completion_probabilities"] == there["completion_probabilities"]
        assert again["kv"]["tokens_reread"] == 0 and again["timings"]["prompt_n"] == WINDOW


@pytest.mark.parametrize("value", ["yes", 1, []])
def test_the_archive_of_a_saved_slot_is_true_or_false(start, value):
    with start() as server:
        server.complete(tokens(20), n=1)
        refused = server.post("/slots/0?action=save", filename="x.bin", archive=value)
        assert refused.status == 400 and "accepted: true, false" in refused.error["message"]


def test_slots_side_by_side_and_children(start):
    with start("-np", "3") as server:
        alone = [server.complete(DOCUMENT + question(s), n=8, id_slot=0, cache_prompt=False)["content"] for s in (1, 2)]
        assert alone[0] != alone[1]
        for slot in range(3):
            server.complete(DOCUMENT + question(1), n=8, id_slot=slot)
        results = [None] * 3

        def ask(slot):
            results[slot] = server.complete(DOCUMENT + question(10 + slot), n=8, id_slot=slot)

        threads = [threading.Thread(target=ask, args=(slot,)) for slot in range(3)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        for reply in results:
            assert reply["kv"]["tokens_reread"] == 0 and reply["kv"]["recalls"] >= 2
        replies = server.complete(DOCUMENT + question(20), n=8, n_cmpl=3).json
        assert len({reply["content"] for reply in replies}) == 1  # greedy


def test_recurrent_layers_and_windows(toy):
    for arch in ("llama", "lfm2", "gemma2"):
        with Server(toy(arch, n_ctx_train=4096), *KV, "-c", "4096") as server:
            first = server.complete(DOCUMENT + question(1), n=8, return_tokens=True)
            on = server.complete(DOCUMENT + question(1) + first["tokens"] + question(2), n=8)
            assert on["kv"]["tokens_reread"] == 0 and on["kv"]["recalls"] == 2
            other = server.complete(DOCUMENT + question(3), n=8)
            if arch == "lfm2":  # which goes back no further than to llama.cpp's checkpoints
                assert other["timings"]["cache_n"] + other["timings"]["prompt_n"] == 720 and other["timings"]["cache_n"] < 700


def test_a_turn_beside_recurrent_layers_is_answered_as_by_python(toy):
    """Where a turn is longer than --kv-recall-tokens, entries come back for it all the same."""
    model = toy("lfm2", n_ctx_train=4096)
    llm = Llama(str(model), kv=KVConfig(budget="20%", min_tokens=64), n_ctx=4096, n_threads=1, n_threads_batch=1, verbose=False)
    prompts = [DOCUMENT + question(1)]
    with Server(model, *KV, "-c", "4096") as server:
        for seed in (2, 3):
            reply = server.complete(prompts[-1], n=8, return_tokens=True, ignore_eos=True)
            prompts.append(prompts[-1] + reply["tokens"] + question(seed))
        answer = server.complete(prompts[-1], n=8, return_tokens=True, ignore_eos=True)
        assert answer["kv"]["recalls"] == 4
    for prompt in prompts:
        python = [*islice(llm.generate(prompt, temp=0.0), 8)]
    assert python == answer["tokens"] and llm.kv.stats().recalls == 4
    with Server(model, *KV, "-c", "4096", "--kv-recall-tokens", "20") as server:
        for prompt in prompts[:2]:
            kv = server.complete(prompt, n=8, ignore_eos=True)["kv"]
        assert kv["recalls"] == 1 and kv["entries_recalled"] > 0


def test_settings_of_a_request(start):
    with start() as server:
        server.complete(DOCUMENT + question(1), n=4)
        more = server.complete(DOCUMENT + question(2), n=4, kv={"budget": "60%"})
        assert more["kv"]["entries_held"] > 0.55 * more["kv"]["entries_full"]  # from the archive
        assert server.get("/props")["kv"]["archive"] == "auto" and server.get("/props")["kv"]["recall"] == 2


def test_a_long_text_is_generated_and_gone_back_from(start):
    with start() as server:
        first = server.complete(DOCUMENT + question(1), n=900, return_tokens=True, ignore_eos=True)
        assert first["kv"]["entries_held"] < 0.5 * first["kv"]["entries_full"]
        reply = server.complete(DOCUMENT + question(1) + first["tokens"][:500] + question(2), n=8)
        assert reply["kv"]["tokens_reread"] == 0 and reply["timings"]["prompt_n"] == WINDOW


def test_a_limit_and_no_archive_at_all(start):
    for options in (("--kv-archive", "off"), ("--kv-archive-limit", "100KiB"), ("--kv-recall", "0")):
        with start(*options) as server:
            server.complete(DOCUMENT + question(1), n=4)
            reply = server.complete(DOCUMENT + question(2), n=4)
            assert reply["kv"]["tokens_reread"] == 700 and reply["kv"]["entries_recalled"] == 0
            assert "stale" not in reply["kv"]
            on = server.complete(DOCUMENT + question(2) + question(3), n=4)  # goes on with it
            assert on["kv"]["stale"]
