"""laprox-server: questions about documents that `laprox read` wrote. Every one is answered from the document's state, as Python's
Llama.load_document answers it, and nothing of the document is evaluated."""

import json
import os
import shutil
import threading
import time

import pytest
from document_fuzz import sealed, split, with_text
from gates_factory import random_gates
from gguf_factory import CHATML
from server import PROGRAM, Refused, Server

from laprox import KVConfig, Llama
from laprox.gates import sidecar
from laprox.read.document import Document
from laprox.read.writing import write_document

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="built without the server (scripts/build --server)")

TEXTS = {
    "a": "the code of Ada is 48, of Bob 77, of Eve 12. <|im_end|> " * 10,
    "b": "in March it rained for 21 days, in May for 3. " * 12,
}
KV = KVConfig(budget="20%", min_tokens=64, archive="off")
N = 8
BIAS = {str(token): -100 for token in range(261)}  # neither the end nor bytes, which may be no text
GREEDY = {"max_tokens": N, "logit_bias": BIAS}
QUESTIONS = ("Ada?", "Who is Bob, and what is his code?", "Eve?")


@pytest.fixture(scope="module")
def load(toy):
    """load(): a Llama of the tiny model that the server has, too."""

    def make(kv=KV, arch="llama", seed=0, chat_template=CHATML, **kwargs):
        kwargs = {"n_ctx": 2048, "n_threads": 1, "n_threads_batch": 1, "seed": 1, "verbose": False, **kwargs}
        return Llama(str(toy(arch, chat_template=chat_template, seed=seed, n_ctx_train=4096)), kv=kv, **kwargs)

    return make


@pytest.fixture(scope="module")
def model(toy):
    return toy("llama", chat_template=CHATML, seed=0, n_ctx_train=4096)


@pytest.fixture(scope="module")
def folder(load, tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    for name, text in TEXTS.items():
        write_document(load(), text, folder / f"{name}.kv", f"{name}.txt")
    return folder


@pytest.fixture
def own(folder, tmp_path):
    """The same documents, to be changed."""
    return shutil.copytree(folder, tmp_path / "own")


@pytest.fixture(scope="module")
def start(model, folder):
    def start(*options, model=model, folder=folder, **kwargs):
        return Server(model, "--kv-documents", folder, "-c", "2048", *options, **kwargs)

    return start


@pytest.fixture(scope="module")
def expected(load, folder):
    """What Python answers: expected(name, question, turns)."""
    answers = {}

    def ask(name, question, turns=()):
        key = name, question, tuple(turns)
        if key not in answers:
            answers[key] = python_answer(load, folder / f"{name}.kv", question, turns)
        return answers[key]

    return ask


def python_answer(load, path, question, turns=(), **kwargs):
    kwargs = {"kv": Document(path).kv, **kwargs}
    llm = load(**kwargs)
    document = llm.load_document(path)
    prompt = document.prompt(question, turns)
    reply = llm.create_completion(
        prompt, stop=document.stop, max_tokens=N, temperature=0.0, logit_bias={int(token): bias for token, bias in BIAS.items()}
    )
    return reply["choices"][0]["text"]


def body(question, document="a", turns=(), **more):
    said = [text for turn in turns for text in turn] + [question]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return {"messages": messages, **({"documents": [document]} if document else {}), **GREEDY, **more}


def chat(server, question, document="a", turns=(), **more):
    return server.post("/v1/chat/completions", **body(question, document, turns, **more))


def content(reply):
    return reply["choices"][0]["message"]["content"]


def check_not_read(reply, document):
    """Nothing of the document was evaluated, and the reply says so."""
    n = len(document.tokens)
    assert reply["kv"]["document"]["tokens"] == n and reply["kv"]["document"]["tokens_read"] == 0
    assert reply["kv"]["tokens_reread"] == 0 and "stale" not in reply["kv"]
    assert reply["timings"]["cache_n"] >= n
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == reply["timings"]["cache_n"]
    assert reply["usage"]["prompt_tokens"] == reply["timings"]["cache_n"] + reply["timings"]["prompt_n"]


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [(), ("--kv-policy", "full"), ("--kv-budget", "20%", "--kv-archive", "off"), ("-np", "3"), ("-np", "3", "-kvu")]
)
def test_a_question_has_pythons_answer_first_and_last(start, folder, expected, options):
    document = Document(folder / "a.kv")
    answers = {question: expected("a", question) for question in QUESTIONS}
    assert len(set(answers.values())) == 3  # or nothing would be shown here
    for _ in range(2):  # after a restart, too
        with start(*options) as server:
            for question in (*QUESTIONS, QUESTIONS[0], QUESTIONS[0], QUESTIONS[2]):
                reply = chat(server, question)
                assert content(reply) == answers[question]
                check_not_read(reply, document)
                assert reply["timings"]["cache_n"] == len(document.tokens)
                assert reply["kv"]["document"]["name"] == "a" and reply["kv"]["document"]["title"] == "a.txt"
                assert reply["kv"]["entries_held"] < 0.4 * reply["kv"]["entries_full"]


@pytest.mark.parametrize("arch, types", [("gemma2", "f16"), ("lfm2", "f16"), ("llama", "q8_0"), ("llama", "q4_0")])
def test_other_models_and_caches(load, toy, start, tmp_path, arch, types):
    number = {"f16": 1, "q4_0": 2, "q8_0": 8}[types]
    kinds = {"arch": arch, "type_k": number, "type_v": number}
    document = write_document(load(**kinds), TEXTS["a"], tmp_path / "a.kv", probe=None)
    other = toy(arch, chat_template=CHATML, seed=0, n_ctx_train=4096)
    with start("-ctk", types, "-ctv", types, model=other, folder=tmp_path) as server:
        for question in (*QUESTIONS, QUESTIONS[0]):
            reply = chat(server, question)
            check_not_read(reply, document)
            assert reply["timings"]["cache_n"] == len(document.tokens)
            assert content(reply) == python_answer(load, document.path, question, **kinds)


def test_two_slots_ask_two_documents_at_the_same_time(start, expected):
    pairs = [("a", "Ada?"), ("b", "Ada?"), ("b", "May?"), ("a", "Eve?")]
    alone = [expected(*pair) for pair in pairs]
    with start("-np", "2") as server:
        for _ in range(3):
            replies = together(*(lambda p=pair: chat(server, p[1], p[0]) for pair in pairs))
            assert [content(reply) for reply in replies] == alone
            assert [reply["kv"]["document"]["name"] for reply in replies] == [name for name, _ in pairs]


def together(*calls):
    results = [None] * len(calls)

    def work(i):
        results[i] = calls[i]()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return results


def test_several_answers_to_one_question(start, expected):
    with start("-np", "3") as server:
        reply = chat(server, "Ada?", n=3)
        assert [choice["message"]["content"] for choice in reply["choices"]] == [expected("a", "Ada?")] * 3


def test_streaming(start, expected, folder):
    with start() as server:
        events = server.events("/v1/chat/completions", **body("Ada?", stream_options={"include_usage": True}))
        text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])
        assert text == expected("a", "Ada?")
        (final,) = [event for event in events if "kv" in event]
        assert final["kv"]["document"]["name"] == "a" and final["kv"]["document"]["tokens_read"] == 0
        assert final["usage"]["prompt_tokens_details"]["cached_tokens"] == len(Document(folder / "a.kv").tokens)


def test_the_openai_package(start, expected):
    import openai

    with start() as server:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="-", max_retries=0)
        ask = {"model": "any", "messages": [{"role": "user", "content": "Ada?"}], "max_tokens": N, "logit_bias": BIAS}
        reply = client.chat.completions.create(**ask, extra_body={"documents": ["a"]})
        assert reply.choices[0].message.content == expected("a", "Ada?")
        assert reply.kv["document"]["tokens_read"] == 0
        stream = client.chat.completions.create(**ask, extra_body={"documents": ["b"]}, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == expected("b", "Ada?")
        with pytest.raises(openai.BadRequestError, match="accepted: .* a, b"):
            client.chat.completions.create(**ask, extra_body={"documents": ["c"]})


def test_messages_of_parts_and_other_kinds_of_requests(start, expected):
    with start() as server:
        parts = [{"type": "text", "text": "Ada?"}]
        reply = server.post("/v1/chat/completions", messages=[{"role": "user", "content": parts}], documents=["a"], **GREEDY)
        assert content(reply) == expected("a", "Ada?")
        messages = [{"role": "user", "content": "Ada?"}]
        plain = content(chat(server, "Ada?", logit_bias={}))
        reply = server.post("/v1/messages", messages=messages, documents=["a"], max_tokens=N)  # takes no logit_bias
        assert reply["content"][0]["text"] == plain and reply["kv"]["document"]["name"] == "a"
        reply = server.post("/v1/responses", input="Ada?", documents=["a"], max_output_tokens=N, logit_bias=BIAS)
        assert reply["output"][0]["content"][0]["text"] == expected("a", "Ada?")
        n = chat(server, "Ada?")["usage"]["prompt_tokens"]
        assert server.post("/v1/chat/completions/input_tokens", messages=messages, documents=["a"])["input_tokens"] == n
        assert server.post("/v1/messages/count_tokens", messages=messages, documents=["a"])["input_tokens"] == n


@pytest.mark.parametrize("as_tokens", [False, True])
def test_a_completion_goes_on_behind_the_document(start, load, folder, expected, as_tokens):
    behind = "\n\nAda?<|im_end|>\n<|im_start|>assistant\n"
    with start() as server:
        if as_tokens:
            behind = server.post("/tokenize", content=behind)["tokens"]
        reply = server.complete(behind, n=N, documents=["a"], logit_bias=BIAS)
        assert reply["content"] == expected("a", "Ada?")
        assert reply["timings"]["cache_n"] == len(Document(folder / "a.kv").tokens)
        for wrong in ("", [], ["one", "two"], [[1], [2]]):
            assert "accepted: " in server.complete(wrong, documents=["a"]).error["message"]


# --- conversations ----------------------------------------------------------------------------------------------------


def test_a_follow_up_goes_on_with_what_is_cached(start, folder):
    """Where it contains all of that; otherwise it starts from the document again."""
    document = Document(folder / "a.kv")
    n = len(document.tokens)
    with start() as server:
        letters = {"grammar": "root ::= [a-z]+"}  # which are tokenised as they were sampled
        first = chat(server, "Ada?", **letters)
        turns = [("Ada?", content(first))]
        cached = first["usage"]["prompt_tokens"] + N - 1  # the last token is sampled, and never evaluated
        second = chat(server, "And Bob?", turns=turns, **letters)
        check_not_read(second, document)
        assert second["timings"]["cache_n"] == cached
        again = chat(server, "And Bob?", turns=turns, **letters)
        check_not_read(again, document)
        assert again["timings"]["cache_n"] == n and content(again) == content(second)
        other = chat(server, "And Eve?", turns=[("Ada?", "x")])
        check_not_read(other, document)
        assert other["timings"]["cache_n"] == n


def test_a_follow_up_has_pythons_answer(start, expected):
    turns = [("Ada?", "48"), ("and Bob?", "77")]
    with start() as server:
        assert content(chat(server, "Eve?", turns=turns)) == expected("a", "Eve?", turns)


def test_without_cache_prompt_every_question_starts_from_the_document(start, folder):
    document = Document(folder / "a.kv")
    with start() as server:
        first = chat(server, "Ada?", grammar="root ::= [a-z]+")
        reply = chat(server, "And Bob?", turns=[("Ada?", content(first))], cache_prompt=False)
        check_not_read(reply, document)
        assert reply["timings"]["cache_n"] == len(document.tokens)


def test_conversations_have_slots_of_their_own(start, folder):
    """A question that doesn't go on with a slot's conversation takes the slot that was idle the longest."""
    with start("-np", "2", "-no-kvu") as server:
        first = chat(server, "Ada?", grammar="root ::= [a-z]+")
        other = chat(server, "Bob?")
        assert other["timings"]["cache_n"] == len(Document(folder / "a.kv").tokens)
        on = chat(server, "And Bob?", turns=[("Ada?", content(first))])
        assert on["timings"]["cache_n"] == first["usage"]["prompt_tokens"] + N - 1


# --- documents and prompts that are read ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--cache-ram", "0"), ("-np", "2"), ("-np", "2", "-kvu")])
def test_prompts_of_the_same_tokens_are_not_confused(start, folder, expected, options):
    """One that is read is answered from all of it, and not from what the document holds; and the other way round."""
    document = Document(folder / "a.kv")
    ordinary = {"prompt": [*document.tokens, *b"?"], "n_predict": N, "logit_bias": BIAS, "n_probs": 3}

    def read(server):
        return server.post("/completion", **ordinary)

    with start() as server:
        alone = read(server)
    assert alone["timings"]["cache_n"] == 0 and alone["kv"]["entries_held"] == alone["kv"]["entries_full"]
    with start(*options) as server:
        assert content(chat(server, "Ada?")) == expected("a", "Ada?")
        reply = read(server)
        assert reply["timings"]["cache_n"] == 0 and "document" not in reply["kv"]
        assert reply["kv"]["entries_held"] == reply["kv"]["entries_full"] and reply["kv"]["tokens_reread"] == 0
        assert probabilities(reply) == probabilities(alone)
        for question in ("Ada?", "Eve?"):
            again = chat(server, question)
            assert content(again) == expected("a", question)
            check_not_read(again, document)
        reply = read(server)  # from a slot or the RAM cache, where there is one
        assert reply["kv"]["entries_held"] == reply["kv"]["entries_full"] and "document" not in reply["kv"]
        if "--cache-ram" not in options:
            assert reply["timings"]["prompt_n"] == 1
        asked = server.complete("\n\nAda?<|im_end|>\n<|im_start|>assistant\n", n=N, documents=["a"], logit_bias=BIAS)
        assert asked["content"] == expected("a", "Ada?") and asked["timings"]["cache_n"] == len(document.tokens)


def probabilities(reply):
    return [[(top["id"], top["logprob"]) for top in place["top_logprobs"]] for place in reply["completion_probabilities"]]


def test_the_chat_that_pastes_the_text_is_read(start, folder):
    with start() as server:
        chat(server, "Ada?")
        reply = chat(server, f"{TEXTS['a']}\n\nAda?", document=None)
        assert reply["timings"]["cache_n"] == 0 and reply["kv"]["entries_held"] == reply["kv"]["entries_full"]


def test_two_documents_of_the_same_tokens(load, own, start):
    """Of another budget: the same text, and another state."""
    small = write_document(load(KVConfig(budget="5%", min_tokens=64, archive="off")), TEXTS["a"], own / "c.kv")
    assert small.tokens == Document(own / "a.kv").tokens
    with start(folder=own) as server:
        for _ in range(2):
            held = {name: chat(server, "Ada?", name)["kv"]["entries_held"] for name in "ac"}
            assert held["c"] < 0.6 * held["a"]
        assert content(chat(server, "Ada?", "c")) == python_answer(load, own / "c.kv", "Ada?")


def test_a_document_that_was_replaced(load, own, start, expected):
    with start(folder=own) as server:
        assert content(chat(server, "Ada?")) == expected("a", "Ada?")
        os.replace(own / "b.kv", own / "a.kv")
        assert content(chat(server, "Ada?")) == expected("b", "Ada?")
        assert [listed["title"] for listed in server.get("/documents")["documents"]] == ["b.txt"]
        (own / "a.kv").unlink()
        assert "no *.kv file" in chat(server, "Ada?").error["message"]
        assert server.get("/documents").json == {"documents": [], "refused": []}


def test_a_slot_that_holds_a_document_is_not_saved(start, tmp_path):
    """It would come back as a prompt that was read."""
    with start("--slot-save-path", tmp_path) as server:
        chat(server, "Ada?")
        reply = server.post("/slots/0?action=save", filename="a.bin")
        assert reply.status == 501 and "in its file already" in reply.error["message"] and not list(tmp_path.iterdir())
        server.complete("hello", n=1)
        assert server.post("/slots/0?action=save", filename="a.bin").status == 200


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_nothing_more_is_evicted_unless_it_is_asked_for(start, folder):
    n = len(Document(folder / "a.kv").tokens)
    long = "Bob " * 200
    with start() as server:
        props = server.get("/props")["kv"]
        assert props["policy"] == "full" and props["capabilities"]["documents"]
        held = chat(server, "Ada?", max_tokens=1)["kv"]
        all_of_it = held["entries_held"] - 6 * (held["tokens_seen"] - n)  # 3 layers, 2 KV heads
        reply = chat(server, long)["kv"]
        assert reply["policy"] == "full"
        assert reply["entries_held"] == all_of_it + 6 * (reply["tokens_seen"] - n)
        reply = chat(server, long, kv={"budget": "5%"})["kv"]
        assert (reply["policy"], reply["budget"]) == ("laprox", "5%") and reply["entries_held"] < 0.3 * reply["entries_full"]
    with start("--kv-budget", "5%", "--kv-min-tokens", "64", "--kv-archive", "off") as server:
        assert chat(server, long)["kv"]["entries_held"] < 0.3 * reply["entries_full"]
        assert chat(server, long, kv={"policy": "full"})["kv"]["entries_held"] == all_of_it + 6 * (reply["tokens_seen"] - n)


def test_a_server_of_documents_takes_the_memory_that_it_needs(start, folder):
    with start("-c", "4096", "--cache-ram", "0") as server:
        before = server.slot()["kv"]["kv_bytes"]
        chat(server, "Ada?", max_tokens=1)
        asked = server.slot()["kv"]
        assert max(before, asked["kv_bytes"]) < 1.5 * asked["kv_bytes_full"] < 0.3 * 4096 * 3 * 2 * 2 * 64 * 2
        read = server.complete("Ada " * 700, n=4)["kv"]  # other prompts are held whole
        assert read["entries_held"] == read["entries_full"] > 2000 * 6


@pytest.mark.parametrize("options", [(), ("--kv-budget", "20%", "--kv-min-tokens", "64")])
def test_what_was_evicted_comes_back_from_the_file(load, start, tmp_path, options):
    reader = load(KVConfig(budget="20%", min_tokens=64, archive="ram"))
    document = write_document(reader, TEXTS["a"], tmp_path / "a.kv", archive=True)
    assert document.has_archive
    with start(*options, folder=tmp_path) as server:
        answers = []
        for question in (*QUESTIONS, QUESTIONS[0]):
            reply = chat(server, question)
            check_not_read(reply, document)
            assert reply["kv"]["policy"] == "laprox" and reply["kv"]["budget"] == "20%"
            assert reply["kv"]["entries_recalled"] > 0
            answers.append(content(reply))
            assert answers[-1] == python_answer(load, document.path, question)
        assert answers[0] == answers[-1]
        assert chat(server, "Ada?", kv={"policy": "full"})["kv"]["entries_recalled"] == 0


def test_gates(load, model, start, tmp_path):
    sidecar.write(tmp_path / "g.gguf", random_gates(3, 256, 2))
    kv = KVConfig(policy="retention", gates=tmp_path / "g.gguf", budget="20%", min_tokens=64, archive="off")
    document = write_document(load(kv), TEXTS["a"], tmp_path / "marked.kv", probe=None)
    write_document(load(), TEXTS["a"], tmp_path / "plain.kv")
    gates = ("--kv-policy", "retention", "--kv-gates", tmp_path / "g.gguf", "--kv-archive", "off")
    for options, can, why in (((), "plain", "--kv-policy retention"), (gates, "marked", "here: retention")):
        with start(*options, folder=tmp_path) as server:
            listed = server.get("/documents")
            assert [item["name"] for item in listed["documents"]] == [can]
            (refused,) = listed["refused"]
            assert why in refused["reason"]
            check_not_read(chat(server, "Ada?", can), document)
            assert why in chat(server, "Ada?", refused["name"]).error["message"]


def test_drafts_change_nothing(start, model, expected, folder):
    for options in (("-md", model, "--spec-type", "draft-simple"), ("--spec-type", "ngram-simple")):
        with start(*options) as server:
            for question in (*QUESTIONS, QUESTIONS[0]):
                reply = chat(server, question)
                assert content(reply) == expected("a", question)
                check_not_read(reply, Document(folder / "a.kv"))


# --- the list, and what is refused ------------------------------------------------------------------------------------


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


def test_without_the_option(model, folder):
    for options in ((), ("--kv-budget", "20%")):
        with Server(model, "-c", "2048", *options) as server:
            assert server.get("/documents").status == 501 and "--kv-documents" in server.get("/documents").error["message"]
            refusal = chat(server, "Ada?").error
            assert refusal["code"] == 400 and "--kv-documents" in refusal["message"]


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
