"""From rows to a table and a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from laprox.eval.contenders import FULL, SHORTER, Contender
from laprox.eval.rows import Rows
from laprox.eval.statistics import Mean, mean_with_error

EQUAL = 0.05  # allocated bytes may differ from the budget's by so much
KEPT = 0.9  # of the answers that the full cache gives: a contender with fewer is not worth having
SENSIBLE = 0.3  # of all answers that the full cache must give for recall to mean something


@dataclass(frozen=True)
class Entry:
    """One contender at one budget, over all documents. Times and memory differ from run to run, the rest doesn't.

    Attributes:
        name: The contender.
        budget: "" where it has none.
        why_not: Why it was not measured; then the numbers are None.
        allocated: Bytes, the mean over the documents; `target` are those of the budget.
        share: Of the full cache's bytes.
        right: Share of the questions.
        kept: Of the questions that the full cache answers, those that it answers, too.
        known: How many the full cache answers.
        kl, agreement: Against the full cache, per token.
        perplexity: Of the continuations.
        decode, prefill: Tokens per second, and seconds for the document, as ratios to the full cache's: the median over the
            documents.
        resident: Bytes of the process.
    """

    name: str
    budget: str
    why_not: str = ""
    allocated: int | None = None
    target: int | None = None
    share: float | None = None
    right: Mean | None = None
    kept: int = 0
    known: int = 0
    kl: Mean | None = None
    agreement: Mean | None = None
    perplexity: float | None = None
    decode: float | None = None
    prefill: float | None = None
    resident: int | None = None

    @property
    def label(self) -> str:
        """Name and budget."""
        return f"{self.name} at {self.budget}" if self.budget else self.name

    @property
    def unequal(self) -> str:
        """Why its bytes are not the budget's, or ""."""
        if self.target is None or self.allocated is None or abs(self.allocated / self.target - 1) <= EQUAL:
            return ""
        off = self.allocated / self.target - 1
        by = f"{abs(off):.0%} {'more' if off > 0 else 'less'}"
        return f"{self.label} takes {by} than the budget's bytes, by whole blocks and padding"


def entries(rows: Rows, contenders: Sequence[Contender], budgets: Sequence[str], n_documents: int) -> list[Entry]:
    """A table: contenders without a budget, then for each budget the others. What has no row yet is left out."""
    found = []
    for contender in contenders:
        if not contender.budgeted:
            found += _entry(rows, contender.name, "", n_documents)
    for budget in budgets:
        for contender in contenders:
            if contender.budgeted:
                found += _entry(rows, contender.name, budget, n_documents)
    return found


def verdict(table: Sequence[Entry], budgets: Sequence[str]) -> str:
    """What to do, in one sentence.

    A contender holds up at a budget if it gives at least KEPT of the answers that the full cache gives. The best at a budget
    has the most of them, then the smallest KL divergence.
    """
    full = next((e for e in table if e.name == FULL and e.right), None)
    if full is None or full.right is None:
        return "Nothing can be said yet: the full cache was not measured."
    n = full.right.n
    if full.right.mean < SENSIBLE or full.known < 3:
        return (
            f"No verdict: even with the full cache this model answers only {full.known} of {n} questions about facts in the "
            "text, so recall can't tell the contenders apart; compare their KL divergence and agreement instead."
        )
    best = {b: _best([e for e in table if e.budget == b and e.right]) for b in budgets}
    measured = [b for b in budgets if best[b]]
    if not measured:
        return "Nothing can be said yet: no budget was measured."
    falls = next((b for b in reversed(measured) if not _holds(best[b])), None)
    holding = measured[measured.index(falls) + 1 :] if falls else measured
    if not holding:
        top = best[measured[-1]]
        assert top is not None
        beside = [e for e in table if not e.budget and e.name != FULL and e.right and _holds(e)]
        instead = f"; a {beside[-1].name} cache, {beside[-1].share:.0%} of the bytes, keeps {beside[-1].kept}" if beside else ""
        return (
            f"Don't compress this model to {measured[-1]} or less: there the best, {_called(top)}, keeps {top.kept} of the "
            f"{top.known} answers that the full cache gives{instead}."
        )
    least = best[holding[0]]
    assert least is not None and least.agreement is not None
    kept = f"{_called(least)} keeps {least.kept} of the {least.known} answers that the full cache gives"
    agrees = f"the next token is the same in {least.agreement.mean:.0%} of the places"
    versus = _versus(least, [e for e in table if e.budget == least.budget and e.right])
    if falls:
        failing = best[falls]
        assert failing is not None
        return (
            f"Don't compress this model below {least.budget}: there {kept} and {agrees}{versus}, but at {falls} no more than "
            f"{failing.kept} are left ({_called(failing)})."
        )
    return f"{least.budget}, the smallest budget tried, is enough here: {kept} and {agrees}{versus}."


def _best(entries: Sequence[Entry]) -> Entry | None:
    return max(entries, key=lambda e: (e.kept, -e.kl.mean if e.kl else -math.inf), default=None)


def _holds(entry: Entry | None) -> bool:
    return entry is not None and entry.kept >= KEPT * entry.known


def _called(entry: Entry) -> str:
    return "a shorter context" if entry.name == SHORTER else entry.name


def _versus(best: Entry, entries: Sequence[Entry]) -> str:
    other = next((e for e in entries if e.name == SHORTER and e is not best), None)
    return f" (a context cut to the same bytes keeps {other.kept})" if other else ""


def _entry(rows: Rows, name: str, budget: str, n_documents: int) -> list[Entry]:
    found = [(i, rows[i, name, budget]) for i in range(n_documents) if (i, name, budget) in rows]
    if not found:
        return []
    measured = [(i, row) for i, row in found if "why_not" not in row and (i, FULL, "") in rows]
    if not measured:
        return [Entry(name, budget, found[0][1].get("why_not", "the full cache was not measured"))]
    full = {i: rows[i, FULL, ""] for i, _ in measured}
    clusters = [i for i, row in measured for _ in row["right"]]
    tokens = [i for i, row in measured for _ in row["kl"]]
    pairs = [(mine, whole) for i, row in measured for mine, whole in zip(row["right"], full[i]["right"])]
    allocated = _mean([row["allocated"] for _, row in measured])
    return [
        Entry(
            name,
            budget,
            allocated=round(allocated),
            target=round(_mean([row["target"] for _, row in measured])) if budget else None,
            share=allocated / _mean([whole["allocated"] for whole in full.values()]),
            right=mean_with_error([mine for mine, _ in pairs], clusters),
            kept=sum(mine and whole for mine, whole in pairs),
            known=sum(whole for _, whole in pairs),
            kl=mean_with_error([x for _, row in measured for x in row["kl"]], tokens),
            agreement=mean_with_error([x for _, row in measured for x in row["agreement"]], tokens),
            perplexity=math.exp(_mean([x for _, row in measured for x in row["nll"]])),
            decode=_ratio(measured, full, "decode_tps"),
            prefill=_ratio(measured, full, "prefill_s"),
            resident=_largest([row["timings"]["rss"] for _, row in measured]),
        )
    ]


def _ratio(measured: Sequence[tuple[int, dict[str, Any]]], full: dict[int, dict[str, Any]], what: str) -> float | None:
    pairs = [(row["timings"][what], full[i]["timings"][what]) for i, row in measured]
    return median(mine / whole for mine, whole in pairs) if all(mine and whole for mine, whole in pairs) else None


def _largest(values: Sequence[int | None]) -> int | None:
    return max((v for v in values if v is not None), default=None)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
