"""A model on two devices: llama-server over RPC, and a device that goes away. The engine's own tests run on them, too: scripts/test."""

import re

import devices
import llama_cpp.llama_cpp as L
import pytest
from server import Server

PROMPT = list(range(3, 303))
KV = ("--kv-policy", "laprox", "--kv-budget", "20%", "--kv-min-tokens", "0", "--kv-archive", "off", "-c", "1024")

pytestmark = [
    pytest.mark.skipif(not hasattr(L._lib, "ggml_backend_rpc_start_server"), reason="built without RPC"),
    pytest.mark.skipif(devices.BACKEND != "cpu", reason="starts servers of its own"),
]


@pytest.fixture
def two():
    servers = [devices.Server(), devices.Server()]
    yield servers
    for server in servers:
        server.process.kill()


def endpoints(servers):
    return ",".join(server.endpoint for server in servers)


def test_server_saves_and_restores_a_slot(toy, tmp_path, two):
    options = [*KV, "--rpc", endpoints(two), "-ngl", "99", "-ctk", "q8_0", "-ctv", "q8_0", "--slot-save-path", tmp_path]
    question = [*PROMPT, 7, 8, 9]
    with Server(toy(weights="F16"), *options) as server:
        first = server.complete(PROMPT)
        assert first["kv"]["entries_held"] < 0.3 * first["kv"]["entries_full"]
        saved = server.post("/slots/0?action=save", filename="kept.bin")
        answers = []
        for _ in range(2):
            server.post("/slots/0?action=erase")
            assert server.post("/slots/0?action=restore", filename="kept.bin")["n_restored"] == saved["n_saved"]
            answers.append(server.complete(question))
            assert answers[-1]["timings"]["prompt_n"] == 3
        assert answers[0]["content"] == answers[1]["content"]


def test_a_device_that_goes_away_ends_the_program_with_the_reason(toy, two):
    """ggml's RPC has no way back: the program ends at once, and says why. Nothing hangs."""
    server = Server(toy(weights="F16"), *KV, "--rpc", endpoints(two), "-ngl", "99")
    try:
        server.complete(PROMPT)
        two[1].process.kill()
        with pytest.raises(OSError):
            server.complete([*PROMPT, 7, 8, 9])
        server.process.wait(timeout=60)
        assert "Remote RPC server crashed" in server.log
    finally:
        server.stop()
        server.log_path.unlink()


def test_bytes_are_counted_where_they_are(toy, two):
    """What llama.cpp reports of each device's memory: halves of the layers, before by --fit and after a compression."""
    model = toy(weights="F16", n_layer=4, n_embd=256, n_head=8, n_head_kv=8, head_dim=128)
    server = Server(model, *KV[:-1], "2048", "--rpc", endpoints(two), "-ngl", "99", "-ub", "128", "-ts", "2,3", "-lv", "4")
    with server:
        kv = server.complete([3 + i % 400 for i in range(1500)])["kv"]
        server.stop()
        counted = re.findall(r"RPC(\d) .*\+ \( *\d+ = *\d+ \+ *(\d+) \+", server.log)
    *before, first, second = [int(mib) for _, mib in counted]
    assert first == pytest.approx(second, abs=1) and before[0] == before[1] > 3 * first
    assert first + second == pytest.approx((kv["kv_bytes"] + kv["window_bytes"]) / 2**20, abs=3)
