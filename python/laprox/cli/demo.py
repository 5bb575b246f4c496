"""`laprox demo`: reading a document with a small cache, shown on a real model."""

from __future__ import annotations


def demo() -> None:
    """Answer questions about a document from a part of its cache."""
    raise ValueError("laprox demo has no model to show; use laprox chat MODEL --document DOCUMENT")
