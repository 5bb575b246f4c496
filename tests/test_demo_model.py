import json
import random
import re
import unicodedata

import pytest

from laprox import Llama
from laprox.documents import make_document, prompt
from laprox.models import demo_document, demo_model, demo_questions


RIGHT = 0.75  # the least share of right answers at these lengths; docs/demo-model.md has the measurement


@pytest.fixture(scope="module")
def llm():
    return Llama(str(demo_model()), kv=None, n_ctx=2048, n_threads=1, verbose=False)


def ask(llm, text, question):
    """The greedy answer of the full cache."""
    message = {"role": "user", "content": prompt(text, question)}
    reply = llm.create_chat_completion([message], temperature=0.0, repeat_penalty=1.0, max_tokens=60)
    return reply["choices"][0]["message"]["content"].strip()


def test_size_and_shape(llm):
    meta = llm.metadata
    assert demo_model().stat().st_size <= 16 << 20
    assert meta["general.architecture"] == "llama"
    assert int(meta["llama.attention.head_count_kv"]) >= 4
    assert int(meta["llama.attention.head_count"]) >= 2 * int(meta["llama.attention.head_count_kv"])
    assert int(meta["llama.attention.key_length"]) == 64
    assert int(meta["llama.block_count"]) >= 6
    assert int(meta["llama.context_length"]) >= 8192
    assert "<|im_start|>" in meta["tokenizer.chat_template"]


def test_answers_single_facts(llm):
    """In seconds; docs/demo-model.md has the real measurement."""
    asked = right = 0
    for seed in range(4):
        doc = make_document(f"test {seed}", 900, kinds=("single",), questions=4)
        for q in doc.questions:
            asked += 1
            right += ask(llm, doc.text, q.text) == q.answer
    assert asked >= 12 and right >= RIGHT * asked


def test_the_fact_is_what_it_reads(llm):
    """Another value in the document, another answer: nothing is known by heart."""
    asked = followed = 0
    for seed in range(6):
        doc = make_document(f"test changed {seed}", 600, kinds=("single",), questions=6, rephrased=0)
        for q in [q for q in doc.questions if q.value.isdigit()][:2]:
            other = str(int(q.value) * 7 % 9000 + 1000)
            changed = doc.text.replace(f"is {q.value}.", f"is {other}.")
            assert changed != doc.text
            asked += 1
            followed += other in ask(llm, changed, q.text)
    assert asked >= 6 and followed >= RIGHT * asked


def test_ready_document(llm):
    text, questions = demo_document().read_text(), json.loads(demo_questions().read_text())
    assert 7500 <= len(llm.tokenize(text.encode(), add_bos=False)) <= 8200
    assert len(questions) >= 10
    for q in questions:
        assert q["value"] in q["answer"]
        assert q["kind"] == "unanswerable" or q["value"].split(". ")[0].lower() in text.lower()


# --- The tokenizer, written a second time -----------------------------------------------------------
_PATTERN = re.compile(r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)
_SPACES = set("\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {chr(c) for c in range(0x2000, 0x200B)}


def _plain(char):
    """A character of ASCII that GPT-2's pattern treats like this one."""
    if char in _SPACES:
        return char if char == " " else "\t"
    if char < "\x80":
        return char if char.isprintable() else "!"
    return {"L": "Z", "N": "0"}.get(unicodedata.category(char)[0], "!")


def _bytes_to_text():
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


class Tokenizer:
    def __init__(self, path):
        from gguf import GGUFReader

        fields = GGUFReader(path).fields
        self.ids = {t: i for i, t in enumerate(fields["tokenizer.ggml.tokens"].contents())}
        merges = fields["tokenizer.ggml.merges"].contents()
        self.rank = {tuple(m.split(" ")): i for i, m in enumerate(merges)}
        self.alphabet = _bytes_to_text()

    def __call__(self, text):
        found = []
        for m in _PATTERN.finditer("".join(map(_plain, text))):
            word = [self.alphabet[b] for b in text[m.start():m.end()].encode()]
            while len(word) > 1:
                rank, i = min((self.rank.get(pair, 1 << 30), i) for i, pair in enumerate(zip(word, word[1:])))
                if rank == 1 << 30:
                    break
                word[i:i + 2] = [word[i] + word[i + 1]]
            found += [self.ids[t] for t in word]
        return found


def test_tokenization_of_random_unicode(llm):
    tokenize, rng = Tokenizer(demo_model()), random.Random(0)
    ranges = ((32, 127), (32, 127), (1, 0x300), (0x300, 0x3000), (0x3000, 0xD7FF), (0xE000, 0x1FFFF))
    for _ in range(1000):
        text = "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 40)))
        # characters newer than this Python's tables may be letters for llama.cpp
        text = "".join(c for c in text if unicodedata.category(c) != "Cn")
        assert llm.tokenize(text.encode(), add_bos=False, special=False) == tokenize(text), repr(text)
    doc = make_document(1, 2000)
    assert llm.tokenize(doc.text.encode(), add_bos=False, special=False) == tokenize(doc.text)
