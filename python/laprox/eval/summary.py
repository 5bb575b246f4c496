"""What the rows of `laprox eval` say: means with standard errors over the documents that all policies have read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from laprox.config import policies
from laprox.eval.means import Mean, mean_with_error
from laprox.eval.reader import REGIMES
from laprox.eval.tasks import TASKS

Key = tuple[Any, ...]


def key(family: str, length: int, number: int, question: int, regime: str = "", policy: str = "full", budget: str = "") -> Key:
    """Of a row; the full cache has no budget, and no regime but "follow-up", where it was asked something else before."""
    return family, length, number, question, regime, policy, budget


@dataclass(frozen=True)
class Row:
    """A row with the parts of its key."""

    document: tuple[str, int, int]  # family, length, number
    question: int
    cell: tuple[str, str, str]  # regime, policy, budget
    values: Mapping[str, Any]

    @property
    def length(self) -> int:
        return self.document[1]

    @property
    def task(self) -> str:
        return str(self.values["task"])


class Summary:
    """Means over rows.

    Attributes:
        complete: Whether every policy has read every document. If not, only those count that all have read; while there is
            no such document, all do.
        documents: So many count.
        lengths, tasks, regimes, policies, budgets: Those that there are; policies without "full".
    """

    def __init__(self, rows: Iterable[tuple[Sequence[Any], Mapping[str, Any]]]) -> None:
        """Raises ValueError if there are none."""
        every = [Row((k[0], k[1], k[2]), k[3], (k[4], k[5], k[6]), values) for k, values in rows]
        whole = _whole_documents(every)
        found = {row.document for row in every}
        self.complete = whole == found
        self._rows = [row for row in every if row.document in whole] if whole else every
        if not self._rows:
            raise ValueError("there are no results yet")
        self.documents = len(whole or found)
        self.lengths = sorted({row.length for row in self._rows})
        self.tasks = sorted(_ordered(row.task for row in self._rows), key=lambda t: TASKS.index(t) if t in TASKS else len(TASKS))
        self.regimes = [r for r in REGIMES if any(row.cell[0] == r for row in self._rows)]
        known = policies()
        self.policies = sorted(
            _ordered(row.cell[1] for row in self._rows if row.cell[2]), key=lambda p: known.index(p) if p in known else len(known)
        )
        self.budgets = _ordered(row.cell[2] for row in self._rows if row.cell[2])
        self._cells: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
        for row in self._rows:
            self._cells[row.cell].append(row)

    def mean(
        self,
        name: str,
        regime: str = "",
        policy: str = "full",
        budget: str = "",
        length: int | None = None,
        tasks: Sequence[str] = (),
        later: bool = False,
    ) -> Mean | None:
        """The mean of a value of the rows ("score", "kl", "bytes", ...), or None if there is none.

        Args:
            name: Of the value; a list counts for as many.
            regime, policy, budget: Which cell; as they are, the full cache's (see `full_cell`).
            length: Of the documents; None: all.
            tasks: Those that count; none named: all.
            later: Whether a document's first question doesn't count: a follow-up has no such row.
        """
        rows = [
            row
            for row in self.rows((regime, policy, budget), tasks)
            if length in (None, row.length) and name in row.values and (row.question > 0 or not later)
        ]
        values = [(value, row.document) for row in rows for value in _each(row.values[name])]
        return mean_with_error(*zip(*values)) if values else None

    @property
    def refused(self) -> list[str]:
        """What could not be measured, and why: a sentence each."""
        found = {(*row.cell[1:], row.values["why_not"]) for row in self._rows if "why_not" in row.values}
        return [f"{policy} at {budget} was not measured: {why}" for policy, budget, why in sorted(found)]

    def rows(self, cell: tuple[str, str, str], tasks: Sequence[str] = ()) -> list[Row]:
        """Of a cell (regime, policy, budget)."""
        return [row for row in self._cells.get(cell, []) if not tasks or row.task in tasks]

    @staticmethod
    def full_cell(regime: str) -> tuple[str, str, str]:
        """Where the full cache's rows are that a regime is compared with."""
        return ("follow-up" if regime == "follow-up" else "", "full", "")

    def table(
        self, name: str, regime: str, length: int | None = None, tasks: Sequence[str] = ()
    ) -> list[tuple[str, list[Mean | None]]]:
        """A line per policy, its value at each budget; the full cache's is the first, if it has such a value."""
        lines: list[tuple[str, list[Mean | None]]] = []
        if full := self.mean(name, *self.full_cell(regime), length, tasks):
            lines.append(("full", [full for _ in self.budgets]))
        for policy in self.policies:
            lines.append((policy, [self.mean(name, regime, policy, budget, length, tasks) for budget in self.budgets]))
        return lines

    def pairs(
        self, one: tuple[str, str, str], other: tuple[str, str, str], name: str = "score", tasks: Sequence[str] = ()
    ) -> list[tuple[float, float]]:
        """A value of the rows in two cells (regime, policy, budget), question by question, where both have it."""
        second = {(row.document, row.question): row.values[name] for row in self._cells.get(other, []) if name in row.values}
        return [
            (row.values[name], second[row.document, row.question])
            for row in self.rows(one, tasks)
            if name in row.values and (row.document, row.question) in second
        ]

    def curve(
        self, regime: str, policy: str, length: int | None = None, name: str = "score"
    ) -> tuple[list[float], list[float], list[float]]:
        """Bytes, values and standard errors at the budgets of a policy; of "full", one point."""
        cells = [self.full_cell(regime)] if policy == "full" else [(regime, policy, budget) for budget in self.budgets]
        points = [(self.mean("bytes", *cell, length), self.mean(name, *cell, length)) for cell in cells]
        points = [(b, s) for b, s in points if b and s]
        return [b.mean for b, _ in points], [s.mean for _, s in points], [s.error for _, s in points]  # type: ignore[union-attr]

    def unequal_bytes(self, within: float = 0.05) -> list[str]:
        """Where policies differ in what they hold at one budget by more than a share: a sentence each."""
        said = []
        for regime in self.regimes:
            for length in self.lengths:
                for budget in self.budgets:
                    held = {p: m.mean for p in self.policies if (m := self.mean("bytes", regime, p, budget, length))}
                    if not held:
                        continue
                    middle = float(np.median(list(held.values())))
                    off = {p: b / middle - 1 for p, b in held.items() if abs(b / middle - 1) > within}
                    if off:
                        which = ", ".join(f"{policy} {share:+.0%}" for policy, share in off.items())
                        said.append(
                            f"{regime}, {length:,} tokens, {budget}: {which} against the median of {middle / 1024:,.0f} KiB"
                        )
        return said


def _whole_documents(rows: Sequence[Row]) -> set[tuple[str, int, int]]:
    """Documents whose every question was asked in all cells that their family, length and task have."""
    wanted: dict[tuple[str, int, str], set[tuple[str, str, str]]] = defaultdict(set)
    have: dict[tuple[str, int, int], dict[tuple[int, str], set[tuple[str, str, str]]]] = defaultdict(lambda: defaultdict(set))
    for row in rows:
        wanted[_group(row.document, row.task)].add(row.cell)
        have[row.document][row.question, row.task].add(row.cell)

    def whole(document: tuple[str, int, int], question: int, task: str, cells: set[tuple[str, str, str]]) -> bool:
        # The first question follows nothing.
        return cells == {cell for cell in wanted[_group(document, task)] if question or cell[0] != "follow-up"}

    return {d for d, asked in have.items() if all(whole(d, i, task, cells) for (i, task), cells in asked.items())}


def _group(document: tuple[str, int, int], task: str) -> tuple[str, int, str]:
    return document[0], document[1], task


def _each(value: Any) -> Sequence[float]:
    return value if isinstance(value, list) else [value]


def _ordered(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
