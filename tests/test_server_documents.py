"""laprox-server: questions about documents that `laprox read` wrote. Every one is answered from the document's state, as Python's
Llama.load_document answers it, and nothing of the document is evaluated."""

# ruff: noqa: F811 - fixtures are imported

import os

import pytest
from gates_factory import random_gates
from gguf_factory import CHATML
from served_documents import (  # noqa: F401
    BIAS,
    GREEDY,
    KV,
    QUESTIONS,
    TEXTS,
    N,
    body,
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
from server import PROGRAM, together

from laprox import KVConfig
from laprox.gates import sidecar
from laprox.read.document import Document
from laprox.read.writing import write_document

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="built without the server (scripts/build --server)")


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


@pytest.mark.parametrize("unified", ["-no-kvu", "-kvu"])
def test_conversations_have_slots_of_their_own(start, folder, unified):
    """A question that doesn't go on with a slot's conversation takes the slot that was idle the longest."""
    with start("-np", "2", unified) as server:
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
