"""From rows to a table and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from laprox.eval.contenders import FULL, Contender
from laprox.eval.jobs import CONTINUATION, FACTS
from laprox.eval.means import Mean
from laprox.eval.reader import SHORTER
from laprox.eval.summary import Summary

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
        allocated: Bytes, the mean over the documents.
        target: Those of the budget.
        share: Of the full cache's bytes.
        entries: Share of the entries that is held.
        right: Share of the questions.
        kept: Of the questions that the full cache answers, those that it answers, too.
        known: How many the full cache answers.
        kl: Divergence from the full cache, in nats per token.
        agreement: How often both find the same token likeliest.
        perplexity: Of the continuations.
        decode: Tokens per second, as a ratio to the full cache's: the median over the documents.
        prefill: Seconds for the document, likewise.
        resident: Bytes of the process.
    """

    name: str
    budget: str
    why_not: str = ""
    allocated: int | None = None
    target: int | None = None
    share: float | None = None
    entries: float | None = None
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


def entries(summary: Summary, contenders: Sequence[Contender], budgets: Sequence[str], regime: str) -> list[Entry]:
    """A table: contenders without a budget, then for each budget the others. What has no row yet is left out.

    Args:
        summary: Of the rows of `laprox compare`.
        contenders: Their names.
        budgets: As they were given.
        regime: Of the questions.
    """
    columns = [(c, "") for c in contenders if not c.budgeted] + [(c, b) for b in budgets for c in contenders if c.budgeted]
    return [entry for c, budget in columns for entry in _entry(summary, c.name, budget, regime)]


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


def _entry(summary: Summary, name: str, budget: str, regime: str) -> list[Entry]:
    asked, told = (regime if budget else "", name, budget), ("agnostic" if budget else "", name, budget)
    full = summary.full_cell("")
    rows = [row.values for row in summary.rows(told, [CONTINUATION])]
    measured = [values for values in rows if "why_not" not in values]
    pairs = summary.pairs(asked, full, tasks=[FACTS])
    if not measured or not pairs:
        return [Entry(name, budget, rows[0].get("why_not", "the full cache was not measured"))] if rows else []

    def mean(what: str) -> Mean | None:
        return summary.mean(what, *told, tasks=[CONTINUATION])

    def ratio(what: str) -> float | None:
        found = summary.pairs(told, full, what, [CONTINUATION])
        return median(mine / whole for mine, whole in found) if found and all(map(all, found)) else None

    held, whole, target = (mean("bytes"), summary.mean("bytes", *full, tasks=[CONTINUATION]), mean("target"))
    nll = mean("nll")
    assert held and whole and nll
    of_all = summary.pairs(told, full, "read", [CONTINUATION])
    return [
        Entry(
            name,
            budget,
            allocated=round(held.mean),
            target=round(target.mean) if target else None,
            share=held.mean / whole.mean,
            entries=_share(measured) or sum(mine for mine, _ in of_all) / sum(all_ for _, all_ in of_all),
            right=summary.mean("score", *asked, tasks=[FACTS]),
            kept=sum(bool(mine and theirs) for mine, theirs in pairs),
            known=sum(bool(theirs) for _, theirs in pairs),
            kl=mean("kl"),
            agreement=mean("agreement"),
            perplexity=math.exp(nll.mean),
            decode=ratio("decode_tps"),
            prefill=ratio("read_s"),
            resident=max((values["rss"] for values in measured if values["rss"]), default=None),
        )
    ]


def _share(measured: Sequence[Mapping[str, Any]]) -> float | None:
    """Of the entries, those that are held; None where llama.cpp holds all that it reads."""
    held = [(values["entries"], values["entries_full"]) for values in measured if "entries" in values]
    return sum(mine for mine, _ in held) / sum(whole for _, whole in held) if held else None
