"""The example of docs/retention-gates.md, as it stands there: one document, ten unrelated questions."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "retention-gates.md"


def example():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)
    (code,) = [block for block in blocks if "document_read" in block]
    return code


def test_ten_questions_about_a_document_that_was_read_once(capsys):
    names = {}
    exec(compile(example(), str(PAGE), "exec"), names)
    document, llm, answers = names["document"], names["llm"], names["answers"]
    assert len(answers) == len(document.questions) == 10
    assert len({q.about.attribute + q.about.name for q in document.questions}) == 10
    llm.load_state(names["document_read"])
    stats = llm.kv.stats()
    assert stats.entries_held <= 0.1 * stats.entries_full + 1 and stats.compressions == 1
    right = [q.value in answer for q, answer in zip(document.questions, answers)]
    assert sum(right) >= 9, capsys.readouterr().out
