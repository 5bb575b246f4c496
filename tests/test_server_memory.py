"""laprox-server: /metrics against what the process holds."""

import os
import random
from pathlib import Path

import pytest
from server import PROGRAM, Server

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="built without the server (scripts/build --server)")

MiB = 1 << 20
SHAPE = {"n_layer": 8, "n_embd": 128, "n_head": 8, "n_head_kv": 8, "head_dim": 128, "n_ff": 128}  # 32 KiB per token of F16


def tokens(n, seed=0):
    rng = random.Random(seed)
    return [1, *(rng.randrange(262, 512) for _ in range(n - 1))]


def resident(server) -> int:
    for line in Path(f"/proc/{server.process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS")


@pytest.mark.skipif("LAPROX_SANITIZED" in os.environ, reason="a sanitizer's process holds more than the program asks for")
@pytest.mark.parametrize("slots", [1, 2])
def test_reported_bytes_are_the_processs(toy, slots):
    """Before, while and after documents come and go: within a few percent."""
    options = ("--kv-budget", "20%", "--kv-min-tokens", "64", "-c", str(2560 * slots), "-np", str(slots), "-b", "64", "--cache-ram", "0", "--metrics")
    with Server(toy(n_ctx_train=4096, **SHAPE), *options, "--slot-save-path", str(Path(toy(**SHAPE)).parent)) as server:

        def look():
            metrics = server.metrics()
            return metrics["laprox:kv_bytes"] + metrics["laprox:window_bytes"], resident(server)

        seen = []
        server.complete(tokens(80), n=2, id_slot=0)  # everything has been used once
        seen.append(look())
        for i in range(2 * slots):
            budget = "90%" if i < slots else "20%"
            held = server.complete(tokens(2000, i), n=4, id_slot=i % slots, kv={"budget": budget})["kv"]
            assert held["entries_held"] < (0.95 if i < slots else 0.25) * held["entries_full"]
            seen.append(look())
        for slot in range(slots):
            assert server.post(f"/slots/{slot}?action=erase").status == 200
        server.complete(tokens(80), n=2, id_slot=0)
        seen.append(look())
    assert max(reported for reported, _ in seen) > 60 * MiB * slots and seen[-1][0] < 25 * MiB * slots
    beside = [rss - reported for reported, rss in seen]  # the model, the program, compute buffers
    for (reported, _), more in zip(seen, [b - beside[0] for b in beside]):
        assert abs(more) < 0.04 * reported + 16 * MiB, seen


def test_a_prompt_that_was_not_compressed_is_counted(toy):
    """And answered, from all of it."""
    with Server(toy(n_ctx_train=4096), "--kv-budget", "20%", "--kv-min-tokens", "64", "-c", "2048", "--metrics") as server:
        kv = server.complete(tokens(600), n=1, kv={"budget": "1KiB"})["kv"]
        metrics = server.metrics()
        assert "accepted: at least" in kv["refused"] and kv["entries_held"] == kv["entries_full"]
        assert (metrics["laprox:compressions_refused_total"], metrics["laprox:compressions_total"]) == (1, 0)
        assert metrics["laprox:entries_held"] == metrics["laprox:entries_full"] > 0
