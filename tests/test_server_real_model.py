"""laprox-server with trained models: the `openai` package, and answers from a part of a document's cache."""

import json
import random
from pathlib import Path

import openai
import pytest
from server import PROGRAM, Server

from laprox import demo
from laprox.eval import english, facts

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="built without the server (scripts/build --server)")

KV = ("--kv-budget", "20%", "--kv-min-tokens", "64", "--kv-archive", "off")

CHARACTERS = 8400  # about 2,000 tokens of the demo's text
QUESTION = "Who drove the wagon that took Harry to Boston? Answer in a few words."
DRIVER = {
    "type": "object",
    "properties": {"driver": {"type": "string"}, "city": {"type": "string"}},
    "required": ["driver", "city"],
}
LETTER = {
    "type": "function",
    "function": {
        "name": "send_letter",
        "description": "Send a letter to a person.",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    },
}
TRAIN = {
    "type": "function",
    "function": {
        "name": "book_train",
        "description": "Book a train for a person to a city.",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}, "city": {"type": "string"}}, "required": ["name", "city"]},
    },
}
TEMPLATE = Path(__file__).resolve().parent.parent / "docs/templates/chatml-json-calls.jinja"


@pytest.fixture(scope="module")
def document():
    text = demo.load().text[:CHARACTERS]
    return text[: text.rindex("\n\n")]


@pytest.mark.parametrize("options", [("--kv-budget", "20%"), ()], ids=["20%", "off"])
def test_the_openai_package_with_a_real_model(real_model, document, options):
    """With a document of 2,000 tokens, at a budget and off."""
    with Server(real_model("qwen2.5-coder-0.5b"), "-c", "4096", "--jinja", *options) as server:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="-", max_retries=0, timeout=600)

        def chat(question, **more):
            messages = [{"role": "user", "content": f"{document}\n\n{question}"}]
            return client.chat.completions.create(model="any", messages=messages, max_tokens=64, temperature=0, **more)

        def check_held(reply):
            if options:
                assert reply.kv["compressions"] >= 1 and reply.kv["tokens_seen"] > 1800
                answered = reply.usage.completion_tokens + 64  # and the question, where the document had been compressed for another
                assert reply.kv["entries_held"] <= (0.2 + (answered + 1) / reply.kv["tokens_seen"]) * reply.kv["entries_full"]

        events = list(chat(QUESTION, stream=True, stream_options={"include_usage": True}))
        streamed = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
        assert "John Lane" in streamed

        whole = chat(QUESTION, extra_body={"cache_prompt": False})
        assert whole.choices[0].message.content == streamed and whole.choices[0].finish_reason == "stop"
        check_held(whole)

        shape = {"type": "json_schema", "json_schema": {"name": "ride", "schema": DRIVER}}
        ride = chat("Who drove the wagon, and to which city did he take Harry? Answer as JSON.", response_format=shape)
        found = json.loads(ride.choices[0].message.content)
        assert set(found) == {"driver", "city"} and "Lane" in found["driver"] and found["city"], found
        check_held(ride)


@pytest.mark.parametrize("options", [("--kv-budget", "20%"), ()], ids=["20%", "off"])
def test_a_real_model_calls_a_function(real_model, document, options):
    """With what it has to read in a document for it; then the function has answered, and the model goes on."""
    with Server(real_model("qwen2.5-coder-0.5b"), "-c", "4096", "--chat-template-file", str(TEMPLATE), *options) as server:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="-", max_retries=0, timeout=600)
        chat = lambda **more: client.chat.completions.create(
            model="any", messages=messages, tools=[LETTER, TRAIN], max_tokens=64, temperature=0, **more
        )

        def called(reply):
            assert reply.choices[0].finish_reason == "tool_calls"
            (call,) = reply.choices[0].message.tool_calls
            return call, call.function.name, json.loads(call.function.arguments)

        def ask(question):
            return [{"role": "user", "content": f"{document}\n\n{question}"}]

        # what functions there are is held whole: without a grammar, too, it writes calls that fit them
        messages = ask("Book a train to Boston for the boy of the story.")
        reply = chat(tool_choice="auto")
        _, name, arguments = called(reply)
        assert name == "book_train" and set(arguments) == {"name", "city"} and arguments["city"] == "Boston"
        if options:
            kv = reply.kv
            assert kv["compressions"] >= 1 and kv["tokens_seen"] > 1800
            assert 0.25 < kv["entries_held"] / kv["entries_full"] < 0.35  # a fifth of the rest, and some 200 tokens of functions

        messages = ask("Who drove the wagon that took Harry to Boston? Send a letter to that person.")
        call, name, arguments = called(reply := chat(tool_choice="required"))
        assert name == "send_letter" and arguments == {"name": "John Lane"}

        messages += [reply.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "The letter to John Lane is on its way."}]
        said = chat(tool_choice="none")
        assert said.choices[0].finish_reason == "stop" and said.choices[0].message.content
        assert not options or said.kv["tokens_reread"] == 0


def test_the_openai_package(real_model):
    """Chat, stream, follow-up and tools, as docs/server.md has it; `kv` comes along where a reply has timings."""
    with Server(real_model("smollm2-135m"), *KV, "-c", "2048") as server:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="-", max_retries=0)
        chat = lambda messages, **more: client.chat.completions.create(model="any", messages=messages, **{"max_tokens": 16, **more})
        messages = [{"role": "user", "content": "a long document " * 60 + "and a question"}]

        whole = chat(messages, extra_body={"kv": {"budget": "50%", "policy": "snapkv"}})
        assert (whole.kv["budget"], whole.kv["policy"], whole.kv["compressions"]) == ("50%", "snapkv", 1)

        again = {"kv": {"budget": "50%", "policy": "snapkv"}, "cache_prompt": False}
        events = list(chat(messages, stream=True, extra_body=again))
        assert "".join(e.choices[0].delta.content or "" for e in events if e.choices) == whole.choices[0].message.content
        assert [e.kv["policy"] for e in events if hasattr(e, "kv")] == ["snapkv"]

        messages += [{"role": "assistant", "content": whole.choices[0].message.content}, {"role": "user", "content": "And?"}]
        assert chat(messages).kv["tokens_reread"] == 0

        schema = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
        shape = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
        reply = chat(messages[:1], response_format=shape, max_tokens=100)
        assert json.loads(reply.choices[0].message.content)["city"] in ("Oslo", "Rome") and reply.kv["compressions"] == 1

        # a tool was called and has answered; whether a tool is called at all is the model's choice, and this one knows none
        call = {"id": "1", "type": "function", "function": {"name": "where", "arguments": '{"city": "Oslo"}'}}
        messages += [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": "north"}]
        tool = {"type": "function", "function": {"name": "where", "parameters": schema}}
        assert chat(messages, tools=[tool]).choices[0].finish_reason in ("stop", "length")

        with pytest.raises(openai.BadRequestError, match="accepted: off, laprox"):
            chat(messages, extra_body={"kv": {"policy": "best"}})


def test_a_model_that_reads_answers_from_a_part_of_its_cache(real_model):
    rng, right = random.Random(1), {"50%": 0, "100%": 0}
    document, asked = facts.insert_facts(" ".join(english.sentence(rng) for _ in range(20)), 6, seed=1)
    with Server(real_model("qwen2.5-coder-0.5b"), "-c", "2048", "--kv-budget", "50%", "--kv-min-tokens", "64") as server:
        for budget in right:
            for question in (asked[0], asked[3]):
                reply = server.post(
                    "/v1/chat/completions", kv={"budget": budget}, cache_prompt=False, max_tokens=24,
                    messages=[{"role": "user", "content": f"{document}\n\n{question.text}"}],
                )  # fmt: skip
                right[budget] += question.answered_by(reply["choices"][0]["message"]["content"])
                held = reply["kv"]["entries_held"] / reply["kv"]["entries_full"]
                assert held < 0.5 + 24 / 400 if budget == "50%" else held == 1  # what was kept, and the answer
    assert right == {"50%": 2, "100%": 2}
