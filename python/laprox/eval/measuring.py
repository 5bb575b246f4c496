"""The long work of `laprox compare`: every contender on every document, as far as it is not in the results yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from laprox import _core
from laprox.eval.contenders import FULL, ROOM, SHORTER, Budget, Contender
from laprox.eval.examiner import Examiner, Logprobs, reference
from laprox.eval.reader import Reader
from laprox.eval.rows import Rows
from laprox.llama import Llama

READING = 0.2  # of the time of a token that is evaluated by itself, what one takes that is read with many; for the time left

Advance = Callable[[str, float, float | None], None]  # what is being done, by how much, and of how much (None: as before)


class Unable(ValueError):
    """llama.cpp makes no such context; says why."""


@dataclass(frozen=True)
class Job:
    """A row to measure: a contender, at a budget if it has one, on a document."""

    document: int
    contender: Contender
    budget: Budget | None

    @property
    def key(self) -> tuple[int, str, str]:
        """Of its row."""
        return (self.document, self.contender.name, self.budget.text if self.budget else "")

    @property
    def label(self) -> str:
        """For the progress bar."""
        return f"{self.contender.name} at {self.budget.text}" if self.budget else self.contender.name

    @property
    def context(self) -> tuple[int, str, str]:
        """Jobs with the same one share a context and a reading. The full cache, which all are compared with, comes first."""
        if self.contender.policy is None:
            return (0 if self.contender.name == FULL else 1, self.label, "")
        return (2, *self.contender.context)


class Comparison:
    """Measures what is missing in the results."""

    def __init__(
        self,
        rows: Rows,
        contenders: Sequence[Contender],
        budgets: Sequence[Budget],
        bytes_per_token: dict[str, float],
        refused: dict[str, str],
        open_llm: Callable[[Contender, int], Llama],
    ) -> None:
        """Prepare.

        Args:
            rows: Where the results go.
            contenders: The full cache among them.
            budgets: For those that have one.
            bytes_per_token: Of the layers that can be compressed, by cache type.
            refused: Why some contenders can't run, by name.
            open_llm: Makes the model for a contender, with a context of so many tokens.
        """
        self._rows = rows
        self._contenders = contenders
        self._budgets = budgets
        self._bytes = bytes_per_token
        self._refused = refused
        self._open = open_llm

    def run(self, examiners: Sequence[Examiner], advance: Advance) -> None:
        """Measure every document. Rows are added as they come."""
        advance("", 0.0, sum(self._work(i, examiner) for i, examiner in enumerate(examiners)))
        for i, examiner in enumerate(examiners):
            where = f"document {i + 1} of {len(examiners)}: " if len(examiners) > 1 else ""

            def step(what: str, n: float, where: str = where) -> None:
                advance(where + what, n, None)

            self._document(i, examiner, step)

    def _groups(self, i: int) -> list[list[Job]]:
        """What is missing of a document, by context."""
        jobs = [Job(i, c, budget) for c in self._contenders for budget in (self._budgets if c.budgeted else [None])]
        missing = sorted((job for job in jobs if job.key not in self._rows), key=lambda job: job.context)
        groups = [list(group) for _, group in groupby(missing, lambda job: job.context)]
        if groups and groups[0][0].contender.name != FULL:  # its row is there, but what the others are compared with is not
            groups.insert(0, [])
        return groups

    def _work(self, i: int, examiner: Examiner) -> float:
        """How long a document will take, in tokens that are evaluated one by one."""
        groups = self._groups(i)
        if not groups:
            return 0.0
        reading = READING * len(groups) * examiner.material.n_read
        return reading + len(examiner.material.continuation) + sum(map(len, groups)) * examiner.steps

    def _document(self, i: int, examiner: Examiner, advance: Callable[[str, float], None]) -> None:
        groups = self._groups(i)
        if not groups:
            return
        first, *others = groups
        with self._read(Contender(FULL), examiner, examiner.material.n_read, advance) as reader:
            full = reference(reader, examiner.material, lambda: advance(FULL, 1))
            for job in first:
                self._rows.add(job.key, self._stock(job, examiner, reader, full, advance))
        for group in others:
            self._group(group, examiner, full, advance)

    def _group(
        self, group: Sequence[Job], examiner: Examiner, full: Logprobs, advance: Callable[[str, float], None]
    ) -> None:
        contender, material = group[0].contender, examiner.material
        n_read = material.n_read
        why_not = self._refused.get(contender.name)
        if contender.name == SHORTER:
            assert group[0].budget is not None
            n_read = int(group[0].budget.tokens(n_read, self._bytes["f16"]))
            if n_read <= len(material.prefix):
                why_not = "the chat template alone is longer"
        try:
            if why_not is None:
                with self._read(contender, examiner, n_read, advance) as reader:
                    for job in group:
                        measure = self._stock if contender.policy is None else self._compressed
                        self._rows.add(job.key, measure(job, examiner, reader, full, advance))
        except Unable as error:
            why_not = str(error)
        for job in group if why_not else ():
            self._rows.add(job.key, {"why_not": why_not})

    @contextmanager
    def _read(
        self, contender: Contender, examiner: Examiner, n_read: int, advance: Callable[[str, float], None]
    ) -> Iterator[Reader]:
        """A reader that has read the document, or as much of its end as n_read tokens hold."""
        material = examiner.material
        done = 0

        def progress(n: int) -> None:
            nonlocal done
            advance(f"reading for {contender.name}", READING * (n - done))
            done = n

        try:
            llm = self._open(contender, material.context_size(n_read, examiner.predict))
        except ValueError as error:
            raise Unable(error) from None
        try:
            reader = Reader(llm, keep_asked=False)
            reader.read(material.last(n_read), progress)
            yield reader
        finally:
            llm.close()

    def _stock(
        self, job: Job, examiner: Examiner, reader: Reader, full: Logprobs, advance: Callable[[str, float], None]
    ) -> dict[str, Any]:
        # llama.cpp rounds contexts up to 256 tokens; that is not held against it.
        n_read = len(reader.document)
        row: dict[str, Any] = {"read": n_read, "allocated": int(self._bytes[job.contender.cache_type] * (n_read + ROOM))}
        if job.budget:
            row["target"] = self._target(job, examiner)
        return row | examiner.examine(reader, full, advance=lambda n: advance(job.label, n))

    def _compressed(
        self, job: Job, examiner: Examiner, reader: Reader, full: Logprobs, advance: Callable[[str, float], None]
    ) -> dict[str, Any]:
        cache_type, target = job.contender.cache_type, self._target(job, examiner)
        if target >= self._bytes[cache_type] * (examiner.material.n_read + ROOM):
            return {"why_not": f"a {cache_type} cache of everything is smaller than this budget"}
        budget = f"{target // 1024}KiB"
        try:
            row = examiner.examine(reader, full, job.contender.policy, budget, lambda n: advance(job.label, n))
        except _core.LaproxError as error:
            return {"why_not": str(error)}
        return {"read": len(reader.document), "target": target} | row

    def _target(self, job: Job, examiner: Examiner) -> int:
        assert job.budget is not None
        return job.budget.bytes(examiner.material.n_read, self._bytes["f16"])
