"""What `laprox eval` and `laprox compare` compute from answers and distributions, against a second way to compute it."""

import math
import random
import re
from fractions import Fraction

import numpy as np
import pytest

from laprox import extras
from laprox.eval import metrics
from laprox.eval.means import mean_with_error
from laprox.eval.metrics import (
    agreement,
    check_packages,
    classification,
    code_similarity,
    contains_any,
    count,
    f1,
    kl_divergence,
    log_softmax,
    names,
    recall,
    retrieval,
    rouge_l,
    score,
)  # fmt: skip
from laprox.eval.summary import Summary, key

WORDS = "the a an cat sat mat dog ran far away over hill 12 7 it's end".split()


def sentence(rng, longest=9):
    text = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(longest)))
    return text.title() + "." if rng.random() < 0.3 else text


# --- distributions ---------------------------------------------------------------------------------------------------


def test_distributions_against_the_formulas(rng):
    full, now = (log_softmax(rng.normal(scale=5, size=(6, 40)).astype(np.float32)) for _ in range(2))
    for row in range(6):
        assert math.isclose(math.fsum(math.exp(x) for x in full[row]), 1, rel_tol=1e-12)
        expected = math.fsum(math.exp(p) * (p - q) for p, q in zip(full[row].tolist(), now[row].tolist()))
        assert math.isclose(kl_divergence(full, now)[row], expected, rel_tol=1e-9)
        best = [max(range(40), key=row_.tolist().__getitem__) for row_ in (full[row], now[row])]
        assert agreement(full, now)[row] == (best[0] == best[1])
    assert (kl_divergence(full, full) == 0).all() and agreement(full, full).all()


def test_distributions_at_the_edges():
    huge = log_softmax([1e30, 0.0, -1e30])
    assert huge.tolist() == [0.0, -1e30, -2e30]
    assert kl_divergence(huge, huge) == 0
    never = np.array([0.0, -np.inf])
    assert kl_divergence(never, never) == 0  # 0 log 0 is 0
    assert kl_divergence(np.log([0.5, 0.5]), never) == np.inf


# --- texts -----------------------------------------------------------------------------------------------------------


def plain(text):
    return [w for w in re.sub(r"[^\w\s]|_", "", text.lower()).split() if w not in ("a", "an", "the")]


def test_f1_against_matching_words_one_by_one():
    rng = random.Random(0)
    for _ in range(2000):
        a, b = sentence(rng), sentence(rng)
        left, same = plain(b), 0
        for word in plain(a):
            if word in left:
                left.remove(word)
                same += 1
        precision, recalled = (Fraction(same, n) if n else Fraction(0) for n in (len(plain(a)), len(plain(b))))
        expected = 2 * precision * recalled / (precision + recalled) if same else 0
        assert math.isclose(f1(a, b), expected, abs_tol=1e-12), (a, b)
    assert f1("The Cat!", "a cat") == 1 and f1("", "cat") == 0 and f1("the", "a") == 0


def longest_common(a, b):
    """One of the longest common subsequences: of several, the one that leaves words of `b` first, seen from the end."""
    if not a or not b:
        return ()
    if a[-1] == b[-1]:
        return (*longest_common(a[:-1], b[:-1]), a[-1])
    without_a, without_b = longest_common(a[:-1], b), longest_common(a, b[:-1])
    return without_a if len(without_a) > len(without_b) else without_b


def test_rouge_l_against_a_recursion():
    """LongBench's: distinct words of the reference's sentences that are in order in one of the answer's."""
    rng = random.Random(1)
    for _ in range(200):
        a, b = (" ".join(sentence(rng, 6) for _ in range(rng.randrange(3))) for _ in range(2))
        x, y = ([part.split() or [""] for part in text.split(".") if part] for text in (a, b))
        held, said, found = {w for s in y for w in s}, {w for s in x for w in s}, set()
        for theirs in y:
            for ours in x:
                found.update(longest_common(theirs, ours))
        expected = 2 * len(found) / (len(held) + len(said)) if found else 0
        assert math.isclose(rouge_l(a, b), expected, abs_tol=1e-7), (a, b)


def test_rouge_l_by_hand():
    close = lambda a, b, value: math.isclose(rouge_l(a, b), value, abs_tol=1e-7)  # noqa: E731
    assert close("the cat sat", "the cat sat", 1)
    assert close("the cat", "the dog sat", 2 / 5)  # one word in common, of two and three
    assert close("a b c", "c b a", 1 / 3)  # order counts
    assert close("a a a b", "a b", 1)  # a word counts once
    assert close("a. b", "b. a", 1)  # sentences are compared with all sentences
    assert close("Cat", "cat", 0)  # case counts
    assert rouge_l("", "a") == rouge_l("a", "") == rouge_l("...", "a") == 0


def test_rouge_l_of_long_sentences():
    text = " ".join(map(str, range(900)))  # more words than Python lets functions nest
    assert math.isclose(rouge_l(text, text + " end"), 2 * 900 / 1801, abs_tol=1e-7)


def edits(a, b):
    """Insertions and deletions."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], last if x == y else 1 + min(row[j], row[j - 1])
    return row[-1]


def test_code_similarity_against_edit_distance():
    rng = random.Random(2)
    for _ in range(300):
        a, b = ("".join(rng.choice("xy =()") for _ in range(rng.randrange(12))) for _ in range(2))
        total = len(a) + len(b)
        assert math.isclose(code_similarity(a, b), 1 - edits(a, b) / total if total else 1, abs_tol=1e-12), (a, b)
    assert code_similarity("\n# why\n`x`\nreturn x // 2\nreturn x", "return x") == 1
    assert code_similarity("# only this", "return x") == 0


def test_needles():
    assert recall("They are 12, 34 and Foo.", ["12", "foo", "56"]) == pytest.approx(2 / 3)
    assert contains_any("It is PARIS.", ["London", "paris"]) == 1 and contains_any("", ["x"]) == 0
    assert recall("the baeler", ["bael"]) == 0


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("It is 4,821.", "4821"), ("4821", "4,821"), ("Granite \n ISLAND? Yes", "granite Island"), ("(Foo)", "foo"), ("_12_", "12"),
        ("C++, of course", "C++"), ("STRASSE", "straße"), ("答案是北京。", "北京"), ("서울은 크다", "서울"), ("It's Ann's", "Ann"), ("12.", "12"),
    ],
)  # fmt: skip
def test_an_answer_names_a_reference(answer, reference):
    assert names(answer, reference)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("It is 14,821", "4821"), ("4 821 or 1,4821", "48211"), ("4821.5", "4821"), ("0.12", "12"), ("Marlowe", "Marlow"),
        ("Annabel", "Ann"), ("xC++", "C++"), ("наука", "ука"), ("", "x"), ("12,345,678", "345"),
    ],
)  # fmt: skip
def test_a_part_of_a_word_is_no_answer(answer, reference):
    assert not names(answer, reference)


def test_classification():
    classes = ["Location", "Other location", "Number", "Date"]
    assert classification("Date", "Date", classes) == 1
    assert classification("Date or Number", "Date", classes) == 0.5
    assert classification("Number", "Date", classes) == classification("", "Date", classes) == 0
    inside = ["city", "Other city", "Other"]
    assert classification("Other city", "Other city", inside) == 1  # "city" and "Other" are parts of it


def test_numbers():
    assert (
        retrieval("Paragraph 3", "Paragraph 3") == 1
        and retrieval("3 or 13", "Paragraph 3") == 0.5
        and retrieval("none", "Paragraph 3") == 0
    )
    assert retrieval("段落7", "段落7") == 1
    assert count("17, no: 16", "16") == 0.5 and count("", "16") == 0
    with pytest.raises(ValueError, match="names no paragraph"):
        retrieval("3", "the third")


def test_the_best_reference_counts():
    assert score("f1", "the cat", ["dog", "cat"]) == 1
    assert score("recall", "1 2", ["1", "3"]) == 0.5 and score("any", "1 2", ["1", "3"]) == 1


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(extras, "_importable", lambda module: False)
    check_packages(["f1", "classification", "retrieval", "count", "recall"])
    for metric in ("rouge-l", "code"):
        with pytest.raises(extras.MissingExtra, match=r'needs rouge and rapidfuzz: pip install "laprox\[eval\]"'):
            check_packages([metric])
        with pytest.raises(extras.MissingExtra):
            score(metric, "a", ["a"])
    assert set(metrics._NEEDS_EXTRA) <= set(metrics.METRICS)


# --- means -----------------------------------------------------------------------------------------------------------


def test_errors_of_independent_values(rng):
    values = rng.normal(size=50).tolist()
    mean = mean_with_error(values, range(50))
    assert math.isclose(mean.mean, np.mean(values)) and (mean.n, mean.clusters) == (50, 50)
    assert math.isclose(mean.error, np.std(values, ddof=1) / math.sqrt(50))


def test_questions_about_one_document_are_not_independent(rng):
    """Values that are all alike within a document count once; the spread of resampled documents says so, too."""
    documents = rng.integers(0, 2, 12)
    values, clusters = np.repeat(documents, 10), np.repeat(np.arange(12), 10)
    mean = mean_with_error(values.tolist(), clusters.tolist())
    assert math.isclose(mean.error, np.std(documents, ddof=1) / math.sqrt(12))
    again = [documents[rng.integers(0, 12, 12)].mean() for _ in range(4000)]
    assert math.isclose(mean.error, np.std(again), rel_tol=0.1)
    assert mean_with_error(values.tolist(), range(120)).error < 0.4 * mean.error


def test_means_at_the_edges():
    assert math.isnan(mean_with_error([1.0], ["a"]).error)
    assert mean_with_error([1, 1, 1], ["a", "a", "b"]).error == 0
    assert mean_with_error([True, False, True, False], list("aabb")).percent() == "50 ± 29"
    with pytest.raises(ValueError, match="no mean"):
        mean_with_error([], [])


# --- rows ------------------------------------------------------------------------------------------------------------


def row(task, score, **more):
    return {"task": task, "score": score, "bytes": 1000, "entries": 10, **more}


def test_summary_of_rows():
    rows = {}
    for number in range(3):
        for question, task in enumerate(["niah-multikey", "qa"]):
            rows[key("mixed", 1000, number, question)] = row(task, 1.0, read_ms=5.0)
            for policy, right in (("laprox", number > 0), ("random", False)):
                rows[key("mixed", 1000, number, question, "aware", policy, "5%")] = row(task, float(right or task == "qa"), kl=0.5 * number)
    summary = Summary(rows.items())
    assert summary.complete and summary.documents == 3 and summary.policies == ["laprox", "random"]
    assert (summary.lengths, summary.regimes, summary.budgets) == ([1000], ["aware"], ["5%"])
    assert summary.tasks == ["niah-multikey", "qa"]
    laprox = summary.mean("score", "aware", "laprox", "5%", tasks=["niah-multikey"])
    assert laprox.mean == 2 / 3 and laprox.n == 3
    laprox = summary.mean("score", "aware", "laprox", "5%")
    assert laprox.mean == 5 / 6 and laprox.n == 6
    assert summary.mean("kl", "aware", "laprox", "5%").mean == 0.5
    assert summary.mean("kl") is None and summary.mean("score", "agnostic", "laprox", "5%") is None
    assert [name for name, _ in summary.table("score", "aware")] == ["full", "laprox", "random"]
    assert summary.curve("aware", "laprox")[:2] == ([1000], [5 / 6])

    # What not all have read doesn't count.
    del rows[key("mixed", 1000, 2, 1, "aware", "random", "5%")]
    summary = Summary(rows.items())
    assert not summary.complete and summary.documents == 2
    assert summary.mean("score", "aware", "laprox", "5%").mean == 0.75
    with pytest.raises(ValueError, match="no results"):
        Summary([])


def test_unequal_bytes_are_told():
    rows = {key("qa", 1000, 0, 0): row("qa", 1.0)}
    for policy, held in (("laprox", 1000), ("snapkv", 1020), ("cake", 990), ("adakv", 1100)):
        rows[key("qa", 1000, 0, 0, "aware", policy, "5%")] = row("qa", 1.0) | {"bytes": held}
    (said,) = Summary(rows.items()).unequal_bytes()
    assert "adakv +9%" in said and "snapkv" not in said


def test_what_was_not_measured_is_in_no_mean_and_said():
    row = {"task": "books", "score": 1.0, "bytes": 9, "entries": 1}
    rows = {key("books", 9, n, 0): row for n in range(2)} | {key("books", 9, n, 0, "aware", "laprox", "5%"): row for n in range(2)}
    rows |= {key("books", 9, n, 0, "aware", "lukv", "5%"): {"task": "books", "why_not": "no table"} for n in range(2)}
    summary = Summary(rows.items())
    assert summary.complete and summary.mean("score", "aware", "lukv", "5%") is None
    assert summary.mean("score", "aware", "laprox", "5%").n == 2
    assert summary.refused == ["lukv at 5% was not measured: no table"]


def test_a_list_counts_for_as_many_values():
    rows = {key("facts", 0, n, 3): {"task": "continuation", "kl": [n, 1.0, 2.0]} for n in range(2)}
    mean = Summary(rows.items()).mean("kl", tasks=["continuation"])
    assert (mean.mean, mean.n, mean.clusters) == (7 / 6, 6, 2)
