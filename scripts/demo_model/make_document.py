"""Write the ready document (about 8,000 tokens) and its questions, which ship beside the model."""
from __future__ import annotations

import json

from common import documents, tokenizer
from export import SHIPPED

SEED, TOKENS = "the ready document", 8000


def main():
    tok = tokenizer()
    doc = documents.make_document(SEED, TOKENS, questions=40, count=lambda s: len(tok.encode(s).ids), share=0.5)
    (SHIPPED.parent / "demo_document.txt").write_text(doc.text)
    questions = [{"question": q.text, "answer": q.answer, "value": q.value, "kind": q.kind,
                  "depth": None if q.depth is None else round(q.depth, 3)} for q in doc.questions]
    (SHIPPED.parent / "demo_questions.json").write_text(json.dumps(questions, indent=1) + "\n")
    print(len(tok.encode(doc.text).ids), "tokens,", len(doc.facts), "facts,", len(questions), "questions")


if __name__ == "__main__":
    main()
