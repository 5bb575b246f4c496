"""Means whose standard errors know that questions about one document are not independent."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mean:
    """A mean over `n` values of `clusters` documents, with one standard error."""

    mean: float
    error: float
    n: int
    clusters: int

    def percent(self) -> str:
        """`0.5 ± 0.125` as "50 ± 12"."""
        return f"{100 * self.mean:.0f} ± {100 * self.error:.0f}"


def mean_with_error(values: Sequence[float], clusters: Sequence[Hashable]) -> Mean:
    """The mean of values that come in clusters, such as the questions about one document.

    The standard error is the larger of two: that of independent values, and that of independent clusters (the ratio
    estimator of cluster sampling), which is the larger one where the values of a cluster are alike. Both are 0 where all
    values are equal, and of a single value nothing is known: nan.

    Args:
        values: Numbers or truth values, [n].
        clusters: What each value belongs to, [n].

    Raises:
        ValueError: There are no values, or not one cluster per value.
    """
    if not len(values) or len(values) != len(clusters):
        raise ValueError(f"{len(values)} values of {len(clusters)} clusters have no mean")
    n = len(values)
    mean = math.fsum(values) / n
    groups: dict[Hashable, list[float]] = defaultdict(list)
    for value, cluster in zip(values, clusters):
        groups[cluster].append(float(value) - mean)
    if n == 1:
        return Mean(mean, math.nan, 1, 1)
    error = math.sqrt(math.fsum(d * d for group in groups.values() for d in group) / (n - 1) / n)
    if (m := len(groups)) > 1:
        between = math.fsum(math.fsum(group) ** 2 for group in groups.values())
        error = max(error, math.sqrt(between * m / (m - 1)) / n)
    return Mean(mean, error, n, m)
