"""What a user of laprox.Llama gets wrong is said, and neither crashes Python nor changes what comes next."""

import multiprocessing
import subprocess
import sys
import textwrap
from dataclasses import replace

import llama_cpp  # noqa: E402
import pytest
from llama_cpp import LlamaGrammar  # noqa: E402

from laprox import KVConfig, LaproxError  # before llama_cpp, which finds its libraries through it

KV = KVConfig(budget="10%", min_tokens=64)


@pytest.fixture(scope="module")
def load(chatting):
    return lambda kv=KV, **kwargs: chatting(kv, **kwargs)


@pytest.fixture
def prompt(rng):
    return [1, *rng.integers(262, 512, 600).tolist()]


# --- after close() ---------------------------------------------------------------------------------------------------

USES = {
    "eval": lambda llm: llm.eval([1, 300]),
    "generate": lambda llm: next(llm.generate([1, 300])),
    "completion": lambda llm: llm.create_completion("abc", max_tokens=1),
    "streamed": lambda llm: next(iter(llm.create_completion("abc", max_tokens=1, stream=True))),
    "chat": lambda llm: llm.create_chat_completion([{"role": "user", "content": "abc"}], max_tokens=1),
    "call": lambda llm: llm("abc", max_tokens=1),
    "sample": lambda llm: llm.sample(),
    "embed": lambda llm: llm.embed("abc"),
    "tokenize": lambda llm: llm.tokenize(b"abc"),
    "detokenize": lambda llm: llm.detokenize([300]),
    "tokenizer": lambda llm: llm.tokenizer().encode("abc"),
    "save_state": lambda llm: llm.save_state(),
    "n_ctx": lambda llm: llm.n_ctx(),
    "n_embd": lambda llm: llm.n_embd(),
    "n_vocab": lambda llm: llm.n_vocab(),
    "token_eos": lambda llm: llm.token_eos(),
    "token_bos": lambda llm: llm.token_bos(),
    "token_nl": lambda llm: llm.token_nl(),
    "pooling_type": lambda llm: llm.pooling_type(),
    "ctx": lambda llm: llm.ctx,
    "model": lambda llm: llm.model,
}
KV_USES = {
    "stats": lambda llm: llm.kv.stats(),
    "layers": lambda llm: llm.kv.layers,
    "positions": lambda llm: llm.kv.positions(0, 0),
    "held": lambda llm: llm.kv.held(),
    "scores": lambda llm: llm.kv.scores(),
    "compress": lambda llm: llm.kv.compress(),
    "set": lambda llm: llm.kv.set(budget="20%"),
}


@pytest.mark.parametrize("kv", [KV, None])
def test_a_closed_llama_says_so(load, kv):
    """All in one, since a crash would end them all."""
    llm = load(kv)
    llm.eval([1, 300, 301])
    state, running = llm.save_state(), llm.generate([1, 300, 301, 302])
    next(running)
    llm.close()
    uses = {
        **USES,
        **(KV_USES if kv else {}),
        "load_state": lambda llm: llm.load_state(state),
        "go on": lambda _: next(running),
    }
    for name, use in uses.items():
        with pytest.raises(LaproxError, match="^this Llama is closed$"):
            use(llm)
            pytest.fail(name)
    llm.reset()
    llm.close()


def test_what_is_kept_of_a_closed_llama(load):
    llm = load()
    llm.close()
    assert llm.kv_config == KV and llm.metadata["general.name"] == "toy"


# --- generate() that fails -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, error",
    [
        ({"grammar": LlamaGrammar.from_string("root ::= (", verbose=False)}, ValueError),
        ({"top_k": "many"}, Exception),
        ({"topk": 5}, TypeError),
    ],
)
def test_a_failed_generate_leaves_everything_as_it_was(load, prompt, wrong, error):
    llm = load(replace(KV, archive="off"))
    with pytest.raises(error):
        next(llm.generate(prompt, temp=0.5, **wrong))
    llm.eval(prompt)
    stats = llm.kv.stats()
    assert stats.compressions == 0 and stats.entries_held == stats.entries_full
    llm.reset()
    next(llm.generate(prompt))
    before = llm.kv.stats()
    assert before.compressions == 1
    with pytest.raises(error):  # another prompt, for which the cache would be read again
        next(llm.generate([*prompt[:300], 300], temp=0.5, **wrong))
    assert llm.kv.stats() == before and llm.n_tokens == before.tokens_seen


def test_a_generator_of_before_does_not_meddle(load, prompt):
    llm = load()
    before = llm.generate(prompt[:50])
    next(before)
    after = llm.generate(prompt)
    before.close()
    next(after)
    assert llm.kv.stats().compressions == 1


@pytest.mark.parametrize("kv", [KV, None])
@pytest.mark.parametrize(
    "rules", ["root ::= (", "start ::= [a-z]", "root ::= missing", "root ::= root root | [a]", 'root ::= "\\xZZ"']
)
def test_broken_grammars(load, kv, rules):
    llm = load(kv)
    with pytest.raises(ValueError, match="^the grammar can't be parsed; accepted: GBNF with a rule 'root'$"):
        llm.create_completion("abc", max_tokens=2, grammar=LlamaGrammar.from_string(rules, verbose=False))
    good = LlamaGrammar.from_string('root ::= "abc"', verbose=False)
    assert llm.create_completion("abc", max_tokens=8, temperature=0.0, grammar=good)["choices"][0]["text"] == "abc"


@pytest.mark.parametrize("kv", [KV, None])
def test_empty_prompts(load, kv):
    llm = load(kv)
    for empty in (
        lambda: llm.create_completion([]),
        lambda: next(llm.generate([])),
        lambda: next(llm.generate([], reset=False)),
    ):
        with pytest.raises(ValueError, match="^the prompt is empty; accepted: at least one token$"):
            empty()
    llm.eval([1, 300])
    with pytest.raises(ValueError, match="the prompt is empty"):
        next(llm.generate([]))
    next(llm.generate([], reset=False))  # goes on from there
    assert llm.create_completion("", max_tokens=1)  # the beginning-of-text token


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", [KV, None])
@pytest.mark.parametrize("option", ["type_k", "type_v"])
@pytest.mark.parametrize("number", [llama_cpp.GGML_TYPE_Q4_K, llama_cpp.GGML_TYPE_Q6_K])
def test_types_that_a_cache_cannot_have(load, kv, option, number):
    with pytest.raises(
        ValueError, match=rf"^{option}={number} can't be the type of a cache; accepted: 0 \(f32\), 1 \(f16\), .*5_1\){', or .auto.' if kv else ''}$"
    ):
        load(kv, **{option: number})


@pytest.mark.parametrize("kv", [KV, None])
@pytest.mark.parametrize("name", ["n_ctx", "n_batch", "n_ubatch", "n_threads", "n_threads_batch"])
def test_numbers_that_are_too_large(load, kv, name):
    with pytest.raises(ValueError, match=f"^{name} is 4294967297; accepted: up to [0-9]+$"):
        load(kv=kv, **{name: 4294967297})


def test_types_that_a_cache_can_have(load, prompt):
    from laprox.cache_types import CACHE_TYPES

    for number, _ in CACHE_TYPES.values():
        llm = load(type_k=number, type_v=number)
        next(llm.generate(prompt))
        assert llm.kv.stats().compressions == 1


# --- chat templates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", [KV, None])
@pytest.mark.parametrize(
    "template, said",
    [
        ("{% for m in messages %}\n{{ m.content }", r"line 2: unexpected '}'"),
        ("a\n\n{% sing %}", r"line 3: Encountered unknown tag 'sing'.*"),
    ],
)
def test_broken_chat_templates(load, kv, template, said):
    with pytest.raises(
        ValueError, match=rf'gguf: the chat template is broken \({said}\); chat_format="chatml", say, does without it$'
    ):
        load(kv, template=template)
    llm = load(kv, template=template, chat_format="chatml")
    assert llm.create_chat_completion([{"role": "user", "content": "abc"}], max_tokens=1)


# --- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system doesn't fork")
def test_a_forked_process_is_told(toy):
    """In a process of its own: a child that waits forever must not hold the tests up."""
    code = f"""
        import os, sys
        from laprox import Llama, LaproxError
        llm = Llama({str(toy("llama"))!r}, n_ctx=256, n_threads=2, verbose=False)
        llm.eval([1, 300, 301])
        pid = os.fork()
        if pid == 0:
            try:
                llm.eval([302])
            except LaproxError as error:
                print(error, flush=True)
            llm.close()
            other = Llama({str(toy("llama"))!r}, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
            print("loaded", other.n_ctx(), flush=True)
            os._exit(0)
        os.waitpid(pid, 0)
        llm.eval([302])
        print(llm.n_tokens)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    said, loaded, n = done.stdout.splitlines()
    assert said.startswith("this Llama was loaded before the process forked") and said.endswith('get_context("spawn")')
    assert (loaded, n) == ("loaded 256", "4")
