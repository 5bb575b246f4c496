"""How far an answer is from what is right, and a distribution from the full cache's.

Distributions are rows of log-probabilities in float64: [n, vocabulary]. Answers are texts.

The measures of texts follow LongBench (arXiv 2308.14508), those of needles RULER (arXiv 2404.06654). ROUGE-L and code
similarity are computed by the packages rouge-score and rapidfuzz: `pip install "laprox[eval]"`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

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


def perplexity(logprobs: npt.ArrayLike, tokens: Sequence[int]) -> float:
    """Of a text: exp of the mean of -log p.

    Args:
        logprobs: Row i is what was expected where tokens[i] came: [n, vocabulary].
        tokens: [n].

    Raises:
        ValueError: There are not as many rows as tokens, or none.
    """
    rows = np.asarray(logprobs, np.float64)
    if not len(tokens) or len(rows) != len(tokens):
        raise ValueError(f"{len(rows)} distributions of {len(tokens)} tokens have no perplexity")
    return float(np.exp(-rows[np.arange(len(tokens)), np.asarray(tokens)].mean()))
