"""`laprox chat` with templates, terminals and input that aren't what one expects."""

import json
import os
import re
import subprocess
import sys

import pytest
from gguf_factory import CHATML

from laprox.chat.conversation import Conversation
from laprox.chat.loading import load_vocabulary
from laprox.cli.options import chat_template
from laprox.cli.show import allocated_without, status
from laprox.kv import KVStats

LAPROX = [sys.executable, "-m", "laprox"]
FAST = ["-t", "1", "--temp", "0", "-n", "8", "--kv-min-tokens", "64"]
DOCUMENT = "the code of Ada is 48, of Bob 77, of Eve 12. " * 12


def run(*args, stdin=b"", **env):
    done = subprocess.run(
        [*LAPROX, *map(os.fspath, args)], capture_output=True, input=stdin, timeout=300, env={**os.environ, **env}
    )
    assert b"Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    path = tmp_path_factory.mktemp("documents") / "notes.txt"
    path.write_text(DOCUMENT)
    return path


@pytest.fixture(scope="module")
def vocabulary(toy):
    return load_vocabulary(toy(chat_template=CHATML))


# --- what is asked arrives -------------------------------------------------------------------------------------------


def each(content):
    """A template that does so with every message."""
    return "{% for m in messages %}[{{ m.role }}]" + content + "{% endfor %}[answer]"


def text_of(vocabulary, tokens):
    return vocabulary.detokenize(tokens, special=True).decode()


@pytest.mark.parametrize(
    "template, expected",
    [
        (each("{{ m.content }}"), "[user]DOC\n\nQ[answer]"),
        (each("{{ m['content'] | trim }}"), "[user]DOC\n\nQ[answer]"),
        (each("{% for part in m.content %}{{ part.text }}{% endfor %}"), "[user]DOC\n\nQ[answer]"),
        (
            each("{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}"),
            "[user]DOC\n\nQ[answer]",
        ),
        (each("{{ m.content | tojson }}"), '[user]"DOC\\n\\nQ"[answer]'),
        (each("{{ m.content | upper }}"), "[user]DOC\n\nQ[answer]"),
        (each("{{ m.content | lower }}"), "[user]DOC\n\nq[answer]"),
        (each("{{ m.content }}={{ m.content }}"), "[user]DOC\n\nQ=DOC\n\nQ[answer]"),
        ("{{ messages[-1].content }}", "DOC\n\nQ"),
    ],
)
def test_documents_and_questions_arrive(vocabulary, template, expected):
    conversation = Conversation(vocabulary, DOCUMENT, template=template)
    text = text_of(vocabulary, conversation.prompt("Q"))
    assert (
        text.lstrip(" ")
        .replace(" \n", "\n")
        .replace(" \\n", "\\n")
        .replace(DOCUMENT, "DOC")
        .replace(" DOC", "DOC")
        .replace("] ", "]")
        == expected
    )
    assert not any(ord(c) < 32 and c != "\n" for c in text)
    begin, end = conversation.document_begin(), conversation.document_end()
    assert text_of(vocabulary, conversation.prompt("Q")[begin:end]).strip() == DOCUMENT.strip()


@pytest.mark.parametrize(
    "template, said",
    [
        (" ", "leaves out the documents"),
        ("hello", "leaves out the documents"),
        (each("{{ m.content[:40] }}"), "leaves out the question"),
        (each("{{ m.content | length }}"), "leaves out the documents"),
        ("{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}", "leaves out the documents"),
    ],
)
def test_what_does_not_arrive_is_said(vocabulary, template, said):
    with pytest.raises(ValueError, match=f"^the chat template {said}$"):
        Conversation(vocabulary, DOCUMENT, template=template)


def test_without_documents_the_question_must_arrive(vocabulary):
    with pytest.raises(ValueError, match="leaves out the question"):
        Conversation(vocabulary, "", template="hello")


def test_a_template_that_drops_earlier_messages(vocabulary):
    conversation = Conversation(vocabulary, DOCUMENT, template="{{ messages[-1].content }}")
    assert len(conversation.prompt("Q")) > len(DOCUMENT)
    conversation.turns.append(("Q", "A"))
    with pytest.raises(ValueError, match="leaves out the documents of a follow-up"):
        conversation.prompt("and?")


class Letters:
    """A vocabulary of letters, and of "xy" as one token."""

    def tokenize(self, text, add_bos, special):
        return ["<s>"] * add_bos + re.findall("xy|.", text.decode(), re.DOTALL)

    def metadata(self):
        return {}

    def token_eos(self):
        return -1

    token_bos = token_eos


def test_a_follow_up_begins_with_the_tokens_before_it():
    """Also where the answer's first letter would have merged with the last of them: the cache knows the prompt by its tokens."""
    conversation = Conversation(Letters(), "D", template="{% for m in messages %}{{ m.content }}x{% endfor %}")
    asked = conversation.ask("Q")
    conversation.turns.append(("Q", "yes"))
    follow_up = conversation.prompt("R")
    assert follow_up[: len(asked)] == asked and "".join(follow_up) == "D\n\nQxyesxRx"
    conversation.turns[:] = [("P", "yes")]
    assert "xy" in conversation.prompt("R")  # another conversation


# --- broken templates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template, said",
    [
        ("{% for m in messages %}\n{{ m.content }", "the chat template is broken (line 2: unexpected '}')"),
        ("\n{% sing %}", "the chat template is broken (line 2: Encountered unknown tag 'sing'.)"),
        ("a\n\n{{ today() }}{{ messages[0].content }}", "the chat template fails (line 3: 'today' is undefined)"),
        ("{{ raise_exception('no\nfollow-ups') }}", "the chat template fails (line 1: no follow-ups)"),
    ],
)
def test_broken_templates_are_a_line(toy, document, template, said):
    model = toy(chat_template=template)
    done = run("chat", model, "-d", document, "--ask", "who?", *FAST)
    assert (
        done.returncode == 1 and done.stderr.decode() == f"laprox: {said}; --chat-template chatml, say, takes another\n"
    )
    done = run("chat", model, "-d", document, "--ask", "who?", "--json", "--chat-template", "chatml", *FAST)
    assert done.returncode == 0 and json.loads(done.stdout)["tokens_seen"] > len(DOCUMENT)


def test_templates_by_name():
    assert "im_start" in chat_template("chatml") and chat_template("{{ x }}") == "{{ x }}"
    with pytest.raises(
        ValueError, match="^--chat-template is 'gpt'; accepted: chatml, llama3, mistral, or a Jinja template$"
    ):
        chat_template("gpt")


# --- follow-ups in a chat --------------------------------------------------------------------------------------------


def test_a_chat_reads_its_documents_once(toy, document):
    done = run(
        "chat", toy(chat_template=CHATML), "-d", document, "--ask", "who?", "--ask", "where?", "--ask", "why?", *FAST
    )
    assert done.returncode == 0 and done.stderr.count(b"tokens seen") == 3 and b"read again" not in done.stderr


# --- text that is not UTF-8 ------------------------------------------------------------------------------------------


def test_questions_that_are_not_utf8(toy, document):
    model = toy(chat_template=CHATML)
    done = run("chat", model, "-d", document, "--json", *FAST, stdin=b"caf\xe9?\nwhere\x1b[2J?\n")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["question"] for line in done.stdout.splitlines()] == ["caf\ufffd?", "where[2J?"]
    asked = run("chat", model, "-d", document, "--json", "--ask", b"caf\xe9?", *FAST)
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout)["question"] == "caf\ufffd?"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_outputs_that_are_not_utf8(toy, document, encoding):
    model = toy(chat_template=CHATML)
    done = run("chat", model, "-d", document, "--ask", "東😀?", "--json", *FAST, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode(encoding))["question"] == "東😀?"


@pytest.mark.parametrize("encoding, seen", [("cp1252", b"\\u22ef"), ("utf-8", "⋯".encode())])
def test_a_text_that_the_terminal_has_no_characters_for(toy, tmp_path, encoding, seen):
    """What was evicted is marked by a character that cp1252 lacks."""
    path = tmp_path / "a.txt"
    path.write_text(DOCUMENT)
    done = run("view", toy(chat_template=CHATML), path, "-t", "1", "--kv-min-tokens", "64", PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and seen in done.stdout, done.stderr


def test_messages_cannot_drive_the_terminal(toy, tmp_path):
    done = run("chat", toy(chat_template=CHATML), "-d", tmp_path / "a\x1b[2J.txt", "--ask", "?")
    assert done.returncode == 1 and b"\x1b" not in done.stderr and b"No such file" in done.stderr


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_the_status_compares_what_is_allocated():
    """Of 100 tokens in a context of 1,000, llama.cpp would have allocated all 1,000."""
    stats = KVStats(100, 600, 600, 1024 * 1000, 1024 * 100, 0, 0, 0.0, 0.0, 0.0)
    assert allocated_without(stats, 1000) == stats.kv_bytes
    assert "1000 KiB now, 1000 KiB without laprox" in status(stats, 100, 1.0, 1000)
    assert "read again" not in status(stats, 100, 1.0, 1000)
    reread = KVStats(100, 600, 600, 1024, 1024, 0, 0, 0.0, 0.0, 0.0, 1234)
    assert "1,234 tokens read again" in status(reread, 100, 1.0, 1000)
