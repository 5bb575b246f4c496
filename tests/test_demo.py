"""`laprox demo`: what it reads and asks, and what it shows."""

import re
from dataclasses import replace

import pytest
from gguf_factory import CHATML

from laprox import demo as material
from laprox.cli import demo as command
from laprox.eval.metrics import contains_any


def test_the_text_answers_its_questions():
    about = material.load()
    assert len(about.questions) == 8 and 24_000 < len(about.text) < 27_000 and "public domain" in about.source
    plain = " ".join(about.text.split())
    for question in about.questions:
        assert question.text.endswith("?") and contains_any(plain, question.answers), question
        assert not contains_any(question.text, question.answers), question


@pytest.fixture
def short(monkeypatch):
    """A text that a model of random weights reads in no time, and what counts as right: anything, or nothing."""
    about = material.load()
    questions = (replace(about.questions[0], answers=("",)), replace(about.questions[1], answers=("no model says this",)))
    monkeypatch.setattr(material, "load", lambda: replace(about, text=about.text[:1500], questions=questions))


def test_both_caches_answer_each_question_twice(toy, short, capsys):
    command.demo(model=str(toy(chat_template=CHATML, n_ctx_train=8192)), kv_budget="50%", n_questions=8, threads=1, verbose=False)
    shown = capsys.readouterr().out
    assert re.search(r"reads 1,\d\d\d tokens: Try Again", shown)
    alone, talk = shown.split("All questions in one conversation")
    for part in (alone, talk):
        assert part.count("✓") == 2 and part.count("✗") == 2
        assert [line[:15].strip() for line in part.splitlines() if line.startswith("   l")] == ["llama.cpp", "laprox 50%"] * 2
    assert shown.count("1 of 2") == 4 and "KV cache" in talk
    full, small = re.search(r"KV cache +([\d.]+) MiB +([\d.]+) MiB", talk).groups()
    assert float(small) < 0.8 * float(full)


def test_what_is_wrong_is_said_before_a_model_is_loaded(short):
    with pytest.raises(ValueError, match="budget"):
        command.demo(model="qwen2.5-coder-0.5b", kv_budget="abc")
    with pytest.raises(ValueError, match="no-such-model"):
        command.demo(model="no-such-model")
