"""A text that is read once: write_document, Llama.load_document and the prompts about it."""

import gc
import json
import pickle
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from document_fuzz import END, sealed, with_text
from gates_factory import random_gates
from gguf_factory import CHATML, write_lora

import laprox
from laprox import KVConfig, LaproxError, Llama
from laprox.chat.conversation import Conversation
from laprox.chat.tokens import last_logits
from laprox.gates import sidecar
from laprox.read.document import Document, is_document
from laprox.read.writing import FOR_READING, REPEAT
from laprox.read.writing import write_document as write_probed

TEXT = "the code of Ada is 48, of Bob 77, of Eve 12. <|im_end|> " * 10
KV = KVConfig(budget="20%", min_tokens=64, archive="off")
SETTINGS = dict(max_tokens=8, temperature=0.0, logit_bias={2: -100})
SHOUTED = CHATML.replace("<|im_start|>' + message['role']", "<|im_start|>!' + message['role']")


@pytest.fixture(scope="module")
def load(toy):
    def make(kv=KV, arch="llama", chat_template=CHATML, seed=0, **kwargs):
        kwargs = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "seed": 1, "verbose": False, **kwargs}
        return Llama(str(toy(arch, chat_template=chat_template, seed=seed)), kv=kv, **kwargs)

    return make


write_document = partial(write_probed, probe=None)  # what a file holds is the same with one


@pytest.fixture
def path(load, tmp_path):
    write_document(load(), TEXT, tmp_path / "a.kv", "notes.txt")
    return tmp_path / "a.kv"


def ask(llm, document, question, turns=()):
    return llm.create_completion(document.prompt(question, turns), stop=document.stop, **SETTINGS)["choices"][0]["text"]


def logits(llm, document, question):
    """Of the last token that was evaluated for an answer: what isn't told by a token or two."""
    ask(llm, document, question)
    return llm.n_tokens, last_logits(llm)


def same(one, other):
    return one[0] == other[0] and np.array_equal(one[1], other[1])


def positions(llm):
    return {layer: [llm.kv.positions(layer, head).tolist() for head in range(n)] for layer, n in llm.kv.layers.items()}


# --- questions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch, cache", [("llama", 1), ("llama", 8), ("llama", 2), ("gemma2", 1), ("lfm2", 1)])
def test_a_question_has_the_same_answer_first_and_last(load, tmp_path, arch, cache):
    types = {"type_k": cache, "type_v": cache}
    reader = load(arch=arch, **types)
    steps = []
    made = write_document(reader, TEXT, tmp_path / "a.kv", "notes.txt", progress=lambda *step: steps.append(step))
    n = len(made.tokens)
    assert steps[:2] == [("reading", 512, n), ("reading", n, n)] and steps[-1][0] == "compressing"
    held = positions(reader)
    llm = load(kv=made.kv, arch=arch, **types)
    document = llm.load_document(tmp_path / "a.kv")
    assert llm.n_tokens == n and positions(llm) == held
    stats = llm.kv.stats()
    assert stats.entries_held < 0.25 * stats.entries_full and stats.tokens_seen == n
    answers = {q: logits(llm, document, q) for q in ("Ada?", "Bob?", "Eve?")}
    assert not same(answers["Ada?"], answers["Bob?"])
    for q in ("Eve?", "Ada?", "Ada?", "Bob?"):
        assert same(logits(llm, document, q), answers[q])
    reader.kv.set(policy="full")
    assert same(logits(reader, document, "Ada?"), answers["Ada?"])  # that which read it


@pytest.mark.parametrize("arch", ["llama", "gemma2", "lfm2"])
def test_nothing_is_read_again(load, tmp_path, counted, arch):
    write_document(load(arch=arch), TEXT, tmp_path / "a.kv")
    llm = load(arch=arch)
    document = llm.load_document(tmp_path / "a.kv")
    lengths = counted(llm)
    for question in ("Ada?", "Bob?", "Ada?"):
        del lengths[:]
        ask(llm, document, question)
        assert lengths[0] == len(document.prompt(question)) - len(document.tokens) and set(lengths[1:]) == {1}
        assert llm.kv.stats().tokens_reread == 0


def test_a_follow_up_goes_on(load, path, counted):
    """With what is cached where it is all of that, from the document's state where an answer has been tokenised otherwise."""
    llm = load()
    document = llm.load_document(path)
    lengths = counted(llm)
    first = ask(llm, document, "Ada?")
    n = llm.n_tokens
    prompt = [*llm.eval_tokens, *document.prompt("Ada?", [("Ada?", "x")])[len(document.prompt("Ada?")) :]]
    del lengths[:]
    llm.create_completion(prompt, **SETTINGS)
    assert lengths[0] == len(prompt) - n and set(lengths[1:]) == {1}
    second = ask(llm, document, "and?", [("Ada?", first)])
    assert ask(llm, document, "Bob?") and ask(llm, document, "and?", [("Ada?", first)]) == second


def test_prompts_of_a_conversation_are_those_that_read_it(load, path):
    llm = load()
    document = llm.load_document(path)
    conversation = Conversation(llm._model, TEXT)
    assert document.prompt("Ada?") == conversation.prompt("Ada?")
    conversation.turns = [("Ada?", "48")]
    assert document.prompt("Bob?", [("Ada?", "48")]) == conversation.prompt("Bob?")
    assert document.tokens == document.prompt("Ada?")[: conversation.document_end()]
    assert 258 not in document.tokens[conversation.document_begin() :]  # <|im_end|> in a text is text


def test_logprobs_are_of_what_was_evaluated(load, path):
    """Those of the document's own tokens aren't known."""
    llm = load(logits_all=True)
    llm.create_completion("hello " * 80, **SETTINGS)  # leaves numbers
    document = llm.load_document(path)
    n = len(document.tokens)
    answer = llm.create_completion(document.prompt("Ada?"), logprobs=1, **SETTINGS)["choices"][0]["logprobs"]
    assert np.isfinite(answer["token_logprobs"]).all()
    assert np.isnan(llm.scores[:n]).all() and np.isfinite(llm.scores[n : llm.n_tokens]).all()


def test_other_prompts_are_read_as_ever(load, path):
    llm = load()
    document = llm.load_document(path)
    answer = ask(llm, document, "Ada?")
    fresh = load().create_completion("hello world", **SETTINGS)["choices"][0]["text"]
    assert llm.create_completion("hello world", **SETTINGS)["choices"][0]["text"] == fresh
    assert ask(llm, document, "Ada?") == answer
    llm.reset()
    assert llm.kv.stats().tokens_seen == 0 and ask(llm, document, "Ada?") == answer


def test_another_document_takes_its_place(load, path, tmp_path):
    write_document(load(), TEXT[::-1], tmp_path / "b.kv")
    llm = load()
    one = llm.load_document(path)
    answer = ask(llm, one, "Ada?")
    other = llm.load_document(tmp_path / "b.kv")
    assert other.tokens != one.tokens
    assert ask(llm, other, "Ada?") != answer
    llm.load_document(path)
    assert ask(llm, one, "Ada?") == answer


def test_a_model_without_a_chat_template(load, tmp_path):
    write_document(load(chat_template=None), TEXT, tmp_path / "a.kv")
    llm = load(chat_template=None)
    document = llm.load_document(tmp_path / "a.kv")
    assert document.stop == ["\nQuestion:"]
    assert ask(llm, document, "Ada?") == ask(llm, document, "Ada?")


# --- settings --------------------------------------------------------------------------------------------------------


def test_nothing_more_is_evicted_unless_it_is_asked_for(load, path):
    llm = load(kv=KVConfig())
    document = llm.load_document(path)
    assert llm.kv.config.policy == "full"
    llm = load(kv=KV)
    llm.load_document(path)
    assert llm.kv.config == KV
    llm = load(kv=document.kv, n_ctx=2048)
    document = llm.load_document(path)
    held = llm.kv.stats().entries_held
    llm.create_completion(document.prompt("Ada?"), **SETTINGS | {"max_tokens": 600})
    assert llm.kv.stats().entries_held == held + (llm.n_tokens - len(document.tokens)) * 6  # 3 layers, 2 KV heads


def test_the_policy_comes_back(load, path, tmp_path):
    """Where it was changed for a document, for one that has an archive, and in another process."""
    kv = KVConfig(budget="20%", min_tokens=64, archive="ram")
    write_document(load(kv=kv), TEXT, tmp_path / "b.kv", archive=True)
    llm, fresh = load(kv=KVConfig()), load(kv=KVConfig())
    llm.load_document(path)
    assert pickle.loads(pickle.dumps(llm)).kv.config == KVConfig()
    document = llm.load_document(tmp_path / "b.kv")
    assert llm.kv.config == KVConfig()
    assert ask(llm, document, "Ada?") == ask(fresh, fresh.load_document(tmp_path / "b.kv"), "Ada?")
    assert llm.kv.stats().entries_recalled == fresh.kv.stats().entries_recalled > 0
    llm.load_document(path)
    assert llm.kv.config.policy == "full"
    llm.kv.set(policy="full")  # asked for
    llm.load_document(tmp_path / "b.kv")
    assert llm.kv.config.policy == pickle.loads(pickle.dumps(llm)).kv.config.policy == "full"


def test_a_context_takes_the_memory_that_it_needs(load, path):
    """Not what llama.cpp would allocate for so many tokens."""
    llm = load(kv=Document(path).kv, n_ctx=32768)
    before = llm.kv.stats().kv_bytes
    llm.load_document(path)
    stats = llm.kv.stats()
    assert max(before, stats.kv_bytes) < 1.5 * stats.kv_bytes_full
    assert stats.kv_bytes_full < 0.05 * 32768 * 3 * 2 * 2 * 64 * 2


@pytest.mark.parametrize("default", [False, True])
def test_what_was_evicted_comes_back_from_the_file(load, tmp_path, default):
    small = write_document(load(), TEXT, tmp_path / "a.kv")
    large = write_document(load(kv=KVConfig(budget="20%", min_tokens=64, archive="ram")), TEXT, tmp_path / "b.kv", archive=True)
    assert large.has_archive and not small.has_archive and large.n_bytes > 2 * small.n_bytes
    assert (large.kv.policy, large.kv.budget) == ("laprox", "20%")
    llm = load(kv=KVConfig() if default else large.kv)
    document = llm.load_document(tmp_path / "b.kv")
    answers = [ask(llm, document, q) for q in ("Ada?", "Bob?", "Ada?")]
    assert answers[0] == answers[2] and llm.kv.stats().entries_recalled > 0
    assert write_document(load(), TEXT, tmp_path / "c.kv", archive=True).has_archive is False  # there is none


def test_what_a_document_says(load, path):
    document = Document(path)
    assert (document.path, document.title, document.text, document.n_bytes) == (path, "notes.txt", TEXT, path.stat().st_size)
    settings = document.settings
    assert settings["budget"] == "20%" and settings["policy"] == "laprox" and settings["cache_type_k"] == "f16"
    assert settings["laprox"] == laprox.__version__ and settings["model"] == load().model_path
    assert settings["full_bytes"] == len(document.tokens) * 3 * 2 * 2 * 64 * 2
    assert settings["entries_held"] < 0.25 * settings["entries_full"] == 0.25 * len(document.tokens) * 6
    assert document.fingerprint == laprox._core.model_fingerprint(load()._model.model)
    assert is_document(path) and not is_document(path.parent / "no") and not is_document(path.parent)


def test_prompts_live_as_long_as_the_llama(load, path):
    document = Document(path)
    with pytest.raises(LaproxError, match=r"a\.kv: no Llama has it loaded"):
        document.prompt("Ada?")
    llm = load()
    assert llm.load_document(document) is document and document.prompt("Ada?")
    llm.close()
    with pytest.raises(LaproxError, match="this Llama is closed"):
        document.prompt("Ada?")
    del llm
    gc.collect()
    with pytest.raises(LaproxError, match="no Llama has it loaded"):
        document.stop


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"kv": None}, "not compressed: make it with kv=KVConfig"),
        ({"type_k": 8, "type_v": 8}, r"a\.kv: type_k, type_v are \(8, 8\) here; accepted: \(1, 1\), as it was made with"),
        ({"seed": 1}, r"a\.kv: the document was made with another model \(fingerprint"),
        ({"chat_template": SHOUTED}, r"a\.kv: it was made with another chat template"),
        ({"chat_template": None}, r"a\.kv: it was made with another chat template"),
        ({"rope_freq_base": 1e6}, r"a\.kv: rope_freq_base is 1000000 here; accepted: 10000, as the document was made with"),
        ({"rope_freq_scale": 0.5}, r"a\.kv: rope_freq_scale is 0.5 here; accepted: 1, as"),
        ({"rope_scaling_type": 2, "yarn_ext_factor": 1.0}, r"a\.kv: rope_scaling_type is 2 here; accepted: 1, as"),
        ({"yarn_attn_factor": 0.5}, r"a\.kv: yarn_attn_factor is 0.5 here; accepted: 1, as"),
        ({"n_ctx": 512}, r"a\.kv: it has \d+ tokens, the context has room for 512; accepted: an n_ctx that holds a question, too"),
        ({"kv": KVConfig(), "arch": "gemma2"}, r"a\.kv: the document was made with another model"),
    ],
)
def test_what_does_not_fit(load, path, settings, reason):
    llm = load(**settings)
    llm.eval([5, 6, 7])
    with pytest.raises(LaproxError, match=reason):
        llm.load_document(path)
    assert llm._document is None
    if llm.kv_config is not None:
        assert llm.n_tokens == llm.kv.stats().tokens_seen == 0
    llm.create_completion("hello", **SETTINGS)


@pytest.mark.parametrize("settings", [{"rope_freq_base": 1e6}, {"rope_scaling_type": 2, "rope_freq_scale": 0.25}])
def test_rope_of_ones_own(load, tmp_path, settings):
    write_document(load(**settings), TEXT, tmp_path / "a.kv")
    assert load(**settings).load_document(tmp_path / "a.kv")
    with pytest.raises(LaproxError, match=r"a\.kv: rope_\w+ is \d+ here; accepted: \d+, as the document was made with"):
        load().load_document(tmp_path / "a.kv")


def test_a_document_that_does_not_tell_of_rope(load, path):
    """As the model has it."""
    data = path.read_bytes()
    path.write_bytes(sealed(data.replace(b".context.", b".setting.")[:-END]))
    assert path.read_bytes() != data and load().load_document(path)
    with pytest.raises(LaproxError, match=r"a\.kv: rope_freq_base is 1000000 here; accepted: 10000"):
        load(rope_freq_base=1e6).load_document(path)


def test_adapters(load, path, tmp_path):
    one, other = (str(write_lora(tmp_path / f"{seed}.gguf", seed=seed)) for seed in (0, 1))
    made = write_document(load(lora_path=one, lora_scale=0.5), TEXT, tmp_path / "b.kv")
    assert load(lora_path=one, lora_scale=0.5).load_document(made)
    assert load(lora_path=one, lora_scale=0.0).load_document(path)
    for settings, accepted in [({}, "those"), ({"lora_path": one}, "those"), ({"lora_path": other, "lora_scale": 0.5}, "those"), ({"lora_path": one}, "no lora_path")]:
        document = made if accepted == "those" else path
        with pytest.raises(LaproxError) as refused:
            load(**settings).load_document(document)
        given = f"{settings.get('lora_path')!r}, {settings.get('lora_scale', 1.0)}"
        assert f"kv: lora_path, lora_scale are {given} here; accepted: {accepted}" in str(refused.value)


def test_files_that_are_none(load, path, tmp_path):
    (tmp_path / "cut.kv").write_bytes(path.read_bytes()[:-100])
    (tmp_path / "text.kv").write_text("text " * 100)
    for name, reason in [("no.kv", "No such file"), ("text.kv", "not a document"), ("cut.kv", "the document is damaged"), (".", "not a file")]:
        with pytest.raises(LaproxError) as refused:
            load().load_document(tmp_path / name)
        assert str(refused.value).startswith(f"{tmp_path / name}: ") and reason in str(refused.value)


def test_a_file_that_can_not_be_opened_changes_nothing(load, path, tmp_path):
    llm = load()
    document = llm.load_document(path)
    n = llm.n_tokens
    with pytest.raises(LaproxError, match="No such file"):
        llm.load_document(tmp_path / "no.kv")
    assert llm.n_tokens == n == llm.kv.stats().tokens_seen and llm._document is document and ask(llm, document, "Ada?")


def test_paths_that_are_no_text(load, path, tmp_path):
    name = tmp_path / "caf\udce9.kv"  # a byte that is no UTF-8
    path.rename(name)
    assert load().load_document(name).path == name
    name.write_bytes(b"")
    with pytest.raises(LaproxError, match="not a document"):
        Document(name)
    with pytest.raises(ValueError, match="NUL"):
        Document("a\0b")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"policy": 5}, "policy is 5"),
        ({"cache_type_k": "q9"}, "cache_type_k is 'q9'; accepted: f32, f16"),
        ({"archive": "yes"}, "archive is 'yes'"),
        ({"model": None}, "model is None"),
        ({"full_bytes": 10**400}, "full_bytes is no number of bytes"),
        ([], "no object"),
        (None, "Expecting property name"),
    ],
)
def test_forged_settings(path, change, reason):
    """With the checksum made right again."""
    settings = Document(path).settings
    forged = "{" if change is None else json.dumps(settings | change if change else change)
    path.write_bytes(with_text(path.read_bytes(), json.dumps(settings).encode(), forged.encode()))
    with pytest.raises(LaproxError) as refused:
        Document(path)
    assert str(refused.value).startswith(f"{path}: its settings can't be read: ") and reason in str(refused.value)


@pytest.mark.parametrize("archive", [False, True])
def test_gates(load, tmp_path, archive):
    """They mark entries, so a context that has none can't hold these."""
    sidecar.write(tmp_path / "g.gguf", random_gates(3, 256, 2))
    settings = {"policy": "retention", "gates": tmp_path / "g.gguf", "budget": "20%", "min_tokens": 64}
    made = write_document(load(kv=KVConfig(archive="ram", **settings)), TEXT, tmp_path / "a.kv", archive=archive)
    with pytest.raises(LaproxError, match="a mark by gates is 1 there and 0 here"):
        load(kv=KVConfig(policy="full")).load_document(made)
    llm = load(kv=replace(made.kv, gates=tmp_path / "g.gguf"))
    document = llm.load_document(made)
    held = llm.kv.stats().entries_held
    assert held < 0.25 * llm.kv.stats().entries_full
    assert same(logits(llm, document, "Ada?"), logits(llm, document, "Ada?"))
    if not archive:
        assert llm.kv.stats().entries_held == held + (llm.n_tokens - len(document.tokens)) * 6


def test_a_policy_of_ones_own(load, tmp_path):
    class Last(laprox.Policy):
        def score(self, head):
            return head.positions

    made = write_document(load(kv=KVConfig(policy=Last(), budget="20%", min_tokens=64, archive="ram")), TEXT, tmp_path / "a.kv")
    assert made.settings["policy"] == "custom:global" and made.kv.policy == "full"
    llm = load(kv=made.kv)
    assert ask(llm, llm.load_document(tmp_path / "a.kv"), "Ada?")


def test_what_can_not_be_written(load, tmp_path):
    llm = load()
    with pytest.raises(ValueError, match="no text to read"):
        write_document(llm, "", tmp_path / "a.kv")
    with pytest.raises(ValueError, match="exceed context window of 1024"):
        write_document(llm, TEXT * 3, tmp_path / "a.kv")
    with pytest.raises(ValueError, match="broken"):
        write_document(llm, TEXT, tmp_path / "a.kv", template="{% if %}")
    with pytest.raises(LaproxError, match="not compressed"):
        write_document(load(kv=None), TEXT, tmp_path / "a.kv")
    llm.reset()
    for text, output, title, reason in [
        (TEXT, "no/a.kv", "", "no/a.kv can't be written: No such file"),
        (TEXT, ".", "", "can't be written: it is a folder"),
        (TEXT, "a\0.kv", "", "can't be written: it has a NUL character"),
        (TEXT + "\0", "a.kv", "", f"the text has the character '.x00' at {len(TEXT)}; accepted: what UTF-8 can hold, without NUL"),
        ("\ud800" + TEXT, "a.kv", "", r"the text has the character '.ud800' at 0; accepted: what UTF-8 can hold, without NUL"),
        (TEXT, "a.kv", "a\0", r"the title has the character '.x00' at 1"),
    ]:
        with pytest.raises(ValueError, match=reason):
            write_document(llm, text, tmp_path / output, title)
        assert llm.n_tokens == 0  # nothing was read
    assert not list(tmp_path.iterdir())


# --- probes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gemma2", "lfm2"])
@pytest.mark.parametrize("probe", [REPEAT, ["Ada?", "And Bob?"]])
def test_a_probe_decides_what_a_document_holds(load, tmp_path, probe, arch):
    """And says so, and every question starts from its values and biases as from those that were never written."""
    kv = replace(FOR_READING, budget="20%", min_tokens=64)
    steps = []
    made = write_probed(load(kv=kv, arch=arch, n_ctx=1280), TEXT, tmp_path / "a.kv", probe=probe, progress=lambda *step: steps.append(step))
    assert list(dict.fromkeys(what for what, _, _ in steps)) == ["reading", "probing", "compressing"]
    assert all(0 <= done <= total for _, done, total in steps) and steps[-1] == ("compressing", 1, 1)
    assert max(done for what, done, _ in steps if what == "probing") == next(total for what, _, total in steps if what == "probing")
    assert made.settings["probe"] == probe and made.settings["refit"] is True
    others = [write_probed(load(kv=kv, arch=arch), TEXT, tmp_path / "b.kv", probe=None), write_probed(load(kv=kv, arch=arch, n_ctx=1280), TEXT, tmp_path / "c.kv", probe=probe, refit=False)]
    assert [(d.settings["probe"], d.settings["refit"]) for d in others] == [(None, False), (probe, False)]

    answers = []
    for document in (made, *others):
        llm = load(kv=document.kv, arch=arch)
        loaded = llm.load_document(document)
        answers.append(logits(llm, loaded, "Bob?")[1])
        assert np.array_equal(logits(llm, loaded, "Bob?")[1], answers[-1])
    assert not np.allclose(answers[0], answers[1], atol=1e-3) and not np.allclose(answers[0], answers[2], atol=1e-4)


def test_probes_that_are_none(load, tmp_path):
    kv = replace(FOR_READING, budget="20%", min_tokens=64)
    for llm, probe, error, reason in [
        (load(kv=kv), "repeated", ValueError, "probe is 'repeated'; accepted: 'repeat', a list of questions, or None"),
        (load(kv=kv), [], ValueError, "no question to probe with"),
        (load(kv=kv, n_ctx=768), REPEAT, ValueError, "takes a context of .* with its probe, and has 768"),
        (load(kv=KVConfig(policy="keydiff", archive="off")), REPEAT, LaproxError, "policy keydiff doesn't score by queries"),
    ]:
        with pytest.raises(error, match=reason):
            write_probed(llm, TEXT, tmp_path / "a.kv", probe=probe)
        assert not (tmp_path / "a.kv").exists() and llm.n_tokens == 0
