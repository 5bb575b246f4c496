"""Train the byte-level BPE (GPT-2's pattern, which llama.cpp knows as `gpt-2`) on generated text and prose."""
from __future__ import annotations

import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from common import OUT, SPECIAL, VOCAB, documents
from data import chapters, more_attributes


def texts(n=600):
    rng = random.Random(0)
    for i in range(n):
        doc = documents.make_document(f"tokenizer {i}", 1000, split="train", extra=more_attributes(rng, 40))
        yield doc.text
        for q in doc.questions:
            yield f"{q.text}\n{q.answer}"
    for part in chapters(share=1.0):
        yield " ".join(part)


def main():
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts(), trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    OUT.mkdir(parents=True, exist_ok=True)
    tok.save(str(OUT / "tokenizer.json"))


if __name__ == "__main__":
    main()
