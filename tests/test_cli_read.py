"""`laprox read`, `laprox ask` and `laprox chat --document FILE.kv`, as a user meets them."""

import json
import os
import re

import pytest
from document_fuzz import with_text
from gguf_factory import CHATML
from test_cli import Terminal, fails, run

from laprox.read.document import Document

FAST = ["-t", "1", "--temp", "0", "-n", "8"]


@pytest.fixture(scope="module")
def model(toy):
    return str(toy(chat_template=CHATML, n_ctx_train=4096))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "notes.txt").write_text("the quick brown fox jumps over the lazy dog. " * 15)
    (folder / "page.html").write_text("<title>T</title><p>Some <b>text</b>")
    return folder


@pytest.fixture(scope="module")
def read(model, texts):
    """read(name, options...): a document, made by the command once."""

    def make(name, *options):
        path = texts / name
        if not path.exists():
            done = run("read", model, texts / "notes.txt", "-o", path, "-t", "1", "--kv-min-tokens", "64", *options)
            assert done.returncode == 0 and done.stdout == "", done.stderr
            said = r"[\d,]+ tokens, [\d,]+ of [\d,]+ entries \(20\.0%\), [\d.]+ [KM]iB of [\d.]+ [KM]iB\n"
            assert re.fullmatch(re.escape(f"{path}: ") + said, done.stderr), done.stderr
        return str(path)

    return make


def test_questions_in_any_order(read):
    path = read("a.kv")
    one = [run("ask", path, q, *FAST) for q in ("who?", "where?", "who?")]
    assert one[0].returncode == 0, one[0].stderr
    assert re.search(r"^notes.txt: [\d,]+ tokens, [\d.]+ KiB of [\d.]+ KiB, loaded in \d+ ms$", one[0].stderr, re.MULTILINE)
    assert one[0].stdout == one[2].stdout != one[1].stdout
    all_at_once = run("ask", path, "who?", "where?", "who?", *FAST)
    assert all_at_once.stdout == "".join(done.stdout for done in one)
    assert "earlier question" not in all_at_once.stderr and "Only" not in all_at_once.stderr
    assert run("ask", path, *FAST, stdin="who?\n\n where? \nwho?\n").stdout == all_at_once.stdout
    first, _, last = map(json.loads, run("ask", path, "who?", "where?", "who?", "--json", *FAST).stdout.splitlines())
    assert first["entries_held"] == last["entries_held"] < 0.3 * first["entries_full"]
    agnostic = run("chat", "-d", path, "--regime", "agnostic", "--ask", "who?", "--ask", "where?", "--ask", "who?", *FAST)
    assert agnostic.stdout == all_at_once.stdout


def test_a_conversation_about_it(read, model):
    path = read("a.kv")
    done = run("chat", "-d", path, "--ask", "who?", "--ask", "where?", *FAST)
    assert done.returncode == 0, done.stderr
    assert run("chat", model, "--document", path, *FAST, stdin="who?\nwhere?\n").stdout == done.stdout
    first, second = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) tokens seen", done.stderr))
    assert second > first
    t = Terminal("chat", "-d", path, *FAST)
    for command in ("/reread", "/budget 10%"):
        t.say(command)
        t.expect(f"{command.split()[0]}: every question starts from {path}, as it is; `laprox read` makes it anew")
    t.say("who?")
    t.expect("tokens/s")
    t.say("/stats")
    assert "0 entries in the archive" in t.expect("moving")
    t.say("/quit")
    assert t.exit_status() == 0


@pytest.mark.parametrize("types", [("q8_0", "q8_0"), ("q4_0", "q4_0"), ("q8_0", "f16")])
def test_cache_types(read, types):
    path = read(f"{'-'.join(types)}.kv", "-ctk", types[0], "-ctv", types[1])
    assert len(json.loads(run("ask", path, "who?", "--json", *FAST).stdout)["answer"])
    assert Document(path).n_bytes < Document(read("a.kv")).n_bytes


def test_an_archive(read):
    path = read("archive.kv", "--archive")
    first, _, last = map(json.loads, run("ask", path, "who?", "where?", "who?", "--json", *FAST).stdout.splitlines())
    assert first["entries_recalled"] > 0 and first == last | {"decode_tokens_per_s": first["decode_tokens_per_s"]}


def test_several_files_are_one_document(model, texts):
    path = texts / "both.kv"
    done = run("read", model, texts / "notes.txt", texts / "page.html", "--output", path, "-t", "1", "--kv-policy", "full")
    assert done.returncode == 0 and "(100.0%)" in done.stderr
    both = Document(path)
    assert both.title == "notes.txt, page.html" and both.text.startswith("# notes.txt\n\nthe quick") and both.text.endswith("Some text")
    assert run("ask", path, "who?", *FAST).returncode == 0


def test_another_policy_where_it_is_asked_for(read):
    done = run("ask", read("a.kv"), "who?", "--json", *FAST, "--kv-policy", "snapkv", "--kv-budget", "10%", "--kv-min-tokens", "64", "-n", "600")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens_seen"] > 700


def test_a_chat_template_of_ones_own(read, model, texts):
    path = read("llama3.kv", "--chat-template", "llama3")
    assert Document(path).settings["chat_template"].startswith("{%")
    assert run("ask", path, "who?", *FAST).returncode == 0


# --- what is wrong is said -------------------------------------------------------------------------------------------


def test_documents_are_not_put_together(read, texts):
    said = fails("chat", "-d", read("a.kv"), "-d", texts / "notes.txt", "--ask", "?")
    assert "a.kv: other documents can't be put beside one that was read" in said and "`laprox read MODEL FILE...` reads several as one" in said
    assert said == fails("chat", "-d", texts / "notes.txt", "-d", read("a.kv"), "--ask", "?")


def test_a_document_is_not_read_again(read, model, texts):
    assert "a.kv: it is a GGUF; what was read can't be read again" in fails("read", model, read("a.kv"), "-o", texts / "b.kv")


def test_nothing_but_a_document_is_replaced(model, texts, read, tmp_path):
    text, path, empty, pipe = texts / "notes.txt", tmp_path / "x.kv", tmp_path / "empty", tmp_path / "pipe"
    os.mkfifo(pipe)
    for there in (text, model, pipe):
        said = fails("read", model, text, "-o", there)
        assert said.startswith(f"laprox: {there} is there, and is none of `laprox read`'s documents; accepted: ")
    assert text.read_text().startswith("the quick")
    empty.touch()
    with open(read("a.kv"), "rb") as whole:
        path.write_bytes(whole.read()[:-1])  # damaged, but one
    for there in (path, empty):
        assert run("read", model, text, "-o", there, "-t", "1").returncode == 0
        assert Document(there).title == "notes.txt"


def test_files_that_are_none(model, texts, read):
    assert fails("ask", texts / "no.kv", "?") == f"laprox: {texts / 'no.kv'}: No such file or directory"
    assert "not a document that laprox wrote, nor any GGUF" in fails("ask", texts / "notes.txt", "?")
    for command in (["ask", model, "?"], ["chat", "-d", model, "--ask", "?"]):
        assert re.search(r"a GGUF of version 3 with \d+ tensors and \d+ keys, such as a model", fails(*command))
    cut = texts / "cut.kv"
    with open(read("a.kv"), "rb") as whole:
        cut.write_bytes(whole.read()[:-1])
    assert "cut.kv: the document is damaged" in fails("ask", cut, "?")


def test_another_model(read, toy):
    other = toy(chat_template=CHATML, n_ctx_train=4096, seed=3)
    assert re.search(r"a\.kv: the document was made with another model \(fingerprint \w{16} there, \w{16} here\)", fails("ask", read("a.kv"), "?", "-m", other))
    other = toy(n_ctx_train=4096, seed=3)  # whose prompts begin otherwise, too
    for command in (["chat", other, "-d", read("a.kv"), "--ask", "?"], ["ask", read("a.kv"), "?", "-m", other]):
        assert re.search(r"a\.kv: it was made with the model \S+, and this is another one \(fingerprint \w{16} there, \w{16} here\)$", fails(*command))


def test_the_same_model_with_another_chat_template(read, toy):
    said = fails("ask", read("a.kv"), "?", "-m", toy(n_ctx_train=4096))
    assert said.endswith("it was made with another chat template: the chat template begins otherwise")


def test_a_model_that_is_not_here(read, model, texts):
    """Nothing is downloaded because a file says so."""
    moved = texts / "moved.kv"
    with open(read("a.kv"), "rb") as file:
        data = file.read()
    settings = Document(read("a.kv")).settings
    for name in ("/no/model.gguf", "user/model", "\x1b[2Jx"):
        moved.write_bytes(with_text(data, json.dumps(settings).encode(), json.dumps(settings | {"model": name}).encode()))
        said = fails("ask", moved, "?")
        assert "moved.kv: it was made with the model" in said and "-m MODEL says where it is" in said and "\x1b" not in said
    assert run("ask", moved, "who?", "-m", model, *FAST).returncode == 0


@pytest.mark.parametrize(
    "options, said",
    [
        (["ask", "DOC", "?", "--kv-policy", "off"], "--kv-policy off can't hold a document that was read; accepted: full"),
        (["ask", "DOC", "?", "-c", "100"], "too many for -c 100"),
        (["ask", "DOC", "?", "-m", "no.gguf"], "no.gguf: no such file"),
        (["chat", "-d", "DOC", "--ask", "?", "-ctk", "q8_0"], "a.kv has the chat template and the cache types that it was made with"),
        (["chat", "-d", "DOC", "--ask", "?", "--chat-template", "llama3"], "a.kv has the chat template and the cache types"),
        (["read", "MODEL", "TEXT", "-o", "x.kv", "--kv-policy", "off"], "--kv-policy off has nothing to write; accepted: full"),
        (["read", "MODEL", "TEXT", "-o", "/no/x.kv"], "/no/x.kv can't be written: No such file or directory"),
        (["read", "MODEL", "TEXT", "-o", "/"], "/ can't be written: it is a folder"),
        (["read", "MODEL", "TEXT", "-o", "x.kv", "-c", "100"], "too many for -c 100"),
        (["read", "MODEL", "no.txt", "-o", "x.kv"], "no.txt: No such file or directory"),
        (["read", "MODEL", "TEXT", "-o", "x.kv", "-ctk", "q9"], "--cache-type-k is 'q9'"),
        (["read", "MODEL", "TEXT", "-o", "x.kv", "--probe-share", "2"], "--probe-share is 2.0; accepted: from"),
    ],
)
def test_settings(read, model, texts, tmp_path, options, said):
    names = {"DOC": read("a.kv"), "MODEL": model, "TEXT": texts / "notes.txt", "x.kv": tmp_path / "x.kv"}
    assert said in fails(*[names.get(option, option) for option in options])
    assert not list(tmp_path.iterdir())


def test_no_question(read):
    for command in ("ask", "chat -d"):
        assert "no question" in fails(*command.split(), read("a.kv"), *FAST, status=2)


@pytest.mark.parametrize("command", ["ask", "chat -d"])
@pytest.mark.parametrize("options", [["--kv-budget", "5%"], ["--kv-budget", "20%"], ["--kv-min-tokens", "512"]])
def test_settings_that_a_document_would_not_follow(read, command, options):
    """Nor where they are what they would be anyway."""
    said = fails(*command.split(), read("a.kv"), *options, status=2, stdin="who?")
    assert re.search(f"{options[0]} does nothing for a document .* accepted with it: --kv-policy", re.sub(r"[\s│]+", " ", said)), said


@pytest.mark.parametrize("options", [["ask"], ["read", "MODEL"], ["read", "MODEL", "TEXT"], ["chat", "--ask", "?"], ["chat", "-d", "TEXT"]])
def test_usage(model, texts, options):
    names = {"MODEL": model, "TEXT": texts / "notes.txt"}
    assert f"Usage: laprox {options[0]}" in fails(*[names.get(option, option) for option in options], status=2)


def test_a_text_longer_than_the_model_was_trained_for(model, tmp_path):
    (tmp_path / "long.txt").write_text("word " * 2000)
    said = fails("read", model, tmp_path / "long.txt", "-o", tmp_path / "x.kv")
    assert "trained for 4,096" in said and "-c" in said and not (tmp_path / "x.kv").exists()
