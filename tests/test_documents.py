import hashlib
import random
import re

import pytest

from laprox import documents
from laprox.documents import KINDS, make_document


def all_words(split):
    facts = [f for seed in range(40) for f in make_document(seed, 2000, split=split).facts]
    return {f.name for f in facts}, {f.attribute for f in facts}


def test_same_seed_same_document():
    a, b = (make_document(5, 1500, depths=(0.1, 0.9)) for _ in range(2))
    assert a == b
    assert a.text != make_document(6, 1500).text


@pytest.mark.parametrize(("split", "digest"), [("eval", "9c013cca2ad6cbbd"), ("train", "c4dd2fd556920306")])
def test_the_text_of_a_seed_is_pinned(split, digest):
    """Evaluations name seeds and the model was trained on others: the generator must not change unnoticed."""
    text = make_document(0, 1000, split=split).text
    assert hashlib.sha256(text.encode()).hexdigest().startswith(digest)


def test_splits_share_no_names_attributes_or_wordings():
    (train_names, train_attributes), (eval_names, eval_attributes) = all_words("train"), all_words("eval")
    assert len(train_names) > 300 and len(eval_names) > 300
    assert not train_names & eval_names
    assert not train_attributes & eval_attributes
    for wordings in (documents._REPHRASED, documents._ASK, documents._ASK_REPHRASED, documents._ASK_SEVERAL, documents._ASK_TWO_HOP,
                     documents._FILLER, documents._ADJECTIVES, documents._NOUNS):
        assert not set(wordings["train"]) & set(wordings["eval"])
    assert set(documents._LEADS["train"]) & set(documents._LEADS["eval"]) == {""}


@pytest.mark.parametrize("length", [300, 2000, 8000])
def test_length(length):
    doc = make_document(1, length, questions=5, count=len)
    assert 0.8 * length < len(doc.text) <= 1.05 * length


@pytest.mark.parametrize("seed", range(20))
def test_answers_are_in_the_document_and_unique(seed):
    doc = make_document(seed, 2000, questions=15)
    stated = {}
    for f in doc.facts:
        stated.setdefault((f.attribute, f.name), []).append(f.value)
    assert {q.kind for q in doc.questions} >= {"single", "unanswerable"}
    for q in doc.questions:
        assert q.value in q.answer
        assert q.text not in doc.text
        if q.kind == "unanswerable":
            attribute, name = re.fullmatch(r"The (.+) of (.+) is not in the document\.", q.answer).groups()
            assert (attribute, name) not in stated
            assert name in doc.text and attribute in doc.text
        for f in q.facts:
            wanted = 2 if q.kind == "several" else 1
            assert len(stated[f.attribute, f.name]) == wanted
            assert f.name in doc.text and f.value.lower() in doc.text.lower()
    assert any(q.kind == "two-hop" for s in range(5) for q in make_document(s, 2000, questions=15).questions)


def test_every_fact_has_near_duplicates():
    doc = make_document(3, 2000, questions=10, kinds=("single",))
    attributes = [sum(g.attribute == q.facts[0].attribute for g in doc.facts) for q in doc.questions]
    names = [sum(g.name == q.facts[0].name for g in doc.facts) for q in doc.questions]
    assert min(attributes) >= 2 and sum(attributes) / len(attributes) > 4
    assert sum(names) / len(names) > 2.5


def test_depths():
    depths = (0.1, 0.3, 0.5, 0.7, 0.9)
    for seed in range(5):
        doc = make_document(seed, 3000, kinds=("single",), questions=5, depths=depths)
        assert [q.depth for q in doc.questions] == pytest.approx(depths, abs=0.05)


def test_kinds_and_prose():
    prose = [f"Sentence number {i} of a book." for i in range(100)]
    doc = make_document(0, 1000, kinds=("rephrased",), questions=4, prose=prose)
    assert {q.kind for q in doc.questions} <= {"rephrased", "single"}
    assert "Sentence number 0 of a book." in doc.text
    for kind in KINDS:
        assert make_document(1, 2000, kinds=(kind,), questions=3).questions


def test_unknown_split_is_refused():
    with pytest.raises(KeyError):
        make_document(0, 300, split="test")


def test_names_belong_to_one_split():
    rng = random.Random(0)
    assert {documents.split_of(documents.person(rng, "eval")) for _ in range(50)} == {"eval"}
    assert {documents.split_of(documents.city(rng, "train")) for _ in range(50)} == {"train"}
