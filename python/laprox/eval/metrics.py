"""How far an answer is from what is right, and a distribution from the full cache's.

Distributions are rows of log-probabilities in float64: [n, vocabulary]. Answers are texts.

The measures of texts follow LongBench (arXiv 2308.14508), those of needles RULER (arXiv 2404.06654). ROUGE-L and code
similarity are computed by the packages rouge and rapidfuzz: `pip install "laprox[eval]"`.
"""

from __future__ import annotations

import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from laprox import extras

Floats = npt.NDArray[np.float64]


# --- distributions ---------------------------------------------------------------------------------------------------


def log_softmax(logits: npt.ArrayLike) -> Floats:
    """Log-probabilities of logits [..., vocabulary]."""
    x = np.asarray(logits, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def kl_divergence(full: npt.ArrayLike, now: npt.ArrayLike) -> Floats:
    """From the distributions `full` to `now`, in nats: log-probabilities [..., vocabulary] -> [...]."""
    full, now = np.asarray(full, np.float64), np.asarray(now, np.float64)
    p = np.exp(full)
    with np.errstate(invalid="ignore"):  # what is impossible under `full` adds nothing, whatever it is under `now`
        terms = np.where(p > 0, p * (full - now), 0.0)
    return np.maximum(terms.sum(-1), 0.0)  # roundings of equal distributions


def agreement(full: npt.ArrayLike, now: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Whether both have the same likeliest token: [..., vocabulary] -> [...]."""
    return np.asarray(full).argmax(-1) == np.asarray(now).argmax(-1)


# --- texts -----------------------------------------------------------------------------------------------------------


def recall(answer: str, references: Sequence[str]) -> float:
    """The share of the references that an answer names (see names()): RULER's score of needles, but for whole words."""
    return sum(names(answer, reference) for reference in references) / len(references)


def contains_any(answer: str, references: Sequence[str]) -> float:
    """1 if an answer names one of the references (see names()): RULER's score of question answering, but for whole words."""
    return float(any(names(answer, reference) for reference in references))


def names(answer: str, reference: str) -> bool:
    """Whether an answer contains a reference as whole words, whatever case, accents and punctuation are.

    4,821 is 4821, and no part of 14821 or 4821.5; twenty-five is twenty five.
    Chinese, Japanese, Korean and the scripts of South-East Asia, which don't put a space between words or before an ending,
    need no word's end.
    """
    plain = _plain(reference)
    return re.search(_bounded(plain), _plain(answer)) is not None if plain else reference in answer


# A letter or digit of a script that puts spaces between words.
_LETTER = r"[^\W_\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"


def _plain(text: str) -> str:
    text = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", unicodedata.normalize("NFC", text))
    text = re.sub(r"(?<!\d)[.,]|[.,](?!\d)", " ", text)  # what is left stands between digits
    return " ".join(re.sub(r"[^\w.,]|_", " ", text).split())


def _bounded(reference: str) -> str:
    begin, end = rf"(?<!{_LETTER})", rf"(?!{_LETTER})"
    return (
        (begin if re.match(_LETTER, reference) else "")
        + (r"(?<!\d[.,])" if reference[:1].isdigit() else "")
        + re.escape(reference)
        + (end if re.search(_LETTER + r"\Z", reference) else "")
        + (r"(?![.,]\d)" if reference[-1:].isdigit() else "")
    )


def words(text: str) -> list[str]:
    """Of an English text, as SQuAD's F1 compares them: lower case, without punctuation and articles."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def f1(answer: str, reference: str) -> float:
    """The harmonic mean of the share of the answer's words that the reference has, and the other way round."""
    a, b = words(answer), words(reference)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b)) if common else 0.0


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L as LongBench takes it from the package rouge: sentence by sentence, each distinct word once.

    It is 0 for a text without a sentence.
    """
    extras.need("eval", "ROUGE-L")
    from rouge import Rouge

    if not answer.strip(".") or not reference.strip("."):
        return 0.0
    before = sys.getrecursionlimit()
    # rouge recurses once per word of two sentences; LongBench gives 0 where Python's limit ends that.
    sys.setrecursionlimit(before + len(answer) + len(reference))
    try:
        return float(Rouge(metrics=["rouge-l"]).get_scores(answer, reference)[0]["rouge-l"]["f"])
    finally:
        sys.setrecursionlimit(before)


def classification(answer: str, reference: str, classes: Sequence[str]) -> float:
    """1 / n if the right class is among the n classes that an answer names, or else 0.

    A class whose name is part of the right one's does not count as named.
    """
    named = [c for c in classes if c in answer and (c == reference or c not in reference)]
    return 1 / len(named) if reference in named else 0.0


def retrieval(answer: str, reference: str) -> float:
    """The share of the numbers in an answer that are the one in the reference, as in "Paragraph 3"."""
    number = re.search(r"\d+", reference)
    if number is None:
        raise ValueError(f"the reference {reference!r} names no paragraph: there is no number in it")
    return count(answer, number[0])


def count(answer: str, reference: str) -> float:
    """The share of the numbers in an answer that are the reference."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def code_similarity(answer: str, reference: str) -> float:
    """Of the first line of an answer that looks like code: 1 - edits / (both lengths), by the package rapidfuzz.

    Edits are insertions and deletions of characters. Lines with "`", "#" or "//" are taken for comments.
    """
    extras.need("eval", "code similarity")
    from rapidfuzz import fuzz

    lines = (line for line in answer.lstrip("\n").split("\n") if not any(mark in line for mark in ("`", "#", "//")))
    return float(fuzz.ratio(next(lines, ""), reference)) / 100


Score = Callable[[str, str, Sequence[str]], float]
METRICS: dict[str, Score] = {  # answer, reference, classes -> 0 to 1
    "f1": lambda answer, reference, _: f1(answer, reference),
    "rouge-l": lambda answer, reference, _: rouge_l(answer, reference),
    "classification": classification,
    "retrieval": lambda answer, reference, _: retrieval(answer, reference),
    "count": lambda answer, reference, _: count(answer, reference),
    "code": lambda answer, reference, _: code_similarity(answer, reference),
}


def score(metric: str, answer: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
    """What an answer is worth, 0 to 1: by one of METRICS, the best of the references counting; "recall"; or "any"."""
    if metric == "recall":
        return recall(answer, references)
    if metric == "any":
        return contains_any(answer, references)
    return max(METRICS[metric](answer, reference, classes) for reference in references)


_NEEDS_EXTRA = {"rouge-l": "ROUGE-L", "code": "code similarity"}


def check_packages(metrics: Iterable[str]) -> None:
    """Raises MissingExtra if one of these METRICS needs a package that is not installed."""
    for metric in metrics:
        if metric in _NEEDS_EXTRA:
            extras.need("eval", _NEEDS_EXTRA[metric])
