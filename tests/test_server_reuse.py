"""laprox-server: which requests may go on from a compressed KV cache, and which read their prompt again.

A cache is compressed for one prompt. Only a prompt that begins with all of it is answered from what was kept; any other
gets the reply of a server that was just started."""

from pathlib import Path

import pytest
from gguf_factory import CHATML
from server import PROGRAM, Server, tokens

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="built without the server (scripts/build --server)")

N_PAIRS = 6  # (layer, KV head) pairs of the model
KV = ("--kv-budget", "20%", "--kv-min-tokens", "64", "--kv-archive", "off")
SIZES = ("policy", "budget", "tokens_seen", "entries_held", "entries_full", "kv_bytes", "kv_bytes_full", "compressions")


DOCUMENT = tokens(700)
QUESTIONS = {name: tokens(11, seed=seed)[1:] for name, seed in (("Q1", 101), ("Q2", 102), ("Q3", 103))}


@pytest.fixture(scope="module")
def model(toy):
    return toy(chat_template=CHATML, n_ctx_train=4096)


@pytest.fixture(scope="module")
def start(model, tmp_path_factory):
    """start(*options): a server with a RAM cache and a folder for slots."""
    folder = tmp_path_factory.mktemp("slots")

    def start(*options):
        server = Server(model, *KV, "-c", "4096", "--metrics", "--slot-save-path", folder, *options)
        server.folder = Path(folder)
        return server

    return start


@pytest.fixture(scope="module")
def alone(start):
    """What a server answers that has never seen another prompt, and what it then holds."""
    replies = {}
    for name, question in QUESTIONS.items():
        with start() as server:
            replies[name] = server.complete(DOCUMENT + question, n=12)
    assert len({reply["content"] for reply in replies.values()}) == 3  # or nothing would be shown here
    return replies


def check_alike(reply, alone):
    assert reply["content"] == alone["content"]
    assert {name: reply["kv"][name] for name in SIZES} == {name: alone["kv"][name] for name in SIZES}


# --- other questions about one document -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--cache-ram", "0"), ("-np", "3"), ("-np", "2", "-no-kvu")])
def test_each_question_is_answered_as_if_it_came_first(start, alone, options):
    """The questions lie within the last tokens that always stay: llama.cpp's cut would succeed there."""
    with start(*options) as server:
        for i, name in enumerate(("Q1", "Q2", "Q3", "Q1", "Q3")):
            seen_again = i >= 3 and "--cache-ram" not in options  # else what a slot has lost is lost
            before = server.metrics()["laprox:tokens_reread_total"]
            reply = server.complete(DOCUMENT + QUESTIONS[name], n=12)
            if seen_again:  # its own prompt, answered from what was kept for it
                assert reply["timings"]["prompt_n"] == 1 and reply["kv"]["tokens_reread"] == 0
            else:
                check_alike(reply, alone[name])
                assert reply["timings"]["cache_n"] == 0
                assert reply["kv"]["tokens_reread"] == (len(DOCUMENT) if i else 0)
            assert server.metrics()["laprox:tokens_reread_total"] - before == reply["kv"]["tokens_reread"]


@pytest.mark.parametrize("cut", [710, 709, 705, 690, 300, 100])
def test_wherever_a_prompt_leaves_the_other(start, cut):
    first, other = tokens(710, seed=1), tokens(710, seed=1)[:cut] + tokens(41, seed=2)[1:]
    with start("--cache-ram", "0") as server:
        alone = server.complete(other, n=12)
        server.post("/slots/0?action=erase")
        server.complete(first, n=12, kv={"budget": "20%"})
        reply = server.complete(other, n=12)
    if cut == 710:
        assert reply["timings"]["prompt_n"] == 40 and reply["kv"]["tokens_reread"] == 0
    else:
        check_alike(reply, alone)
        assert reply["timings"]["cache_n"] == 0 and reply["kv"]["tokens_reread"] == cut


def test_a_prompt_that_is_a_part_of_the_other(start):
    """The document alone, after a question was asked about it."""
    with start() as server:
        alone = server.complete(DOCUMENT, n=12)
    with start() as server:
        server.complete(DOCUMENT + QUESTIONS["Q1"], n=12)
        reply = server.complete(DOCUMENT, n=12)
        check_alike(reply, alone)
        assert reply["kv"]["tokens_reread"] == len(DOCUMENT)


def test_a_short_prompt_is_held_whole_and_may_be_left_anywhere(start):
    with start("--kv-min-tokens", "800") as server:
        server.complete(DOCUMENT + QUESTIONS["Q1"], n=4)
        reply = server.complete(DOCUMENT + QUESTIONS["Q2"], n=4)
        assert reply["timings"]["prompt_n"] == 10 and reply["kv"]["tokens_reread"] == 0


# --- what goes on -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_a_conversation_reads_nothing_twice(toy, arch):
    with Server(toy(arch, n_ctx_train=4096), *KV, "-c", "4096") as server:
        prompt = DOCUMENT + QUESTIONS["Q1"]
        for turn in range(6):
            before = len(prompt)
            reply = server.complete(prompt, n=4, return_tokens=True)
            assert reply["kv"]["tokens_reread"] == 0
            # the last token of an answer is never evaluated by the request that sampled it
            assert reply["timings"]["prompt_n"] == (before if turn == 0 else 21)
            prompt = prompt + reply["tokens"] + tokens(21, seed=10 + turn)[1:]


def test_the_same_prompt_again_is_answered_from_what_was_kept_for_it(start):
    with start() as server:
        server.complete(DOCUMENT, n=8)
        again = [server.complete(DOCUMENT, n=8) for _ in range(2)]
        for reply in again:
            assert reply["timings"]["prompt_n"] == 1
            assert reply["kv"]["compressions"] == 1 and reply["kv"]["tokens_reread"] == 0
        assert again[0]["content"] == again[1]["content"]


def test_a_document_that_was_read_by_itself_serves_every_question(start):
    """Nothing is chosen again for a question that is shorter than min_tokens."""
    with start() as server:
        server.complete(DOCUMENT, n=0)
        for question in QUESTIONS.values():
            reply = server.complete(DOCUMENT + question, n=12)
            assert reply["timings"]["prompt_n"] == 10 and reply["kv"]["tokens_reread"] == 0 and reply["kv"]["compressions"] == 1


# --- beside the slots -------------------------------------------------------------------------------------------------


def test_the_ram_cache_serves_the_prompt_it_was_filled_for_and_no_other(start, alone):
    with start() as server:
        first = server.complete(DOCUMENT + QUESTIONS["Q1"], n=12, return_tokens=True)
        server.complete(tokens(300, seed=20), n=4)  # takes the slot
        second = server.complete(DOCUMENT + QUESTIONS["Q2"], n=12)
        check_alike(second, alone["Q2"])
        assert second["kv"]["tokens_reread"] == len(DOCUMENT)
        # and what was kept for the first question is still there
        on = server.complete(DOCUMENT + QUESTIONS["Q1"] + first["tokens"] + tokens(6, seed=21)[1:], n=4)
        assert on["timings"]["prompt_n"] == 6 and on["kv"]["tokens_reread"] == 0


def test_the_ram_cache_keeps_a_document_beside_a_question_about_it(start):
    """A longer prompt doesn't stand for a shorter one: it can't be cut back to it."""
    with start() as server:
        server.complete(DOCUMENT + tokens(200, seed=22)[1:], n=4)  # compressed with these
        server.complete(DOCUMENT, n=0)
        server.complete(tokens(300, seed=20), n=4)  # takes the slot
        reply = server.complete(DOCUMENT + QUESTIONS["Q1"], n=4)
        assert reply["timings"]["prompt_n"] == 10 and reply["kv"]["tokens_reread"] == 0


def test_a_slot_that_serves_the_prompt_goes_before_one_that_looks_more_like_it(start):
    with start("-np", "2", "-no-kvu") as server:
        server.complete(DOCUMENT, n=0, id_slot=0)
        server.complete(DOCUMENT + tokens(200, seed=22)[1:], n=4, id_slot=1)
        reply = server.complete(DOCUMENT + tokens(200, seed=22)[1:100], n=4)
        assert reply["id_slot"] == 0 and reply["timings"]["prompt_n"] == 99


def test_a_restored_slot_serves_the_prompt_it_was_saved_for_and_no_other(start, alone):
    with start() as server:
        first = server.complete(DOCUMENT + QUESTIONS["Q1"], n=12, return_tokens=True)
        server.post("/slots/0?action=save", filename="first.bin")
    follow_up = DOCUMENT + QUESTIONS["Q1"] + first["tokens"] + tokens(6, seed=21)[1:]
    for recent in ("32", "8"):  # a server of other settings has to know it, too
        with start("--kv-recent", recent) as server:
            server.post("/slots/0?action=restore", filename="first.bin")
            on = server.complete(follow_up, n=4)
            assert on["timings"]["prompt_n"] == 6 and on["kv"]["tokens_reread"] == 0
            server.post("/slots/0?action=erase")
            server.post("/slots/0?action=restore", filename="first.bin")
            reply = server.complete(DOCUMENT + QUESTIONS["Q2"], n=12)
            assert reply["timings"]["cache_n"] == 0 and reply["kv"]["tokens_reread"] == len(DOCUMENT)
            if recent == "32":
                check_alike(reply, alone["Q2"])


def test_children_of_a_request_follow_the_rule(start, alone):
    with start("-np", "3") as server:
        for name in ("Q1", "Q2"):
            for reply in server.complete(DOCUMENT + QUESTIONS[name], n=12, n_cmpl=3).json:
                assert reply["content"] == alone[name]["content"]


# --- the question scores ----------------------------------------------------------------------------------------------


def test_the_question_scores_a_prompt_that_was_compressed_while_it_came_in(model):
    """Chunks are compressed by what is at their end; the last compression is the question's."""
    with Server(model, "-c", "4096", "--kv-budget", "10%", "--kv-min-tokens", "64", "--kv-prefill", "chunked", "-b", "128", "--kv-archive", "off") as server:
        for n in (1200, 1290, 2000, 2070):  # wherever the last chunk ends
            kv = server.complete(tokens(n), n=1, cache_prompt=False)["kv"]
            assert kv["entries_held"] == 0.1 * n * N_PAIRS
        # what comes afterwards stays exact until it is more than min_tokens, as ever
        before = server.complete(tokens(2000), n=1)["kv"]
        after = server.complete(tokens(2000) + tokens(21, seed=5)[1:], n=1)
        assert after["timings"]["prompt_n"] == 20 and after["kv"]["compressions"] == before["compressions"]
