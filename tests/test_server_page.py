"""llama-server's page in a headless browser, on laprox-server: a long document is pasted or attached, questions are answered."""

import random

import pytest
from server import PROGRAM, Server

from laprox.eval import english, facts

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="built without the server (scripts/build --server)")


@pytest.fixture(scope="module")
def server(real_model):
    with Server(real_model("smollm2-135m"), "-c", "2048", "--kv-budget", "20%", "--kv-min-tokens", "64", "-n", "12") as server:
        if server.get("/index.html").status == 404:
            pytest.skip("built without the page (npm was not found, or failed: see the build's log)")
        yield server


@pytest.fixture
def page(server, browser):
    """A page of nobody's before, in which nothing may fail but the tools that llama-server offers only with --tools."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("response", lambda reply: problems.append(reply.url) if reply.status >= 400 and not reply.url.endswith("/tools") else None)
    page.goto(f"http://127.0.0.1:{server.port}/")
    yield page
    page.close()
    server.idle()
    assert not problems


@pytest.fixture(scope="module")
def document():
    """About 400 tokens, and two questions."""
    rng = random.Random(0)
    return facts.insert_facts(" ".join(english.sentence(rng) for _ in range(28)), 2, seed=0)


def ask(page, text):
    """Send a message as a user does, and what the server answers to it as a program sees it."""
    with page.expect_response(lambda reply: reply.url.endswith("/v1/chat/completions")) as asked:
        page.locator("textarea").fill(text)
        page.locator("textarea").press("Enter")
    return asked.value.request.post_data_json["messages"]


def answer(server, messages):
    """What a program gets for the same messages."""
    reply = server.post("/v1/chat/completions", messages=messages, cache_prompt=False)
    assert reply["kv"]["entries_held"] < 0.3 * reply["kv"]["entries_full"]
    return reply["choices"][0]["message"]["content"]


def test_a_pasted_document_is_compressed_and_asked_about_twice(server, page, document):
    text, (first, second) = document
    messages = ask(page, f"{text}\n\n{first.text}")
    expected = answer(server, messages)
    page.get_by_text(expected.strip().splitlines()[0], exact=True).wait_for()

    messages = ask(page, second.text)
    assert [message["content"] for message in messages] == [f"{text}\n\n{first.text}", expected, second.text]
    page.get_by_role("button", name="Send").wait_for()  # answered
    held = server.slot()["kv"]
    assert held["tokens_seen"] > 400 and held["entries_held"] < 0.3 * held["entries_full"]


def test_an_attached_document_is_compressed(server, page, document, tmp_path):
    file = tmp_path / "document.txt"
    file.write_text(document[0])
    page.locator("input[type=file]").set_input_files(file)
    page.get_by_text("document.txt").wait_for()
    messages = ask(page, "Please read this.")
    page.get_by_role("button", name="Send").wait_for()
    assert document[0] in str(messages[-1]["content"]).replace("\\n", "\n")
    held = server.slot()["kv"]
    assert held["compressions"] >= 1 and held["entries_held"] < 0.3 * held["entries_full"]
