"""laprox-server: llama-server's endpoints and replies, on a KV cache that keeps only the entries that matter."""

import os
import random
import threading

import gates_factory
import pytest
from gguf_factory import CHATML, truncate
from server import PROGRAM, WITH_RIVALS, Server, chosen, sure, tokens

from laprox.eval import english, facts
from laprox.gates import sidecar

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="built without the server (scripts/build --server)")

N_PAIRS = 6  # (layer, KV head) pairs of the toy
KV = ("--kv-budget", "20%", "--kv-min-tokens", "64", "--kv-archive", "off")


@pytest.fixture(scope="module")
def model(toy):
    return toy(chat_template=CHATML, n_ctx_train=4096)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """One server for all tests that need nothing special of it."""
    with Server(model, *KV, "-c", "4096", "--metrics", "--slot-save-path", tmp_path_factory.mktemp("slots")) as server:
        yield server


@pytest.fixture
def fresh(server):
    server.idle()
    server.post("/slots/0?action=erase")
    return server


# --- a prompt is compressed ------------------------------------------------------------------------------------------


def test_a_prompt_is_compressed_when_it_is_in(fresh):
    kv = fresh.complete(tokens(1000), n=1)["kv"]
    assert kv["tokens_seen"] == 1000 and kv["entries_full"] == 1000 * N_PAIRS
    assert kv["entries_held"] == 0.2 * kv["entries_full"]
    assert kv["kv_bytes"] < 0.5 * kv["kv_bytes_full"]
    assert (kv["policy"], kv["budget"], kv["compressions"], kv["tokens_reread"]) == ("laprox", "20%", 1, 0)
    assert kv["compress_ms"] > 0

    slot = fresh.slot()["kv"]
    assert {name: kv[name] for name in slot} == slot


def test_a_short_prompt_is_exact(fresh):
    kv = fresh.complete(tokens(64), n=4)["kv"]
    assert kv["entries_held"] == kv["entries_full"] and kv["compressions"] == 0


def test_a_follow_up_evaluates_only_what_is_new(fresh):
    prompt = tokens(1000)
    first = fresh.complete(prompt, n=4, return_tokens=True)
    follow_up = prompt + first["tokens"] + tokens(20, seed=1)
    second = fresh.complete(follow_up, n=4)
    # the last token of an answer is never evaluated by the request that sampled it
    assert second["timings"]["cache_n"] == 1003 and second["timings"]["prompt_n"] == len(follow_up) - 1003
    assert second["kv"]["compressions"] == 1 and second["kv"]["tokens_reread"] == 0
    assert second["kv"]["entries_held"] - first["kv"]["entries_held"] == (second["kv"]["tokens_seen"] - first["kv"]["tokens_seen"]) * N_PAIRS

    # more than min_tokens of them are compressed again, with what was held
    third = fresh.complete(follow_up + tokens(200, seed=2), n=1)["kv"]
    assert third["compressions"] == 2 and third["entries_held"] == pytest.approx(0.2 * third["entries_full"], abs=1)


def test_the_same_prompt_again_is_answered_from_what_is_held(fresh):
    fresh.complete(tokens(1000), n=8)
    again = fresh.complete(tokens(1000), n=8)
    assert again["timings"]["prompt_n"] == 1 and again["kv"]["compressions"] == 1


def test_a_prompt_that_leaves_the_compressed_part_is_read_again(fresh):
    prompt, other = tokens(1000), tokens(1000)[:700] + tokens(300, seed=3)
    alone = fresh.complete(other, n=16)["content"]
    fresh.post("/slots/0?action=erase")

    fresh.complete(prompt)
    before = fresh.log.count("700 cached tokens are evaluated again")
    reply = fresh.complete(other, n=16)
    assert reply["timings"]["cache_n"] == 0 and reply["kv"]["tokens_reread"] == 700
    assert reply["content"] == alone
    assert fresh.log.count("700 cached tokens are evaluated again") == before + 1


def test_what_is_left_is_kept_in_the_ram_cache(fresh):
    """A slot's compressed document isn't lost to a prompt that begins alike and then differs."""
    document = tokens(1000)
    answer = fresh.complete(document, n=4, return_tokens=True)
    fresh.complete(document[:800] + tokens(200, seed=4), n=4)  # takes the slot
    back = fresh.complete(document + answer["tokens"] + tokens(10, seed=5), n=4)
    assert back["timings"]["prompt_n"] == 11 and back["kv"]["entries_held"] < 0.25 * back["kv"]["entries_full"]


def test_cache_prompt_false_reads_everything(fresh):
    alone = fresh.complete(tokens(600), n=12)["content"]
    reply = fresh.complete(tokens(600), n=12, cache_prompt=False)
    assert reply["timings"]["prompt_n"] == 600 and reply["content"] == alone and reply["kv"]["tokens_reread"] == 0


def test_a_prompt_may_be_read_without_an_answer(fresh):
    fresh.complete(tokens(1000), n=0)
    assert fresh.slot()["kv"]["entries_held"] == 0.2 * 1000 * N_PAIRS


@pytest.mark.parametrize("arch", ["gemma2", "lfm2"])
def test_sliding_windows_and_recurrent_layers(toy, arch):
    """Their own caches are rolled back by checkpoints, which mustn't cut into the compressed one."""
    with Server(toy(arch, n_ctx_train=4096), *KV, "-c", "2048", "-b", "128", "-ub", "128", "--cache-ram", "0") as server:
        prompt = tokens(900)
        alone = {}
        for cut in (895, 880, 600, 200, 1):
            alone[cut] = server.complete(prompt[:cut] + tokens(60, seed=cut), n=8, cache_prompt=False)["content"]
        for cut, answer in alone.items():
            server.complete(prompt, n=8, cache_prompt=False)
            reply = server.complete(prompt[:cut] + tokens(60, seed=cut), n=8)
            assert reply["timings"]["cache_n"] == 0 and reply["content"] == answer
        follow_up = server.complete(prompt, n=4, return_tokens=True)
        assert server.complete(prompt + follow_up["tokens"] + tokens(9, seed=9), n=4)["timings"]["prompt_n"] < 128
        assert server.alive


def test_chunked_prefill_bounds_the_memory(model):
    with Server(model, "-c", "4096", "--kv-budget", "256", "--kv-min-tokens", "64", "--kv-prefill", "chunked", "-b", "128", "--metrics") as server:
        kv = server.complete(tokens(3000), n=4)["kv"]
        assert kv["tokens_seen"] == 3003 and kv["entries_held"] < 400 * N_PAIRS and kv["compressions"] > 2
        assert server.metrics()["laprox:compressions_total"] == kv["compressions"]


# --- requests --------------------------------------------------------------------------------------------------------


def test_a_request_may_have_its_own_budget_and_policy(fresh):
    held = lambda **kv: fresh.complete(tokens(1000), n=1, cache_prompt=False, kv=kv)["kv"]
    assert held(budget="10%")["entries_held"] == 0.1 * 1000 * N_PAIRS
    assert held(budget=0.5)["entries_held"] == 0.5 * 1000 * N_PAIRS
    assert held(budget=300)["entries_held"] == held(budget=300.0)["entries_held"] == 300 * N_PAIRS
    assert held(budget="10%", policy="snapkv")["policy"] == "snapkv"
    assert held(policy="keydiff:ada")["entries_held"] == 0.2 * 1000 * N_PAIRS
    assert held(policy="off")["entries_held"] == 1000 * N_PAIRS
    assert held(budget="1MiB")["kv_bytes"] <= 2**20
    kv = held(budget="1KiB")
    assert kv["entries_held"] == 1000 * N_PAIRS and "accepted: at least" in kv["refused"]
    # and the next one has the server's again
    kv = fresh.complete(tokens(1000), n=1, cache_prompt=False)["kv"]
    assert (kv["policy"], kv["budget"], kv["entries_held"]) == ("laprox", "20%", 0.2 * 1000 * N_PAIRS)
    assert fresh.complete(tokens(1000), n=1, cache_prompt=False, kv=None)["kv"]["budget"] == "20%"


MESSAGES = [{"role": "user", "content": "the quick brown fox jumps over the lazy dog. " * 15}]
ENDPOINTS = {
    "/completion": {"prompt": MESSAGES[0]["content"], "n_predict": 4},
    "/v1/completions": {"prompt": MESSAGES[0]["content"], "max_tokens": 4},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 4},
    "/v1/responses": {"input": MESSAGES[0]["content"], "max_output_tokens": 4},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 4},
}


@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_endpoint_takes_and_gives_a_kv_object(fresh, path):
    body = {**ENDPOINTS[path], "kv": {"budget": "10%", "policy": "snapkv"}, "cache_prompt": False}
    reply = fresh.post(path, **body)
    kv = reply["kv"]
    assert (kv["budget"], kv["policy"]) == ("10%", "snapkv") and kv["entries_held"] < 0.15 * kv["entries_full"]

    events = [event for event in fresh.events(path, **body) if "kv" in event]
    assert len(events) == 1 and events[0]["kv"]["entries_full"] == kv["entries_full"]

    for bad, words in [
        ({"policy": "best"}, 'policy is "best"; accepted: off, laprox'),
        ({"budget": "-1"}, 'budget is "-1" (negative); accepted'),
        ({"budget": "lots"}, 'budget is "lots" (not a number); accepted'),
        ({"budget": [1]}, '"budget" is [1]; accepted'),
        ({"policy": 1.5}, 'policy is "1.5"; accepted'),
        ({"polciy": "snapkv"}, 'unknown name "polciy"; accepted: budget, policy'),
        ("10%", "must be an object"),
        ({"budget": 20}, 'budget is "20" (less than the 36 tokens that are never evicted'),
        ({"budget": 1.0}, 'budget is "1" (less than the 36 tokens that are never evicted'),
        ({"budget": 300.5}, "accepted"),
        ({"budget": 100000}, "larger than the context"),
        ({"policy": "lukv"}, "needs a profile"),
    ]:
        error = fresh.post(path, **{**body, "kv": bad}).error
        assert error["type"] == "invalid_request_error" and error["code"] == 400
        assert "Field 'kv'" in error["message"] and words in error["message"], error
    assert fresh.post(path, **body)["kv"]["entries_held"] == kv["entries_held"]


def test_response_fields_choose_the_kv_object_too(fresh):
    body = {"prompt": tokens(200), "n_predict": 2, "cache_prompt": False}
    assert set(fresh.post("/completion", **body, response_fields=["content"]).json) == {"content"}
    assert set(fresh.post("/completion", **body, response_fields=["content", "kv"]).json) == {"content", "kv"}
    assert fresh.post("/completion", **body, response_fields=["kv/tokens_seen"]).json == {"kv/tokens_seen": 201}


def test_a_prompt_longer_than_the_context_is_refused_as_ever(fresh):
    error = fresh.complete(tokens(5000)).error
    assert error["type"] == "exceed_context_size_error" and (error["n_prompt_tokens"], error["n_ctx"]) == (5000, 4096)
    reply = fresh.complete(tokens(4080), n=100)
    assert reply["truncated"] and reply["stop_type"] == "limit" and reply["kv"]["tokens_seen"] == 4095


def test_a_budget_that_cant_hold_the_tokens_says_what_would_fit(model):
    with Server(model, "-c", "2048", "--kv-budget", "1KiB", "--kv-min-tokens", "64", "--kv-prefill", "chunked") as server:
        error = server.complete(tokens(1500)).error
        assert "accepted: at least" in error["message"] and "bytes per sequence" in error["message"]
        assert server.complete(tokens(30), n=2, kv={"budget": "200KiB"}).status == 200


def test_children_of_a_request_share_its_compressed_prompt(model):
    with Server(model, *KV, "-c", "4096", "-np", "3") as server:
        alone = server.complete(tokens(900), n=8)["content"]
        replies = server.complete(tokens(900, seed=6), n=8, n_cmpl=3).json
        assert len(replies) == 3 and len({r["content"] for r in replies}) == 1
        assert all(r["kv"]["entries_held"] < 0.25 * r["kv"]["entries_full"] for r in replies)
        assert server.complete(tokens(900), n=8)["content"] == alone


# --- several slots ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def questions():
    """Documents of mixed lengths with a question each; a character is a token of the toy."""
    rng = random.Random(0)
    documents = [" ".join(english.sentence(rng) for _ in range(n)) for n in (2, 22, 7, 15, 30, 5, 11, 3)]
    return [f"{document}\n\n{facts.ATTRIBUTES[i].asked.format(name='Helen Marlow')}" for i, document in enumerate(documents)]


@pytest.mark.parametrize("options", [("-np", "4", "-c", "8192"), ("-np", "4", "-c", "2048", "-kvu")])
def test_slots_are_independent(model, questions, options):
    """Four at once, one in three hung up on: every answer is that of a lone request."""
    with Server(model, *KV, "-b", "256", *options) as server:
        ask = lambda text: server.post(
            "/v1/chat/completions", messages=[{"role": "user", "content": text}], max_tokens=24, cache_prompt=False, **WITH_RIVALS
        )
        alone = [ask(text) for text in questions]
        for i in range(4):
            server.post(f"/slots/{i}?action=erase")
        answers = {}

        def client(k):
            for i in range(k, len(questions), 4):
                answers[i] = ask(questions[i])
                messages = [{"role": "user", "content": "now " + questions[i - 1]}]
                server.abandon("/v1/chat/completions", messages=messages, max_tokens=500, after=0.05)

        threads = [threading.Thread(target=client, args=(k,)) for k in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        server.idle()
        compared = 0
        for i, reply in enumerate(alone):
            expected = sure(reply)
            assert chosen(answers[i])[: len(expected)] == expected
            compared += len(expected)
        assert compared > 4 * len(questions)


def test_a_cancelled_request_leaves_the_slot_usable(fresh):
    alone = fresh.complete(tokens(1200), n=8)["content"]
    for after in (0.0, 0.02, 0.1, 0.3):
        fresh.abandon("/completion", prompt=tokens(3000, seed=7), n_predict=500, after=after)
        fresh.idle()
        assert fresh.complete(tokens(1200), n=8, cache_prompt=False)["content"] == alone


def test_drafts_change_nothing(model, toy):
    draft = toy(chat_template=CHATML, n_ctx_train=4096, n_layer=1)
    with Server(model, *KV, "-c", "2048") as server:
        alone = server.complete(tokens(900), n=40)["content"]
    for options in (("--spec-type", "draft-simple", "-md", draft, "--spec-draft-n-max", "4"), ("--spec-type", "ngram-simple")):
        with Server(model, *KV, "-c", "2048", *options) as server:
            reply = server.complete(tokens(900), n=40)
            assert reply["content"] == alone and ("-md" not in options or reply["timings"]["draft_n"] > 0)
            assert server.complete(tokens(900)[:500], n=4).status == 200


# --- saved slots -----------------------------------------------------------------------------------------------------


def test_save_restart_restore(model, tmp_path):
    options = (*KV, "-c", "4096", "--slot-save-path", tmp_path)
    prompt, question = tokens(2000), tokens(20, seed=8)
    with Server(model, *options) as server:
        server.complete(prompt, n=0)
        saved = server.post("/slots/0?action=save", filename="document.bin")
        assert saved["n_saved"] == 2000 and saved["n_written"] == (tmp_path / "document.bin").stat().st_size
        expected = server.complete(prompt + question, n=16)
        server.complete(prompt, n=0, cache_prompt=False, kv={"policy": "off"})
        full = server.post("/slots/0?action=save", filename="full.bin")
        assert saved["n_written"] < 0.3 * full["n_written"]

    with Server(model, *options) as server:
        restored = server.post("/slots/0?action=restore", filename="document.bin")
        assert restored["n_restored"] == 2000
        reply = server.complete(prompt + question, n=16)
        assert reply["timings"]["prompt_n"] == 20 and reply["content"] == expected["content"]
        assert reply["kv"]["entries_held"] == expected["kv"]["entries_held"]


def test_what_cant_be_restored_is_refused_and_the_slot_is_empty(fresh, toy, model, tmp_path):
    folder = next(p for p in fresh.process.args if "slots" in p)
    path = lambda name: os.path.join(folder, name)
    alone = fresh.complete(tokens(600), n=8)["content"]
    fresh.post("/slots/0?action=save", filename="good.bin")
    good = open(path("good.bin"), "rb").read()

    def refused(name):
        fresh.complete(tokens(300, seed=1), n=2)
        error = fresh.post("/slots/0?action=restore", filename=name).error
        assert error["code"] == 400 and "Unable to restore slot" in error["message"], error
        assert fresh.slot()["kv"]["tokens_seen"] == 0 and fresh.slot()["n_prompt_tokens"] == 0
        assert fresh.complete(tokens(600), n=8, cache_prompt=False)["content"] == alone
        return error["message"]

    def write(name, data):
        with open(path(name), "wb") as file:
            file.write(data)

    for fraction in (0.0, 0.01, 0.3, 0.99):
        truncate(path("good.bin"), path("short.bin"), fraction)
        refused("short.bin")
    rng = random.Random(0)
    start = good.index(b"LPXS")  # behind the header and tokens of llama.cpp, which has no checksum
    for _ in range(12):
        damaged = bytearray(good)
        damaged[rng.randrange(start, len(good))] ^= 1 << rng.randrange(8)
        write("flipped.bin", damaged)
        refused("flipped.bin")
    write("noise.bin", rng.randbytes(5000))
    refused("noise.bin")
    refused("missing.bin")

    for options, words in [
        ((model,), "stock llama.cpp"),
        ((toy(chat_template=CHATML, n_ctx_train=4096, n_head_kv=4), *KV), "another model"),
        ((model, *KV, "-ctk", "q8_0", "-ctv", "q8_0"), "cache type"),
    ]:
        with Server(*options, "-c", "2048", "--slot-save-path", folder) as other:
            other.complete(tokens(600), n=2)
            other.post("/slots/0?action=save", filename="foreign.bin")
            if options == (model,):  # and stock refuses ours
                assert other.post("/slots/0?action=restore", filename="good.bin").error["code"] == 400
                assert other.complete(tokens(600), n=2).status == 200
        assert words in refused("foreign.bin")

    for name in ("../good.bin", "/etc/passwd", "a/b", "..", "", "x\0y"):
        assert fresh.post("/slots/0?action=restore", filename=name).error["code"] == 400
        assert fresh.post("/slots/0?action=save", filename=name).error["code"] == 400
    assert fresh.post("/slots/0?action=restore", filename="good.bin")["n_restored"] == 607


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_metrics(model):
    with Server(model, *KV, "-c", "4096", "--metrics") as server:
        assert server.metrics()["laprox:compressions_total"] == 0
        kv = server.complete(tokens(1000), n=1)["kv"]
        server.complete(tokens(1000)[:500] + tokens(100, seed=1), n=1)
        metrics = server.metrics()
        assert metrics["laprox:compressions_total"] == 2 and metrics["laprox:compressions_refused_total"] == 0
        assert metrics["laprox:tokens_reread_total"] == 500
        assert metrics["laprox:tokens_seen"] == 600 and metrics["laprox:entries_held"] == 0.2 * 600 * N_PAIRS
        assert metrics["laprox:kv_bytes"] < metrics["laprox:kv_bytes_full"]
        assert metrics["laprox:score_seconds_total"] > 0 and metrics["laprox:compact_seconds_total"] > 0
        assert metrics["laprox:compression_seconds_count"] == 2
        assert metrics['laprox:compression_kept_ratio_bucket{le="0.1"}'] == 0
        assert metrics['laprox:compression_kept_ratio_bucket{le="0.2"}'] == 2
        assert metrics['laprox:compression_kept_ratio_bucket{le="+Inf"}'] == 2
        assert kv["compressions"] == 1


# --- trouble ---------------------------------------------------------------------------------------------------------


def test_hostile_requests(fresh):
    post = lambda raw, path="/completion": fresh.request("POST", path, raw=raw)
    for raw in (b"", b"{", b"[]", b'{"kv": ', b"\xff\xfe", b'{"prompt": ' + b"[" * 2000, b"nul"):
        assert post(raw).status in (400, 500)
    for kv in ({"budget": "9" * 10000}, {"policy": "x" * 100000}, {"budget": "5%\0"}, {"budget": {}}, {"": 1}, []):
        assert fresh.complete("x", kv=kv).error["code"] == 400
    for i in range(300):
        assert fresh.complete(tokens(3, seed=i), n=1).status == 200
    assert fresh.alive and fresh.complete(tokens(600), n=4).status == 200


def test_sleeping_and_waking(model):
    with Server(model, *KV, "-c", "2048", "--metrics", "--sleep-idle-seconds", "1") as server:
        first = server.complete(tokens(600), n=8)["content"]
        for _ in range(200):
            if server.get("/props")["is_sleeping"]:
                break
            threading.Event().wait(0.05)
        assert server.get("/props")["kv"]["policy"] == "laprox"
        assert server.metrics()["laprox:compressions_total"] == 1
        assert server.complete(tokens(600), n=8)["content"] == first
        assert server.metrics()["laprox:compressions_total"] == 2


# --- a document before its questions ---------------------------------------------------------------------------------


def test_many_questions_about_a_document_that_was_read_once(model, tmp_path):
    """As in docs/server.md: the document is a message of its own, and retention gates don't need to know the questions."""
    (tmp_path / "model.gguf").symlink_to(model)
    sidecar.write(tmp_path / "model.kv-gates.gguf", gates_factory.random_gates(3, 256, 2), "f16")
    rng = random.Random(0)
    messages = [{"role": "user", "content": " ".join(english.sentence(rng) for _ in range(36))}]
    with Server(tmp_path / "model.gguf", "-c", "4096", "--kv-policy", "retention", "--kv-budget", "20%", "--kv-min-tokens", "128") as server:
        read = server.post("/v1/chat/completions", messages=messages, add_generation_prompt=False, max_tokens=1)
        assert read["kv"]["entries_full"] > 1200 * N_PAIRS
        assert read["kv"]["entries_held"] == pytest.approx(0.2 * read["kv"]["entries_full"], abs=32)
        first = {}
        for again in range(2):
            for question in ("Who?", "Where is it?", "When, and why?"):
                asked = [*messages, {"role": "user", "content": question}]
                reply = server.post("/v1/chat/completions", messages=asked, max_tokens=24)
                assert reply["timings"]["prompt_n"] < 60 and reply["kv"]["tokens_reread"] == 0 and reply["kv"]["compressions"] == 1
                answer = reply["choices"][0]["message"]["content"]
                assert first.setdefault(question, answer) == answer  # whatever was asked before
