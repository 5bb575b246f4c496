"""Ctrl-C comes out of whatever it interrupts, and what is cached then is what is counted."""

import contextlib
import ctypes
import signal

import llama_cpp
import pytest
from llama_cpp._logger import llama_log_callback

import laprox
from laprox import KVConfig, _core
from laprox.read.document import Document
from laprox.read.writing import write_document

KV = KVConfig(budget="20%", min_tokens=64)
DOCUMENT = "the code of Ada is 48, of Bob 77, of Eve 12. " * 12
SETTINGS = dict(max_tokens=6, temperature=0.0, logit_bias={2: -100})


@pytest.fixture(autouse=True)
def _by_default():
    """Other tests take the log; and Ctrl-C is ignored in background jobs, and that is inherited."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    llama_cpp.llama_log_set(llama_log_callback, ctypes.c_void_p(0))
    yield
    llama_cpp.llama_log_set(llama_log_callback, ctypes.c_void_p(0))
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def load(chatting):
    return lambda kv=KV, **kwargs: chatting(kv, **kwargs)


@contextlib.contextmanager
def pressed_meanwhile(llm):
    """In here, Ctrl-C comes whenever the engine computes, and with it KeyboardInterrupt out of the call."""
    press = ctypes.cast(ctypes.pythonapi.PyErr_SetInterruptEx, llama_cpp.ggml_abort_callback)  # returns 0: go on
    llama_cpp.llama_set_abort_callback(llm.ctx, press, ctypes.c_void_p(signal.SIGINT))
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        llama_cpp.llama_set_abort_callback(llm.ctx, llama_cpp.ggml_abort_callback(), ctypes.c_void_p(0))


def ask(llm, question):
    messages = [{"role": "user", "content": DOCUMENT + question}]
    return llm.create_chat_completion(messages, **SETTINGS)["choices"][0]["message"]["content"]


@pytest.fixture
def asked(load):
    llm = load()
    ask(llm, "Ada?")
    return llm


@pytest.mark.parametrize("verbose", [False, True])
def test_in_the_engine(load, capsys, verbose):
    llm = load(verbose=verbose)
    llm.eval(llm.tokenize(DOCUMENT.encode()))
    capsys.readouterr()
    with pressed_meanwhile(llm):
        llm.kv.compress()
    assert llm.kv.stats().compressions == 1
    assert ("kept" in capsys.readouterr().err) == verbose  # the log isn't lost
    with pressed_meanwhile(llm):
        llm.kv.scores()


def test_in_llama_cpp(load, monkeypatch):
    """Which compresses by itself, and tells of it through Python, where Ctrl-C would be lost: only when all is done."""
    llm = load(KVConfig(budget="10%", min_tokens=32, prefill="chunked"), n_ctx=2048, n_batch=64, n_ubatch=32)
    tokens = llm.tokenize(DOCUMENT.encode()) * 2
    llm.eval(tokens[:512])
    done, decode = [], llm._ctx.decode
    log = llama_cpp.llama_log_callback(lambda level, text, data: done.append(text) if b"kept" in text else None)
    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    monkeypatch.setattr(llm._ctx, "decode", lambda batch: (decode(batch), done.append("decoded")))
    llm.eval(tokens[512:576])
    decoded, kept = done
    assert decoded == "decoded" and b"kept" in kept


def test_before_a_policy_can_catch_it(load, monkeypatch):
    class Last(laprox.Policy):
        def score(self, head):
            return head.positions

    def interrupted(*args):
        raise KeyboardInterrupt

    llm = load(KVConfig(policy=Last(), budget="20%", min_tokens=64))
    llm.eval(llm.tokenize(DOCUMENT.encode()))
    with monkeypatch.context() as patched:
        patched.setattr(laprox.policy.Scorer, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.kv.compress()
    assert llm.kv.stats().compressions == 0
    llm.kv.compress()
    assert llm.kv.stats().compressions == 1


@pytest.mark.parametrize("go_on", ["eval", "save_state"])
def test_what_was_taken_back_is_not_counted(asked, monkeypatch, go_on):
    """Ctrl-C on the return of the call that cut the turn off."""
    prompt_done = _core.prompt_done

    def pressed(*args):
        monkeypatch.undo()
        if prompt_done(*args) is None:
            pytest.fail("nothing was taken back")
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(_core, "prompt_done", pressed)
    with pytest.raises(KeyboardInterrupt):
        ask(asked, "Bob?")
    if go_on == "eval":
        asked.eval([300])
    else:
        state = asked.save_state()
        assert state.n_tokens == asked.kv.stats().tokens_seen
        asked.load_state(state)
    assert ask(asked, "Bob?")
    assert asked.n_tokens == asked.kv.stats().tokens_seen


def test_while_a_document_is_resumed(load, tmp_path, monkeypatch):
    """Then what was cached isn't, and the document isn't counted yet."""
    write_document(load(), DOCUMENT, tmp_path / "a.kv", probe=None)
    llm = load()
    document = llm.load_document(tmp_path / "a.kv")
    answer = llm.create_completion(document.prompt("Ada?"), **SETTINGS)["choices"][0]["text"]
    other = llm.tokenize(b"hello world")
    expected = llm.create_completion(other, **SETTINGS)["choices"][0]["text"]
    load_it = Document.load
    monkeypatch.setattr(Document, "load", lambda *args: (load_it(*args), signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        llm.create_completion(document.prompt("Ada?"), **SETTINGS)
    monkeypatch.undo()
    assert llm.n_tokens == 0
    assert llm.create_completion(other, **SETTINGS)["choices"][0]["text"] == expected
    assert llm.create_completion(document.prompt("Ada?"), **SETTINGS)["choices"][0]["text"] == answer


@pytest.mark.parametrize("kv", [KV, None])
def test_while_a_state_is_loaded(load, monkeypatch, kv):
    llm = load(kv)
    expected = llm.create_completion("hello world", **SETTINGS)["choices"][0]["text"]
    state = llm.save_state()
    llm.create_completion("something else", **SETTINGS)
    with monkeypatch.context() as patched:
        patched.setattr(llama_cpp.llama_cpp, "llama_state_set_data", lambda *args: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            llm.load_state(state)
    assert llm.n_tokens == 0
    assert llm.create_completion("hello world", **SETTINGS)["choices"][0]["text"] == expected
