"""What a prompt says of functions is protected, wherever a chat template puts it, and nothing else is."""

import pytest
from functions import ELSEWHERE, IN_SYSTEM, IN_USER, MESSAGES, ONLY_WITH, TOOLS
from server import PROGRAM, Server

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="built without the server (scripts/build --server)")

KV = ("--kv-budget", "5%", "--kv-policy", "streaming", "--kv-min-tokens", "64", "--kv-archive", "off", "-c", "8192")
PROTECTED = 4 + 32  # sink and recent


@pytest.fixture
def start(toy, tmp_path):
    def make(template, *options):
        path = tmp_path / "template.jinja"
        path.write_text(template)
        return Server(toy(), *KV, "--chat-template-file", path, *options)

    return make


def held(server, tools=TOOLS, **more):
    """Tokens that are held on average, those of the prompt, and how many of them are there for the functions."""
    ask = {"messages": MESSAGES, "max_tokens": 1, "tools": tools, **more}
    kv = server.post("/v1/chat/completions", **ask)["kv"]
    pairs = kv["entries_full"] // kv["tokens_seen"]
    n = [len(server.post("/tokenize", content=server.post("/apply-template", **{**ask, "tools": t})["prompt"])["tokens"]) for t in (tools, [])]
    return kv["entries_held"] / pairs, kv["tokens_seen"], n[0] - n[1]


def budget(n_tokens):
    return max(0.05 * n_tokens, PROTECTED)


@pytest.mark.parametrize("template", [IN_SYSTEM, IN_USER], ids=["system", "user"])
def test_functions_are_held_beside_the_budget(start, template):
    with start(template) as server:
        n, seen, n_functions = held(server)
        assert n_functions > 300
        assert -1 < n - budget(seen - n_functions) - n_functions < 4  # tokens that reach over an end count
        n, seen, n_functions = held(server, tools=[])
        assert abs(n - budget(seen)) < 1 and n_functions == 0


def test_all_that_a_request_is_asked_for(start):
    """Functions and what --kv-protect says, by the server or by none; a choice of none leaves them in the prompt."""
    with start(IN_SYSTEM, "--kv-protect", "2000-2100") as server:
        n, seen, n_functions = held(server)
        assert seen > 2100
        assert -1 < n - budget(seen - n_functions - 100) - n_functions - 100 < 4
        n, seen, _ = held(server, tools=[])
        assert abs(n - budget(seen - 100) - 100) < 1


def test_a_request_that_evicts_where_the_server_does_not(start):
    with start(IN_SYSTEM, "--kv-policy", "full") as server:
        n, seen, n_functions = held(server, kv={"policy": "streaming", "budget": "5%"})
        assert -1 < n - budget(seen - n_functions) - n_functions < 4
        n, seen, _ = held(server, cache_prompt=False)
        assert n == seen


@pytest.mark.parametrize("template", [ELSEWHERE, ONLY_WITH], ids=["elsewhere", "only with"])
def test_a_template_that_writes_another_prompt(start, template):
    """Nothing is known of where the functions are: said in the log."""
    with start(template) as server:
        kv = server.post("/v1/chat/completions", messages=MESSAGES, max_tokens=1, tools=TOOLS)["kv"]
        assert abs(kv["entries_held"] * kv["tokens_seen"] / kv["entries_full"] - budget(kv["tokens_seen"])) < 1
        assert "what the prompt says of functions may be evicted" in server.log


@pytest.mark.parametrize("mib, fits", [(10, True), (3, False)])
def test_a_budget_in_bytes_is_a_limit(start, mib, fits):
    """Of two slots each has a half of it. Where functions would take more than a third of that they may be evicted, and are not refused."""
    with start(IN_SYSTEM, "--kv-budget", f"{mib}MiB", "-np", "2", "-c", "16384") as server:
        kv = server.post("/v1/chat/completions", messages=MESSAGES, max_tokens=1, tools=TOOLS)["kv"]
        assert kv["compressions"] == 1 and "refused" not in kv
        assert kv["kv_bytes"] <= mib * 2**20 / 2
        assert ("more than a third of the budget" in server.log) == (not fits)


def test_another_policy_has_the_same_share_of_bytes(start):
    """As a request that says nothing has; one that names other bytes has those."""
    with start(IN_SYSTEM, "--kv-budget", "3MiB", "-np", "2", "-c", "16384") as server:
        for asked, most in ({}, 1.5), ({"policy": "snapkv"}, 1.5), ({"budget": "4MiB"}, 4):
            kv = server.post("/v1/chat/completions", messages=MESSAGES, max_tokens=1, kv=asked, cache_prompt=False)["kv"]
            assert 0.8 * most < kv["kv_bytes"] / 2**20 <= most, (asked, kv)


def test_the_key_is_ours_alone(toy):
    """What the server hands on from one step of a request to the next can't be handed in."""
    for options in (KV, ()):
        with Server(toy(), *options) as server:
            for value in ([0, 1], [0, 100000], [-1, 5], ["a", None], {}, 7, [[]]):
                for path, rest in (("/completion", {"prompt": "hi"}), ("/v1/completions", {"prompt": "hi"}),
                                   ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})):  # fmt: skip
                    assert server.post(path, **rest, max_tokens=1, n_predict=1, __kv_tools=value).status == 200
