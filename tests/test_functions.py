"""In Python as in the server: what a chat's prompt says of functions is held beside the budget, wherever a template puts it."""

import warnings

import pytest
from functions import ELSEWHERE, IN_SYSTEM, IN_USER, ONLY_WITH, TOOLS
from gguf_factory import CHATML
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from laprox import KVConfig, Llama

MESSAGES = [{"role": "system", "content": "Some rules. " * 10}, {"role": "user", "content": "A long text. " * 100 + "And what of it?"}]
KV = KVConfig(budget="5%", policy="streaming", min_tokens=64, archive="off")
PROTECTED = 4 + 32  # sink and recent
NOT_HELD = "what the prompt says of functions may be evicted"


@pytest.fixture
def load(toy):
    def make(template=IN_SYSTEM, kv=KV, **options):
        formatter = Jinja2ChatFormatter(template=template, eos_token="</s>", bos_token="<s>", stop_token_ids=[])
        handler = formatter.to_chat_handler() if template != CHATML else None
        path = str(toy(chat_template=CHATML))
        return Llama(path, n_ctx=4096, n_threads=1, n_threads_batch=1, verbose=False, kv=kv, chat_handler=handler, **options)

    return make


def ask(llm, tools=TOOLS, **more):
    return llm.create_chat_completion(MESSAGES, tools=tools, max_tokens=2, temperature=0.0, **more)


def held(llm):
    """Tokens that are held on average, of those that there were when the prompt was in."""
    stats = llm.kv.stats()
    return stats.entries_held * stats.tokens_seen / stats.entries_full


def n_prompt(llm, **more):
    """Tokens of the prompt."""
    return ask(llm, **more)["usage"]["prompt_tokens"]


def budget(n_tokens):
    return max(0.05 * n_tokens, PROTECTED)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("template", [IN_SYSTEM, IN_USER], ids=["system", "user"])
def test_functions_are_held_beside_the_budget(load, template, stream):
    llm = load(template)
    plain = n_prompt(llm, tools=None)
    assert held(llm) < budget(plain) + 4
    n_functions = n_prompt(llm) - plain
    assert n_functions > 300
    llm.reset()
    reply = ask(llm, stream=stream)
    if stream:
        assert len(list(reply)) > 1
    assert -1 < held(llm) - budget(plain) - n_functions < 6  # two tokens were sampled; those that reach over an end count
    assert llm.kv.config == KV
    n_prompt(llm, tools=None)
    assert held(llm) < budget(plain) + 4


def test_those_of_old(load):
    """`functions`, which OpenAI called so before `tools`."""
    llm = load(IN_SYSTEM.replace("tools", "functions"))
    plain = n_prompt(llm, tools=None)
    reply = ask(llm, tools=None, functions=[tool["function"] for tool in TOOLS])
    assert held(llm) > reply["usage"]["prompt_tokens"] - plain > 200


def test_a_handler_that_writes_text(load):
    """llama-cpp-python's own for functions, which asks the model twice."""
    llm = load(CHATML, chat_format="chatml-function-calling")
    plain = n_prompt(llm, tools=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reply = ask(llm, tool_choice={"type": "function", "function": {"name": "alpha"}})
    n_functions = reply["usage"]["prompt_tokens"] - plain
    assert n_functions > 200 and held(llm) > n_functions


def test_beside_what_else_is_protected(load):
    llm = load(kv=KVConfig(**{**KV.__dict__, "protect": "1000-1100"}))
    plain = n_prompt(llm, tools=None)
    n_functions = n_prompt(llm) - plain
    assert -1 < held(llm) - budget(plain - 100) - n_functions - 100 < 6
    assert llm.kv.config.protect == "1000-1100"


@pytest.mark.parametrize("template", [ELSEWHERE, ONLY_WITH], ids=["elsewhere", "only with"])
def test_a_template_that_writes_another_prompt(load, template):
    llm = load(template)
    with pytest.warns(RuntimeWarning, match=NOT_HELD):
        n = n_prompt(llm)
    assert held(llm) < budget(n) + 4


@pytest.mark.parametrize("mib, fits", [(4, True), (1, False)])
def test_a_budget_in_bytes_is_a_limit(load, mib, fits):
    llm = load(kv=KVConfig(**{**KV.__dict__, "budget": f"{mib}MiB"}))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ask(llm)
    assert llm.kv.stats().kv_bytes <= mib * 2**20
    assert any("more than a third of the budget" in str(warning.message) for warning in seen) == (not fits)


def test_a_stream_that_is_left(load):
    """What was protected for it isn't for the next."""
    llm = load()
    plain = n_prompt(llm, tools=None)
    stream = ask(llm, stream=True)
    next(stream)
    next(stream)
    stream.close()
    n_prompt(llm, tools=None)
    assert held(llm) < budget(plain) + 4


def test_without_a_compressing_cache(load):
    assert ask(load(kv=None))["choices"]
