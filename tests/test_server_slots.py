"""laprox-server: slots side by side, draft models, and the requests that save slots."""


import pytest
from gguf_factory import CHATML
from server import PROGRAM, Server, together, tokens

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="built without the server (scripts/build --server)")

KV = ("--kv-budget", "20%", "--kv-min-tokens", "64", "--kv-archive", "off")


@pytest.fixture(scope="module")
def model(toy):
    return toy(chat_template=CHATML, n_ctx_train=4096)


# --- slots that aren't neighbours ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gemma2", "lfm2"])
def test_slots_apart_answer_as_slots_alone(toy, arch):
    with Server(toy(arch, n_ctx_train=4096), *KV, "-c", "2048", "-np", "4", "-b", "256", "--cache-ram", "0") as server:
        ask = lambda slot: server.complete(tokens(500, seed=slot), n=24, id_slot=slot, cache_prompt=False)
        alone = [ask(slot)["content"] for slot in range(4)]
        for slots in ((0, 2), (3, 1), (0, 3, 2), (0, 1, 2, 3)):
            replies = together(*(lambda s=s: ask(s) for s in slots))
            assert [reply["content"] for reply in replies] == [alone[s] for s in slots]


@pytest.mark.parametrize("options", [KV, ()])
def test_a_request_for_a_busy_slot_waits(model, options):
    """Whatever the RAM cache has for it: the running request's slot isn't touched."""
    long, other, short = tokens(400, seed=1), tokens(1500, seed=2), tokens(600, seed=3)
    with Server(model, *options, "-c", "4096", "-np", "2", "-b", "64") as server:

        def ask(prompt, n):
            return server.complete(prompt, n=n, id_slot=0, cache_prompt=False, ignore_eos=True, return_tokens=True)

        def ask_meanwhile(prompt, n):
            while not server.slot()["is_processing"]:
                pass
            return ask(prompt, n)

        alone = {n: ask(prompt, n)["tokens"] for prompt, n in ((long, 600), (other, 4), (short, 8))}
        for running, n in ((long, 600), (other, 4)):  # an answer is generated, or a prompt is read
            replies = together(lambda: ask(running, n), lambda: ask_meanwhile(short, 8))
            assert [reply["tokens"] for reply in replies] == [alone[n], alone[8]]


# --- sliding windows --------------------------------------------------------------------------------------------------


def test_many_slots_of_a_sliding_window_model_reuse_as_many_prefixes_as_without_compression(toy):
    """Prompts short enough to be held whole: their slots are llama.cpp's."""
    model = toy("gemma2", n_ctx_train=4096)
    system = tokens(200)
    prompts = [system + tokens(60, seed=s)[1:] for s in (1, 2, 3)]

    def reused(*options):
        with Server(model, "-c", "2048", "-np", "4", "-b", "128", "-ub", "128", *options) as server:
            return [server.complete(prompts[i % 3], n=4)["timings"]["cache_n"] for i in range(12)]

    off = reused()
    on = reused("--kv-budget", "20%", "--kv-min-tokens", "512")
    assert sum(n > 0 for n in off) >= 9
    assert [n > 0 for n in on] == [n > 0 for n in off] and sum(on) >= sum(off)


# --- drafts -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def draft(toy):
    """The target itself drafts best, which shows that drafts are accepted."""
    return toy(chat_template=CHATML, n_ctx_train=4096)


@pytest.mark.parametrize("slots", ["1", "3"])
def test_drafts_change_nothing(model, draft, slots):
    prompt = tokens(900)
    with Server(model, *KV, "-c", "2048") as server:
        alone = server.complete(prompt, n=40)["content"]
    with Server(model, *KV, "-c", "2048", "-kvu", "-np", slots, "-md", draft, "--spec-type", "draft-simple", "--spec-draft-n-max", "4") as server:
        for _ in range(2):
            reply = server.complete(prompt, n=40, cache_prompt=False)
            assert reply["content"] == alone
            assert reply["timings"]["draft_n"] > 0 and reply["timings"]["draft_n_accepted"] > 0
        other = server.complete(prompt[:895] + tokens(20, seed=2)[1:], n=4)
        assert other["kv"]["tokens_reread"] == 895


def test_the_draft_model_gets_no_more_memory_than_without_compression(model, draft):
    """One cache of -c tokens for all slots, as llama-server has it."""

    def size(*options):
        with Server(model, "-c", "2048", "-np", "4", "-kvu", "-md", draft, "--spec-type", "draft-simple", "-lv", "4", *options) as server:
            return [line.split("=")[-1].strip() for line in server.log.splitlines() if "n_ctx  " in line][-1]

    assert size(*KV) == size() == "2048"


def test_slots_that_fill_the_draft_context_give_way(model, draft):
    """Together they hold more than -c tokens, which only the draft context can't."""
    options = ("-c", "1024", "-np", "3", "-kvu", "--cache-ram", "0", "-md", draft, "--spec-type", "draft-simple")
    with Server(model, *KV, *options) as server:
        for slot in (0, 1, 2, 0):
            reply = server.complete(tokens(700, seed=slot), n=8, id_slot=slot)
            assert reply.status == 200 and reply["timings"]["draft_n"] > 0


# --- slot files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [KV, ()])
def test_a_request_to_save_or_restore_without_a_proper_filename_is_refused(model, tmp_path, options):
    with Server(model, *options, "-c", "1024", "--slot-save-path", tmp_path) as server:
        server.complete(tokens(100), n=1)
        for action in ("save", "restore"):
            for body, words in [
                (b"", "must be a JSON object"),
                (b"{", "must be a JSON object"),
                (b"[]", "must be a JSON object"),
                (b'"document.bin"', "must be a JSON object"),
                (b"{}", '"filename" is missing'),
                (b'{"file": "document.bin"}', '"filename" is missing'),
                (b'{"filename": null}', '"filename" is null'),
                (b'{"filename": 5}', '"filename" is 5'),
                (b'{"filename": ["a"]}', '"filename" is ["a"]'),
                (b'{"filename": ""}', "filename"),
                (b'{"filename": "../a"}', "filename"),
            ]:
                error = server.request("POST", f"/slots/0?action={action}", raw=body).error
                assert error["code"] == 400 and error["type"] == "invalid_request_error" and words in error["message"], (body, error)
                if body != b'{"filename": ""}' and body != b'{"filename": "../a"}':
                    assert '{"filename": "document.bin"}' in error["message"]
        assert not list(tmp_path.iterdir())
        assert server.post("/slots/0?action=save", filename="document.bin")["n_saved"] == 100
