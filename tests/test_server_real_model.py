"""The `openai` package against laprox-server with a real model and a document of 2,000 tokens: at a budget, and off."""

import json

import openai
import pytest
from server import Server

from laprox import demo

CHARACTERS = 8400  # about 2,000 tokens of the demo's text
QUESTION = "Who drove the wagon that took Harry to Boston? Answer in a few words."
DRIVER = {
    "type": "object",
    "properties": {"driver": {"type": "string"}, "city": {"type": "string"}},
    "required": ["driver", "city"],
}


@pytest.fixture(scope="module")
def document():
    text = demo.load().text[:CHARACTERS]
    return text[: text.rindex("\n\n")]


@pytest.mark.parametrize("options", [("--kv-budget", "20%"), ()], ids=["20%", "off"])
def test_the_openai_package_with_a_real_model(real_model, document, options):
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
