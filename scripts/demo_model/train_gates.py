"""Train the demo model's retention gates, which ship beside it: to Hugging Face's format, documents with questions, training.

Needs laprox itself with its extra `train` (scripts/build; .venv/bin/python -m pip install torch transformers), and
LAPROX_BOOKS like the model's own training. Goes on where it was interrupted:

    .venv/bin/python scripts/demo_model/train_gates.py"""
from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys

import data
import to_huggingface
from common import OUT

from laprox import models
from laprox.cli.loading import load_vocabulary
from laprox.documents import make_document

MODEL = models.demo_model()
DOCUMENTS, LENGTHS = 900, (512, 1024, 1024, 1536, 1536, 2048)
# Short next to the papers' runs (10,000 steps), so: a bias that forgets from the start (half of what is kept is gone after
# 280 tokens, where 18 means 46 million), small gates, a high rate. The planted heads match sharply, so: a strict capacity.
# Then half the capacity, which teaches what to do with little.
RECIPE = ["--gate", "rg10", "--capacity", "global", "--pressure", "3", "--strictness", "10", "--hidden", "128", "--bias", "6",
          "--length", "2304", "--save-every", "20"]
STAGES = {"first": ["-M", "48", "--lr", "3e-3", "--warmup", "20", "--steps", "220"],
          "second": ["-M", "24", "--lr", "2e-3", "--warmup", "5", "--steps", "300", "--seed", "1"]}


def conversation(number: int, size) -> list[dict]:
    """A document, and questions about it while there is room. Names, attributes and wordings of the training."""
    rng = random.Random(f"gates {number}")
    length = rng.choice(LENGTHS)
    doc = make_document(f"gates {number}", int(length * 0.62), split="train", questions=2 + length // 22, share=rng.uniform(0.3, 0.8),
                        count=size, prose=data.prose(rng) if rng.random() < 0.25 else None,
                        extra=data.more_attributes(rng, 40), words=data.words(3, data.ANY))
    rng.shuffle(doc.questions)
    messages, used = [], size(doc.text) + 10
    for q in doc.questions:
        used += size(q.text) + size(q.answer) + 12
        if used > length:
            break
        text = f"{doc.text}\n\n{q.text}" if not messages else q.text
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": q.answer}]
    return messages


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    to_huggingface.write(MODEL, OUT / "huggingface")
    vocabulary = load_vocabulary(MODEL)
    size = lambda text: len(vocabulary.tokenize(text.encode(), add_bos=False, special=False))  # noqa: E731
    with open(OUT / "gates.jsonl", "w") as file:
        for messages in filter(None, (conversation(i, size) for i in range(DOCUMENTS))):
            file.write(json.dumps({"messages": messages}) + "\n")
    command = [sys.executable, "-m", "laprox", "train-gates", OUT / "huggingface", "--data", OUT / "gates.jsonl", "--model", MODEL]
    before = []
    for stage, settings in STAGES.items():
        output = OUT / f"{stage}.gguf"
        if not output.exists():
            status = subprocess.run([*command, "-o", output, *before, *RECIPE, *settings, *sys.argv[1:]]).returncode
            if status:
                sys.exit(status)
        before = ["--init", output]
    shutil.copy(output, MODEL.with_suffix(".kv-gates.gguf"))


if __name__ == "__main__":
    main()
