"""Documents, the server that has them, and Python's answers about them: what the tests of documents on laprox-server share."""

import shutil

import pytest
from gguf_factory import CHATML
from server import Server

from laprox import KVConfig, Llama
from laprox.read.document import Document
from laprox.read.writing import write_document

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
