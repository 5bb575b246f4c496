"""laprox-server: the list of documents, and requests, files and options that are refused."""

# ruff: noqa: F811 - fixtures are imported

import json
import os
import shutil
import time

import pytest
from document_fuzz import sealed, split, with_text
from gguf_factory import CHATML
from served_documents import (  # noqa: F401
    TEXTS,
    chat,
    check_not_read,
    content,
    expected,
    folder,
    load,
    model,
    own,
    python_answer,
    start,
)
from server import PROGRAM, Refused, Server

from laprox import KVConfig
from laprox.read.document import Document
from laprox.read.writing import write_document

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="built without the server (scripts/build --server)")


def test_the_list(load, toy, own, start):
    whole = (own / "a.kv").read_bytes()
    (own / "cut.kv").write_bytes(whole[:-100])
    (own / "flipped.kv").write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    (own / "text.kv").write_text("text " * 100)
    (own / "model.kv").write_bytes(open(toy(), "rb").read())
    (own / "other.txt").write_text("no document")
    (own / ".kv").write_text("no name")
    (own / "folder.kv").mkdir()
    write_document(load(seed=1), TEXTS["a"], own / "stranger.kv")
    write_document(load(type_k=8, type_v=2), TEXTS["a"], own / "types.kv")
    write_document(load(n_ctx=4096), TEXTS["a"] * 4, own / "long.kv")
    reasons = {
        "cut": "damaged", "flipped": "damaged", "text": "not a document", "model": "not a document", "stranger": "another model",
        "types": "-ctk q8_0 -ctv q4_0 (here: f16, f16)", "long": "accepted: a -c that holds a question, too",
    }  # fmt: skip
    with start(folder=own) as server:
        for _ in range(2):
            listed = server.get("/documents")
            assert listed["documents"] == [
                {"name": name, "title": f"{name}.txt", "tokens": len(document.tokens), "bytes": document.n_bytes, "archive": False}
                for name in "ab"
                for document in [Document(own / f"{name}.kv")]
            ]
            assert [item["name"] for item in listed["refused"]] == sorted(reasons)
            for item in listed["refused"]:
                assert reasons[item["name"]] in item["reason"]
                refusal = chat(server, "Ada?", item["name"]).error
                assert refusal["code"] == 400 and reasons[item["name"]] in refusal["message"]
            assert str(own) not in server.get("/documents").text
        assert server.get("/slots").json[0]["kv"]["tokens_seen"] == 0 and server.alive


def test_a_file_that_was_refused_is_not_read_again(own, start):
    """Until it is another one: what changes it without a trace isn't seen."""
    whole, path = (own / "a.kv").read_bytes(), own / "flipped.kv"
    path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    with start(folder=own) as server:
        for change in (None, whole):
            if change:
                before = path.stat()
                path.write_bytes(change)
                os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            assert [item["name"] for item in server.get("/documents")["refused"]] == ["flipped"]
            assert "damaged" in chat(server, "Ada?", "flipped").error["message"]
        os.utime(path)
        assert chat(server, "Ada?", "flipped").status == 200
        assert server.get("/documents")["refused"] == []


def test_a_folder_that_goes_away(own, start, expected):
    with start(folder=own) as server:
        gone = own.rename(own.parent / "elsewhere")
        for reply in (server.get("/documents"), chat(server, "Ada?")):
            assert "folder of --kv-documents can't be read: " in reply.error["message"]
            assert str(own) not in reply.text
        gone.rename(own)
        assert content(chat(server, "Ada?")) == expected("a", "Ada?")


@pytest.mark.skipif(os.name == "nt", reason="no file can have such a name there")
def test_files_that_no_request_can_name(own, start):
    names = sorted(["12:30", "a..b", " a", "\u200b\ufeff", "tab\t"])
    for name in names:
        shutil.copy(own / "a.kv", own / f"{name}.kv")
    with start(folder=own) as server:
        refused = server.get("/documents")["refused"]
        assert sorted(item["name"] for item in refused) == names
        assert all("no request can name it; accepted:" in item["reason"] for item in refused)
        assert "without folder and .kv: a, b" in chat(server, "Ada?", "12:30").error["message"]


def test_forged_files(load, own, start, expected):
    """With their checksums made right again: what the list can't see is refused when a slot loads it, which is empty then."""
    data = (own / "a.kv").read_bytes()
    head, state, padding = split(data)
    (own / "state.kv").write_bytes(sealed(head + state[:400] + bytes([state[400] ^ 1]) + state[401:] + padding))
    text = TEXTS["a"].encode()
    (own / "text.kv").write_bytes(with_text(data, text, text.replace(b"48", b"49")))
    llm = load(KVConfig(budget="20%", min_tokens=64, archive="ram"))
    settings = json.dumps(write_document(llm, TEXTS["a"], own / "c.kv", archive=True).settings).encode()
    data = (own / "c.kv").read_bytes()
    reasons = {"text": "another tokenizer"}
    changes = [("budget", "20%", "much"), ("policy", "laprox", "nonsense"), ("archive", True, 1), ("cache_type_k", "f16", 5)]
    for name, good, bad in changes:
        forged = settings.replace(f'"{name}": {json.dumps(good)}'.encode(), f'"{name}": {json.dumps(bad)}'.encode())
        assert forged != settings
        (own / f"{name}.kv").write_bytes(with_text(data, settings, forged))
        reasons[name] = "accepted" if name in ("budget", "policy") else "settings can't be read"
    (own / "none.kv").write_bytes(with_text(data, settings, b"{"))
    reasons["none"] = "settings can't be read"
    with start(folder=own) as server:
        listed = server.get("/documents")
        assert [item["name"] for item in listed["documents"]] == ["a", "b", "c", "state"]
        assert {item["name"] for item in listed["refused"]} == set(reasons)
        for item in listed["refused"]:
            assert reasons[item["name"]] in item["reason"]
            assert reasons[item["name"]] in chat(server, "Ada?", item["name"]).error["message"]
        for stream in (False, True):
            assert content(chat(server, "Ada?")) == expected("a", "Ada?")
            refusal = chat(server, "Ada?", "state", stream=stream).error
            assert refusal["code"] == 400 and 'the document "state" can\'t be asked about' in refusal["message"]
            assert server.slot()["kv"]["tokens_seen"] == 0
        assert content(chat(server, "Ada?", "b")) == expected("b", "Ada?")


@pytest.mark.parametrize(
    "documents, says",
    [
        (["c"], "accepted: the name of a file of the server's folder, without folder and .kv: a, b"),
        (["a.kv"], "without folder and .kv"),
        (["../own/a"], "without folder"),
        (["sub/a"], "without folder"),
        ([".."], "without folder"),
        (["a\u0000"], "without folder"),
        (["a\n"], "without folder"),
        ([""], "without folder"),
        (["x" * 5000], "without folder"),
        (["a", "b"], "has 2 names; accepted: one"),
        ([], 'accepted: a list with a name, such as ["report"]'),
        ("a", "accepted: a list"),
        ([5], "accepted: a list"),
        ({"a": 1}, "accepted: a list"),
        (5, "accepted: a list"),
    ],
)
def test_names_that_are_refused(server, documents, says):
    for path, rest in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "?"}]}),
        ("/completion", {"prompt": "?"}),
    ):
        refusal = server.post(path, documents=documents, **rest).error
        assert refusal["code"] == 400 and says in refusal["message"] and "documents" in refusal["message"]


@pytest.fixture(scope="module")
def server(start):
    with start() as server:
        yield server


def test_nothing_at_all_is_an_ordinary_request(server):
    for none in ({"documents": None}, {}):
        reply = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "Ada?"}], **none)
        assert "document" not in reply["kv"]


def test_what_comes_before_the_document_is_refused(server):
    for messages in ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Ada?"}],):
        refusal = server.post("/v1/chat/completions", messages=messages, documents=["a"]).error
        assert refusal["code"] == 400 and "another chat template" in refusal["message"] and "system message" in refusal["message"]
    refusal = server.post("/v1/chat/completions", messages=[{"role": "assistant", "content": "Ada?"}], documents=["a"]).error
    assert "no message of the role user" in refusal["message"]


def test_another_chat_template(start, tmp_path):
    shouted = CHATML.replace("<|im_start|>' + message['role']", "<|im_start|>!' + message['role']")
    longer = CHATML.replace("+ message['content']", "+ 'So: ' + message['content']")
    deaf = CHATML.replace("message['content'] +", "'?' +")
    for template in (shouted, longer, deaf):
        (tmp_path / "t.jinja").write_text(template)
        with start("--chat-template-file", tmp_path / "t.jinja") as server:
            refusal = chat(server, "Ada?").error
            assert refusal["code"] == 400
            assert ("leaves out" if template is deaf else "another chat template") in refusal["message"]


def test_a_template_that_changes_the_case_and_trims(load, tmp_path):
    template = CHATML.replace("message['content']", "(message['content'] | trim | upper)")
    document = write_document(load(chat_template=template), TEXTS["a"], tmp_path / "a.kv")
    with Server(load(chat_template=template).model_path, "--kv-documents", tmp_path, "-c", "2048") as server:
        reply = chat(server, "Ada?")
        check_not_read(reply, document)
        assert content(reply) == python_answer(load, document.path, "Ada?", chat_template=template)


def test_infill_is_refused(server):
    reply = server.post("/infill", input_prefix="a", input_suffix="b", documents=["a"])
    assert reply.status in (400, 501)  # the model has no tokens for it, which is said first


def test_a_template_has_no_place_for_a_document(server):
    ask = {"messages": [{"role": "user", "content": "?"}]}
    refusal = server.post("/apply-template", **ask, documents=["a"]).error
    assert refusal["code"] == 400 and "'documents': /apply-template has no place for a document" in refusal["message"]
    assert isinstance(server.post("/apply-template", **ask)["prompt"], str)


def test_without_the_option(model, folder):
    for options in ((), ("--kv-budget", "20%")):
        with Server(model, "-c", "2048", *options) as server:
            assert server.get("/documents").status == 501 and "--kv-documents" in server.get("/documents").error["message"]
            refusal = chat(server, "Ada?").error
            assert refusal["code"] == 400 and "--kv-documents" in refusal["message"]
            for others in ([{"title": "t", "text": "a text"}], [], "a", {}):  # which llama-server ignores
                for path, rest in (("/v1/chat/completions", {"messages": [{"role": "user", "content": "?"}]}), ("/completion", {"prompt": "?"})):
                    assert server.post(path, **rest, n_predict=1, max_tokens=1, documents=others).status == 200


@pytest.mark.parametrize("wrong", ["", "/no/such/folder", __file__])
def test_a_folder_that_is_none(model, wrong):
    with pytest.raises(Refused) as refused:
        Server(model, "--kv-documents", wrong)
    assert f'--kv-documents is "{wrong}"; accepted: a folder that is there' in str(refused.value)


def test_documents_need_the_compressing_cache(start):
    with pytest.raises(Refused, match="--kv-documents: .* --kv-policy off turns off; accepted: full"):
        start("--kv-policy", "off")


def test_after_sleeping(start, folder, expected):
    """The model and its context are made again."""
    with start("--sleep-idle-seconds", "1") as server:
        for _ in range(2):
            assert content(chat(server, "Ada?")) == expected("a", "Ada?")
            assert len(server.get("/documents")["documents"]) == 2
            deadline = time.monotonic() + 60
            while not server.get("/props")["is_sleeping"]:
                assert time.monotonic() < deadline
                time.sleep(0.1)


def test_from_the_environment(model, folder, expected):
    with Server(model, "-c", "2048", env={"LLAMA_ARG_KV_DOCUMENTS": str(folder)}) as server:
        assert content(chat(server, "Ada?")) == expected("a", "Ada?")
