"""laprox-server: its options, what /props says of them, and the commands that start it."""

import json
import subprocess
import sys

import pytest
from gguf_factory import CHATML
from server import PROGRAM, Refused, Server, tokens

from laprox import _core

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="built without the server (scripts/build --server)")

KV = ("--kv-budget", "20%", "--kv-min-tokens", "64", "--kv-archive", "off")


@pytest.fixture(scope="module")
def model(toy):
    return toy(chat_template=CHATML, n_ctx_train=4096)


def start_and_fail(*options, **kwargs):
    with pytest.raises(Refused) as refused:
        Server(*options, **kwargs).stop()
    return str(refused.value)


@pytest.mark.parametrize(
    "option, value, words",
    [
        ("--kv-budget", "-5%", ["negative", "512MiB"]),
        ("--kv-budget", "0", ["more than 0"]),
        ("--kv-budget", "101%", ["more than 100%"]),
        ("--kv-budget", "5 apples", ['unit "apples"']),
        ("--kv-policy", "best", ["accepted: off, laprox", "snapkv", "allocators"]),
        ("--kv-policy", "snapkv:nobody", ['there is no allocator "nobody"']),
        ("--kv-policy", "custom", ["accepted: off, laprox"]),
        ("--kv-window", "0", ["an integer from 1 to 1024"]),
        ("--kv-window", "many", ["an integer from 1 to 1024"]),
        ("--kv-sink", "-1", ["from 0 to"]),
        ("--kv-recent", "0", ["from 1 to"]),
        ("--kv-min-tokens", "99999999999", ["from 0 to 1073741824"]),
        ("--kv-floor", "1.5", ["a number from 0 to 1"]),
        ("--kv-prefill", "sparse", ["dense, chunked"]),
    ],
)
def test_a_bad_option_names_itself_its_value_and_what_is_accepted(model, option, value, words):
    log = start_and_fail(model, option, value)
    assert f'error while handling argument "{option}"' in log
    for word in [f'{option} is "{value}"', "; accepted: ", *words]:
        assert word in log, log

    variable = "LLAMA_ARG_" + option[2:].upper().replace("-", "_")
    assert f'error while handling environment variable "{variable}"' in start_and_fail(model, env={variable: value})


def test_help_has_a_line_for_every_option():
    text = subprocess.run([PROGRAM, "--help"], capture_output=True, text=True).stdout
    plain = " ".join(text.split())
    for row in _core.options():
        assert f"--kv-{row.name.replace('_', '-')} {row.value} " in plain
        assert f"(env: LLAMA_ARG_KV_{row.name.upper()})" in plain
        assert row.help in plain


@pytest.mark.parametrize(
    "options, env, policy, budget",
    [
        ((), {}, "off", None),
        (("--kv-budget", "7%"), {}, "laprox", "7%"),
        (("--kv-policy", "snapkv:ada"), {}, "snapkv:ada", "20%"),
        ((), {"LLAMA_ARG_KV_BUDGET": "512"}, "laprox", "512"),
        (("--kv-budget", "9%"), {"LLAMA_ARG_KV_BUDGET": "512", "LLAMA_ARG_KV_POLICY": "keydiff"}, "keydiff", "9%"),
        (("--kv-policy", "off"), {"LLAMA_ARG_KV_BUDGET": "512"}, "off", None),
    ],
)
def test_props(model, options, env, policy, budget):
    with Server(model, "-c", "1024", *options, env=env) as server:
        kv = server.get("/props")["kv"]
        assert kv["version"] >= 2 and "laprox" in kv["capabilities"]["policies"] and "ada" in kv["capabilities"]["allocators"]
        assert (kv["policy"], kv.get("budget")) == (policy, budget)
        assert kv["capabilities"]["request_override"] == (policy != "off")
        named = {row.name for row in _core.options() if row.kind != "path"} if policy != "off" else {"policy"}
        assert set(kv) == {"version", "capabilities"} | named


def test_props_are_of_the_kinds_that_options_have(model):
    with Server(model, "-c", "1024", "--kv-policy", "laprox", "--kv-min-tokens", "7", "--kv-floor", "0.1", "--kv-prefill", "chunked") as server:
        kv = server.get("/props")["kv"]
        assert (kv["min_tokens"], kv["floor"], kv["prefill"], kv["window"], kv["budget"]) == (7, 0.1, "chunked", 32, "20%")


def test_off_is_llama_server(model):
    with Server(model, "-c", "2048", "--metrics") as server:
        reply = server.complete(tokens(1000))
        assert "kv" not in reply.json and reply["tokens_evaluated"] == 1000
        assert "kv" not in server.slot()
        assert "laprox" not in server.get("/metrics").text
        error = server.complete(tokens(10), kv={"budget": "10%"}).error
        assert error["code"] == 400 and "--kv-budget" in error["message"]


def test_options_without_effect_are_said_to_have_none(model):
    with Server(model, "-c", "1024", "--kv-window", "64") as server:
        assert server.get("/props")["kv"]["policy"] == "off"
        assert "no effect without --kv-budget, --kv-policy or --kv-documents" in server.log
    with Server(model, "-c", "1024", "--kv-budget", "5%", "--embedding") as server:
        assert "no effect with --embedding" in server.log
        assert server.get("/props")["kv"]["policy"] == "off"
    with Server(model, "-c", "1024", "--kv-budget", "5%", "--context-shift") as server:
        assert "--context-shift has no effect" in server.log


def test_what_cant_be_compressed_is_refused_at_start(toy, model):
    assert "ALiBi" in start_and_fail(toy("alibi"), "--kv-budget", "5%")
    assert "no layer with a full attention cache" in start_and_fail(toy("mamba"), "--kv-budget", "5%")
    log = start_and_fail(model, "--kv-budget", "5%", "--mmproj", model)
    assert "several tokens at one position" in log and "--kv-policy off" in log
    assert "flash attention" in start_and_fail(model, "--kv-budget", "5%", "-fa", "off")
    log = start_and_fail(model, "--kv-budget", "20")
    assert '--kv-budget is "20" (less than the 36 tokens that are never evicted, --kv-sink 4 and --kv-recent 32)' in log
    assert "larger than the context" in start_and_fail(model, "--kv-budget", "3000", "-c", "1024")
    assert "needs a profile" in start_and_fail(model, "--kv-policy", "lukv")
    assert "needs" in start_and_fail(model, "--kv-policy", "retention")
    assert "no/such/file.gguf" in start_and_fail(model, "--kv-policy", "lukv", "--kv-profile", "no/such/file.gguf")
    said = start_and_fail(model, "--kv-policy", "lukv", "--kv-profile", "curves.npy")
    assert '--kv-profile is "curves.npy"' in said and "laprox profile MODEL --convert curves.npy" in said


@pytest.mark.parametrize("command", [["-m", "laprox", "serve"], ["-c", "from laprox.cli.serve import main; main()"]])
def test_commands(command):
    run = lambda *options: subprocess.run([sys.executable, *command, *options], capture_output=True, text=True)
    done = run("--help")
    assert done.returncode == 0 and "--kv-budget" in done.stdout and "--ctx-size" in done.stdout
    done = run("--kv-window", "0")
    assert done.returncode == 1 and "--kv-window" in done.stderr
    assert json.dumps(done.returncode)
