"""Write the demo model's table for the policy lukv, which ships beside it.

Needs laprox itself (scripts/build), none of requirements.txt:

    .venv/bin/python scripts/demo_model/make_profile.py"""
from __future__ import annotations

import json
import subprocess
import sys

from common import OUT

from laprox import models
from laprox.cli.loading import load_vocabulary
from laprox.documents import make_document

MODEL = models.demo_model()
DOCUMENTS, QUESTIONS, TOKENS = 10, 10, 1900


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    vocabulary = load_vocabulary(MODEL)
    size = lambda text: len(vocabulary.tokenize(text.encode(), add_bos=False, special=False))  # noqa: E731
    data = OUT / "profile.jsonl"
    with open(data, "w") as file:
        for i in range(DOCUMENTS):  # names, attributes and wordings of the training; no evaluation uses them
            doc = make_document(f"profile {i}", TOKENS, split="train", questions=QUESTIONS, count=size)
            file.write(json.dumps({"context": doc.text, "questions": [q.text for q in doc.questions]}) + "\n")
    command = [sys.executable, "-m", "laprox", "profile", MODEL, "--data", data, "-t", "1"]
    sys.exit(subprocess.run([*command, "-o", MODEL.with_suffix(".kv-profile.npy"), *sys.argv[1:]]).returncode)


if __name__ == "__main__":
    main()
