"""A compressed cache goes on with the prompt it was compressed for, and reads any other again."""

import pickle

import llama_cpp  # noqa: E402
import numpy as np
import pytest
from gguf_factory import CHATML

from laprox import KVConfig, Llama  # before llama_cpp, which finds its libraries through it

KV = KVConfig(budget="10%", min_tokens=64, archive="off")
DOCUMENT = "the code of Ada is 48, of Bob 77, of Eve 12. " * 12
SETTINGS = dict(max_tokens=6, temperature=0.0, logit_bias={2: -100})


@pytest.fixture(scope="module")
def load(toy):
    def make(kv=KV, arch="llama", **kwargs):
        kwargs = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "seed": 1, "verbose": False, **kwargs}
        return Llama(str(toy(arch, chat_template=CHATML)), kv=kv, **kwargs)

    return make


def ask(llm, *said):
    """The answer to the last of what user and assistant said in turn, the document before it, in one stateless call."""
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": text}
        for i, text in enumerate((DOCUMENT + said[0], *said[1:]))
    ]
    return llm.create_chat_completion(messages, **SETTINGS)["choices"][0]["message"]["content"]


def positions(llm):
    return {layer: [llm.kv.positions(layer, head).tolist() for head in range(n)] for layer, n in llm.kv.layers.items()}


@pytest.mark.parametrize("arch", ["llama", "gemma2", "lfm2"])
def test_another_question_is_answered_as_if_it_were_the_first(load, arch):
    llm = load(arch=arch)
    for question in ("Ada?", "Bob?", "Eve?", "Ada?"):  # they differ within the last `recent` tokens
        fresh = load(arch=arch)
        assert ask(llm, question) == ask(fresh, question)
        assert positions(llm) == positions(fresh)


def test_what_is_read_again_is_counted(load):
    llm = load()
    ask(llm, "Ada?")
    assert llm.kv.stats().tokens_reread == 0
    ask(llm, "Bob?")
    stats = llm.kv.stats()
    assert (
        len(DOCUMENT) < stats.tokens_reread < stats.tokens_seen and stats.compressions == 1
    )  # a character is a token here
    ask(llm, "Bob?")
    assert llm.kv.stats().tokens_reread == 0
    llm.reset()
    ask(llm, "Eve?")
    assert llm.kv.stats().tokens_reread == 0


def test_a_follow_up_reads_nothing_again(load):
    llm = load()
    answer = ask(llm, "Ada?")
    n, held = llm.n_tokens, positions(llm)
    ask(llm, "Ada?", answer, "and?")
    stats = llm.kv.stats()
    assert stats.tokens_reread == 0 and stats.compressions == 1 and llm.n_tokens > n
    for layer, heads in positions(llm).items():
        for head, now in enumerate(heads):
            prompt = [p for p in held[layer][head] if p < n - 6]
            assert now[: len(prompt)] == prompt


def test_the_prompt_of_another_conversation_is_read_again(load):
    llm = load()
    answer = ask(llm, "Ada?")
    ask(llm, "Ada?", answer, "and? " * 30)  # long enough to compress again, for this question
    assert llm.kv.stats().compressions == 2
    assert ask(llm, "Ada?") == answer
    assert llm.kv.stats().tokens_reread > len(DOCUMENT)


def test_text_that_merges_with_the_last_token_is_the_same_prompt(load):
    llm = load()
    document, word = llm.tokenize(DOCUMENT.encode()), 356  # the first word of the vocabulary, " w0"
    prompt, longer, other = (
        [*document, *last]
        for last in ([261, 262 + ord("w") - 33, 262 + ord("1") - 33], [word + 12, 300], [word + 2, 300])
    )
    assert llm.detokenize(longer).startswith(llm.detokenize(prompt))
    next(llm.generate(prompt, temp=0.0))
    next(llm.generate(longer, temp=0.0))
    assert llm.kv.stats().tokens_reread == 0 and llm.kv.stats().compressions == 1
    llm.reset()
    next(llm.generate(prompt, temp=0.0))
    next(llm.generate(other, temp=0.0))
    assert llm.kv.stats().tokens_reread == len(document)


def test_an_uncompressed_cache_is_reused_as_ever(load):
    llm = load(KVConfig(budget="100%", min_tokens=64))
    ask(llm, "Ada?")
    ask(llm, "Bob?")
    assert llm.kv.stats().tokens_reread == 0
    short = load(KVConfig(budget="10%", min_tokens=1000))
    ask(short, "Ada?")
    ask(short, "Bob?")
    assert short.kv.stats().tokens_reread == 0


def test_documents_compressed_before_any_question(load):
    """What a user compresses with kv.compress() is reused for whatever follows it."""
    llm = load()
    document = llm.tokenize(DOCUMENT.encode())
    llm.eval(document)
    llm.kv.compress()
    for question in ("Ada?", "Bob?"):
        next(llm.generate([*document, *llm.tokenize(question.encode(), add_bos=False)], temp=0.0))
        assert llm.kv.stats().tokens_reread == 0 and llm.kv.stats().compressions == 1
    next(llm.generate(document[:-1], temp=0.0))
    assert llm.kv.stats().tokens_reread == len(document) - 1


def test_n_tokens_taken_back_into_the_question(load):
    llm = load()
    prompt = llm.tokenize((DOCUMENT + "Ada?").encode())
    next(llm.generate(prompt, temp=0.0))
    llm.n_tokens = len(prompt) - 5
    llm.eval(prompt[-5:])  # the same again
    assert llm.kv.stats().tokens_reread == 0 and llm.kv.stats().compressions == 1
    llm.n_tokens = len(prompt) - 5
    llm.eval(llm.tokenize(b"Bob?", add_bos=False))
    assert llm.kv.stats().tokens_reread == len(prompt) - 5
    assert llm.kv.stats().entries_held == llm.kv.stats().entries_full


def test_drafts_that_are_taken_back_reread_nothing(load):
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    prompt = load().tokenize(DOCUMENT.encode())
    kv = KVConfig(budget="10%", min_tokens=64, prefill="chunked")
    llm = load(kv, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=8), n_batch=64, n_ubatch=64, n_ctx=768)
    tokens = llm.generate(prompt, temp=0.0)
    for _ in range(150):  # long enough to compress on its own
        next(tokens)
    assert llm.kv.stats().tokens_reread == 0


# --- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [llama_cpp.LlamaRAMCache, llama_cpp.LlamaDiskCache])
def test_caches_answer_the_question_that_was_asked(load, tmp_path, cache):
    llm = load()
    llm.set_cache(cache() if cache is llama_cpp.LlamaRAMCache else cache(str(tmp_path)))
    prompts = [llm.tokenize((DOCUMENT + question).encode()) for question in ("Ada?", "Bob?", "Eve?")]
    fresh = {}
    for prompt in prompts:
        alone = load()
        fresh[tuple(prompt)] = alone.create_completion(prompt, **SETTINGS)["choices"][0]["text"]
    for prompt in [*prompts, *prompts]:
        other = llm.tokenize(b"something else entirely")
        llm.create_completion(other, **SETTINGS)
        answer = llm.create_completion(prompt, **SETTINGS)["choices"][0]["text"]
        if llm.kv.stats().tokens_reread:  # the same question again goes on from what is held
            assert answer == fresh[tuple(prompt)]
    assert llm.create_completion(llm.tokenize((DOCUMENT + "Zoe?").encode()), **SETTINGS)
    assert llm.kv.stats().tokens_reread > len(DOCUMENT) / 2


@pytest.mark.parametrize("remade", [lambda state: state, lambda state: pickle.loads(pickle.dumps(state))])
def test_a_state_knows_what_it_was_compressed_for(load, remade):
    llm, other = load(), load()
    answer = ask(llm, "Ada?")
    state = remade(llm.save_state())
    other.load_state(state)
    assert ask(other, "Bob?") == ask(load(), "Bob?")
    assert other.kv.stats().tokens_reread > len(DOCUMENT)
    other.load_state(state)
    ask(other, "Ada?", answer, "and?")
    assert other.kv.stats().tokens_reread == 0


@pytest.mark.parametrize("kv", [KV, None])
def test_all_of_a_context_that_was_rounded_up(load, rng, kv):
    llm = load(kv, n_ctx=1000)
    assert llm.n_ctx() == 1024
    prompt = [1, *rng.integers(262, 512, 1020).tolist()]
    assert llm.create_completion(prompt, max_tokens=None, temperature=0.0)["usage"]["total_tokens"] > 1021
    with pytest.raises(ValueError, match="exceed context window of 1024"):
        llm.create_completion([*prompt, *prompt[:3]])


@pytest.mark.parametrize("kv", [KV, None])
def test_drafts_without_logits_all(load, rng, kv):
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    prompt = [1, *rng.integers(262, 512, 20).tolist() * 10]
    settings = dict(n_batch=64, n_ubatch=64)
    drafted = load(kv, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=8), **settings)
    assert (
        drafted.create_completion(prompt, **SETTINGS)["choices"][0]["text"]
        == load(kv, **settings).create_completion(prompt, **SETTINGS)["choices"][0]["text"]
    )


@pytest.mark.parametrize("kv", [KV, None])
@pytest.mark.parametrize(
    "saver, loader",
    [({"n_batch": 512}, {"n_batch": 32}), ({"n_batch": 32}, {}), ({"n_ctx": 768}, {}), ({}, {"n_ctx": 768})],
)
def test_states_between_contexts_of_other_sizes(load, rng, kv, saver, loader):
    prompt = [1, *rng.integers(262, 512, 600).tolist()]
    one, other = load(kv, **saver), load(kv, **loader)
    next(one.generate(prompt, temp=0.0))
    other.load_state(one.save_state())
    assert len(other.input_ids) == other.n_ctx()
    more = [*prompt, *rng.integers(262, 512, 100).tolist()]
    tokens = [token for token, _ in zip(other.generate(more, temp=0.0), range(4))]
    assert tokens == [token for token, _ in zip(one.generate(more, temp=0.0), range(4))]


@pytest.mark.parametrize("kv", [KV, None])
def test_a_state_longer_than_the_context(load, rng, kv):
    one, other = load(kv), load(kv, n_ctx=512)
    next(one.generate([1, *rng.integers(262, 512, 599).tolist()], temp=0.0))
    next(other.generate([1, 300], temp=0.0))
    with pytest.raises(RuntimeError, match="the saved state has 600 tokens, the context has room for 512"):
        other.load_state(one.save_state())
    assert other.n_tokens == 2 and np.array_equal(other.input_ids[:2], [1, 300])
