"""The probe that repeats a text: what is evaluated behind it, and what becomes of the text."""

from pathlib import Path

import numpy as np
import pytest
from gguf_factory import CHATML

from laprox import KVConfig, LaproxError, Llama, _core  # before llama_cpp, which finds its libraries through it
from laprox.chat.conversation import Conversation
from laprox.chat.loading import load_vocabulary
from laprox.chat.tokens import last_logits, read
from laprox.read.probe import FIRST, RECALLED, asking, look, repeating

DOCUMENT = "the code of Ada is 48, of Bob 77, of Eve 12. " * 10  # a character is a token
KV = KVConfig(policy="kvzip", budget="20%", min_tokens=0, window=64, recent=8, archive="off")


@pytest.fixture
def load(toy):
    def make(kv=KV, arch="llama", **kwargs):
        kwargs = {"n_ctx": 1536, "n_threads": 1, "n_threads_batch": 1, "seed": 1, "verbose": False, **kwargs}
        return Llama(str(toy(arch, chat_template=CHATML)), kv=kv, **kwargs)

    return make


@pytest.fixture
def vocabulary(toy):
    return load_vocabulary(Path(toy(chat_template=CHATML)))


def read_text(llm, probe, conversation):
    for _ in read(llm, conversation.prompt("?")[: probe.n_text]):
        pass


@pytest.mark.parametrize("size", [1, 100, 200, 5000])
def test_every_token_of_the_documents_is_repeated_once(vocabulary, size):
    conversation = Conversation(vocabulary, DOCUMENT)
    probe = repeating(conversation, size=size)
    begin, end = conversation.document_begin(), conversation.document_end()
    assert (probe.n_prefix, probe.n_text) == (begin, end)
    text = conversation.prompt("?")[:end]
    assert [i for part in probe.parts for i in range(part.first, part.last)] == list(range(begin, end))
    assert len(probe.parts) == -(-(end - begin) // size)
    for i, part in enumerate(probe.parts):
        n = part.last - part.first
        assert 0 < n <= size and part.tokens[-n:] == text[part.first : part.last]
        asked = conversation.text_of(part.tokens[:-n])
        assert (FIRST in asked) == (i == 0)
        if i > 0:
            assert conversation.text_of(text[part.first - RECALLED : part.first]).strip() in asked
    assert probe.context == end + max(len(part.tokens) for part in probe.parts)


def test_more_than_the_documents_may_be_cached(vocabulary):
    """What all prompts have in common goes on behind them."""
    conversation = Conversation(vocabulary, DOCUMENT)
    n = conversation.document_end() + 1
    probe = repeating(conversation, n)
    assert probe.n_text == probe.parts[-1].last == n
    prompt = conversation.prompt(FIRST)
    assert [*prompt[:n], *probe.parts[0].tokens[: len(prompt) - n]] == prompt


def test_without_documents_there_is_nothing_to_repeat(vocabulary):
    empty, some = (Conversation(vocabulary, text) for text in ("", DOCUMENT))
    with pytest.raises(ValueError, match="no document to repeat"):
        repeating(empty)
    with pytest.raises(ValueError, match="no document to ask about"):
        asking(empty, ["Ada?"])
    with pytest.raises(ValueError, match="no question to probe with"):
        asking(some, [])


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("policy", ["kvzip", "laprox", "snapkv:ada"])
def test_a_probe_decides_and_is_gone(load, policy, refit):
    """The text stays as it was; what is kept is what the probe looked at, and not what its own end did."""
    llm = load(KV if policy == "kvzip" else KVConfig(policy=policy, budget="20%", min_tokens=0, window=64, recent=8, archive="off"))
    conversation = Conversation(llm._model, DOCUMENT)
    probe = repeating(conversation, size=200)
    read_text(llm, probe, conversation)
    state = llm.save_state()
    llm.kv.compress()
    by_end = llm.kv.held()
    llm.load_state(state)
    seen = []
    look(llm, probe, refit, seen.append)
    assert sum(seen) == probe.tokens and llm.n_tokens == probe.n_text
    assert llm.kv.stats().tokens_seen == probe.n_text and llm.kv.stats().entries_held == llm.kv.stats().entries_full
    llm.kv.compress()
    by_probe = llm.kv.held()
    assert sum(held.sum() for held in by_probe.values()) == sum(held.sum() for held in by_end.values())
    assert any(not np.array_equal(by_probe[layer], by_end[layer]) for layer in by_end)
    llm.eval(conversation.prompt("Ada?")[probe.n_text :])


def test_only_a_share_of_it_may_look(load, monkeypatch):
    """Every token is evaluated, and every fourth scores; where all do, nothing is left out."""
    held, strides = {}, []
    for share in (1.0, 0.25):
        llm = load()
        conversation = Conversation(llm._model, DOCUMENT)
        probe = repeating(conversation)
        read_text(llm, probe, conversation)
        told, seen = _core.probe, []
        monkeypatch.setattr(_core, "probe", lambda *args, told=told: strides.append(args[-1]) or told(*args))
        look(llm, probe, False, seen.append, share)
        monkeypatch.setattr(_core, "probe", told)
        assert sum(seen) == probe.tokens
        llm.kv.compress()
        held[share] = llm.kv.held()
    assert set(strides) == {1, 4}
    assert any(not np.array_equal(held[1.0][layer], held[0.25][layer]) for layer in held[1.0])
    for share in (0, -0.5, 1.5, 1e-9, float("nan")):
        with pytest.raises(ValueError, match=f"share is {share}; accepted: from 0.00048828125 to 1"):
            look(llm, probe, share=share)


def test_questions_of_ones_own(load):
    llm = load()
    conversation = Conversation(llm._model, DOCUMENT)
    probe = asking(conversation, ["Ada?", "And Bob?"])
    assert [(part.first, part.last) for part in probe.parts] == [(probe.n_prefix, probe.n_text)] * 2
    for part, question in zip(probe.parts, ("Ada?", "And Bob?")):
        assert conversation.prompt(question)[probe.n_text :] == part.tokens
    read_text(llm, probe, conversation)
    look(llm, probe)
    llm.kv.compress()
    assert llm.kv.stats().entries_held < llm.kv.stats().entries_full


def test_refusals(load):
    llm = load(n_ctx=640)
    conversation = Conversation(llm._model, DOCUMENT)
    probe = repeating(conversation)
    with pytest.raises(LaproxError, match=f"a text of {probe.n_text} tokens, but 0 are cached"):
        look(llm, probe)
    read_text(llm, probe, conversation)
    with pytest.raises(ValueError, match="exceed context window of 640|exceed context window of 768"):
        look(llm, probe)
    keydiff = load(KVConfig(policy="keydiff", budget="20%"))
    read_text(keydiff, probe, conversation)
    with pytest.raises(LaproxError, match="policy keydiff doesn't score by queries"):
        look(keydiff, probe)


@pytest.mark.parametrize("arch, shape, options", [("gemma2", {"swa": 16}, {}), ("gemma2", {"swa": 16}, {"swa_full": False}), ("lfm2", {}, {})])
def test_layers_that_are_not_compressed_go_back(toy, arch, shape, options):
    """What follows the text is as if there had been no probe, of which there are several parts."""
    path = str(toy(arch, chat_template=CHATML, **shape))
    llm = Llama(path, kv=KV, n_ctx=1536, n_batch=64, n_ubatch=64, n_threads=1, n_threads_batch=1, verbose=False, **options)
    conversation = Conversation(llm._model, DOCUMENT)
    probe = repeating(conversation)
    logits = []
    for probes in (False, True):
        read_text(llm, probe, conversation)
        if probes:
            look(llm, probe)
        llm.eval(conversation.prompt("Ada?")[probe.n_text :])
        logits.append(last_logits(llm))
    assert np.array_equal(*logits)
