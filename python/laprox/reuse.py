"""When a compressed cache answers a prompt: what it was compressed for decides what it still holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

_MERGED = 4  # the last tokens of a prompt, which may be others where text follows


def common_prefix(cached: npt.NDArray[np.intc], tokens: Sequence[int]) -> int:
    """How many tokens two prompts begin with alike."""
    n = min(len(cached), len(tokens))
    differ = np.flatnonzero(cached[:n] != np.asarray(tokens[:n], dtype=np.int64))
    return int(differ[0]) if differ.size else n


def contains(tokens: Sequence[int], prompt: npt.NDArray[np.intc], detokenize: Callable[[list[int]], bytes]) -> bool:
    """Whether `tokens` begin with a prompt, all of it: as tokens, or as text where its last tokens merged with what follows."""
    prefix = common_prefix(prompt, tokens)
    rest = prompt[prefix:].tolist()
    if not rest:
        return True
    if len(rest) > _MERGED or prefix == len(tokens):
        return False
    return detokenize(list(tokens[prefix : prefix + len(rest) + 1])).startswith(detokenize(rest))
