"""The example of docs/retention-gates.md, as it stands there: one document, several unrelated questions. With random gates."""

from __future__ import annotations

import random
import re
from pathlib import Path

import gates_factory
from gguf_factory import CHATML

from laprox.eval import english
from laprox.gates import sidecar

PAGE = Path(__file__).resolve().parents[1] / "docs" / "retention-gates.md"


def example():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)
    (code,) = [block for block in blocks if "document_read" in block]
    return code


def test_questions_about_a_document_that_was_read_once(toy, tmp_path, monkeypatch):
    (tmp_path / "model.gguf").symlink_to(toy(chat_template=CHATML))
    sidecar.write(tmp_path / "model.kv-gates.gguf", gates_factory.random_gates(3, 256, 2), "f16")
    rng = random.Random(1)
    (tmp_path / "report.txt").write_text(" ".join(english.sentence(rng) for _ in range(80)))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(example(), str(PAGE), "exec"), names)
    llm, prompt, questions, answers = (names[name] for name in ("llm", "prompt", "questions", "answers"))
    assert len(answers) == len(questions) > 2

    # A tenth is held, it was compressed once, and an answer depends on nothing that was asked before.
    llm.load_state(names["document_read"])
    stats = llm.kv.stats()
    assert stats.tokens_seen > 3000 and stats.entries_held <= 0.1 * stats.entries_full + 1 and stats.compressions == 1
    for question, answer in reversed(list(zip(questions, answers))):
        llm.load_state(names["document_read"])
        again = llm.create_completion(prompt(question), max_tokens=48, temperature=0)["choices"][0]["text"].strip()
        assert again == answer
        assert llm.kv.stats().compressions == 1 and llm.kv.stats().entries_held < 0.13 * llm.kv.stats().entries_full
