"""What `laprox eval` and `laprox compare` have in common: contender x document x question -> rows, as far as they are missing.

A plan says what is read in which context, and what is asked then: plan_policies() for policies at shares of what was read,
plan_alternatives() for policies beside what else takes less memory, at equal bytes. run() does it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from laprox import LaproxError, Llama, _core
from laprox._upstream import LlamaModel
from laprox.cache_types import Types
from laprox.chat.tokens import text_of
from laprox.eval.contenders import FULL, ROOM, Budget, Contender
from laprox.eval.jobs import Job
from laprox.eval.reader import REGIMES, SHORTER, Reader, Setting, made_with, suits, types_of
from laprox.eval.rows import Rows
from laprox.eval.summary import Key, key
from laprox.eval.trials import ALONG, Trials, order

READING = 0.2  # of the time of a token that is evaluated by itself, what one takes that is read with many; for the time left

Told = Callable[[str, float], None]
"""Is told what is being done, and how much of the work that was."""


@dataclass(frozen=True)
class Cell:
    """A contender at a budget under a regime, for one document.

    Attributes:
        name: Of the contender.
        budget: As the user wrote it; "" where it has none.
        regime: As the row's key has it: "" where nothing is compressed, and nothing was asked before.
        setting: What the reader is told.
        known: What the row says beside what is measured: "target", bytes of the budget; "bytes" that stock llama.cpp allocates.
        why_not: Why it can't be measured, or "".
    """

    name: str
    budget: str
    regime: str
    setting: Setting
    known: Mapping[str, int] = field(default_factory=dict)
    why_not: str = ""

    def key(self, job: Job, i: int) -> Key:
        """Of the row of question i."""
        return key(job.family, job.length, job.number, i, self.regime, self.name, self.budget)


Trial = tuple[int, Cell]
"""A question of a document, and under what it is asked."""


@dataclass(frozen=True)
class Reading:
    """A document that is read, and what is asked then.

    Attributes:
        job: The document.
        context: Readings in a row with the same one share a Llama.
        open: Makes it.
        trials: What is missing, in the order in which the reader has least to do.
        label: What this is about, for people.
        n_read: Tokens of the document's end that are read, with those before it; None: all.
        optional: Whether it is a result, too, if there can be no such context.
        reference: The context whose full cache it is compared with; None: its own.
    """

    job: Job
    context: tuple[str | int, ...]
    open: Callable[[], Llama]
    trials: Sequence[Trial]
    label: str
    n_read: int | None = None
    optional: bool = False
    reference: tuple[str | int, ...] | None = None

    @property
    def tokens(self) -> list[int]:
        """Those that are read."""
        return self.job.opening if self.n_read is None else self.job.end(self.n_read)

    @property
    def work(self) -> float:
        """About how long it takes, in tokens that are evaluated one by one."""
        return READING * len(self.tokens) + sum(_work(self.job, i) for i, _ in self.trials)


def run(readings: Sequence[Reading], rows: Rows, vocabulary: LlamaModel, told: Told, along: int = ALONG, window: int | None = None) -> None:
    """Measure. Rows are added as they come.

    Args:
        readings: What to do.
        rows: Where the results go.
        vocabulary: Of the model.
        told: Is told what is being done; all of it together is the sum of `work`.
        window: See Reader.
        along: See Trials. 0 also keeps memory low, at the price of reading questions again.

    Raises:
        ValueError: A context that is not optional can't be made.
    """
    llm: Llama | None = None
    opened: tuple[str | int, ...] = ()
    compared: Hashable = None  # the document, and the context that can be compared with
    full: dict[tuple[int, str], Any] = {}
    try:
        for number, reading in enumerate(readings, 1):
            job, label = reading.job, f"document {number} of {len(readings)} ({reading.label})"
            trials = [trial for trial in reading.trials if not trial[1].why_not]
            _add(rows, job, [trial for trial in reading.trials if trial[1].why_not])
            if not trials:
                continue
            if llm is None or opened != reading.context:
                if llm is not None:
                    llm.close()
                llm = None
                try:
                    llm, opened = reading.open(), reading.context
                except ValueError as error:
                    if not reading.optional:
                        raise
                    _add(rows, job, trials, str(error))
                    continue
            if compared != (now := (id(job), (reading.reference or reading.context) if along else None)):
                compared, full = now, {}
            reader = Reader(llm, keep_asked=bool(along), window=window)
            reader.read(reading.tokens, job.head, lambda n, label=label: told(label, READING * n), job.probe)  # type: ignore[misc]
            asked = Trials(reader, job.prompts, lambda tokens: text_of(vocabulary, tokens), along, full)
            for i, cell in trials:
                try:
                    row = asked.measure(i, cell.setting)
                except LaproxError as error:
                    _add(rows, job, [(i, cell)], str(error))
                else:
                    if cell.key(job, i) not in rows:  # it may only be what the others are compared with
                        rows.add(cell.key(job, i), row | dict(cell.known))
                told(label, _work(job, i))
    finally:
        if llm is not None:
            llm.close()


def plan_policies(
    rows: Rows, jobs: Sequence[Job], policies: Sequence[str], budgets: Sequence[str], regimes: Sequence[str],
    open_llm: Callable[[str, Types | None], Llama],
) -> list[Reading]:  # fmt: skip
    """Policies, each at the budgets that the engine is told; and the full cache, of each of the types that they are named with.

    Policies that need a context of their own come one after another: a large model fits once. What has other types than the
    context comes after it, document by document, and is compared with its full cache.

    Args:
        rows: What is there already.
        jobs: Documents.
        policies: Of the engine; or SHORTER.
        budgets: For each of them.
        regimes: Of REGIMES.
        open_llm: Makes a context for a policy, of its types.
    """
    cells = [_whole("follow-up")] if "follow-up" in regimes else []
    cells += [Cell(p, b, r, Setting(p, b, r, types_of(p) is not None)) for r in regimes for p in policies for b in budgets if suits(p, r)]
    readings = []
    for first, context in enumerate(dict.fromkeys(made_with(cell.setting.policy) for cell in cells if cell.budget)):
        mine = [cell for cell in cells if (made_with(cell.setting.policy) == context if cell.budget else not first)]
        kinds = dict.fromkeys([None, *(types_of(cell.setting.policy) for cell in mine)])
        for job in jobs:
            of_job = []
            for types in kinds:
                trials = _of_types(job, types, [cell for cell in mine if types_of(cell.setting.policy) == types], not first)
                missing = [(i, cell) for i, cell in trials if cell.key(job, i) not in rows]
                label = f"{job.family}, {len(job.opening):,} tokens" + (f", {types}" if types else "")
                of_job.append(
                    Reading(
                        job, (context, str(types or "")), lambda context=context, types=types: open_llm(context, types),  # type: ignore[misc]
                        missing, label, reference=(context, ""),
                    )  # fmt: skip
                )
            references = [(i, _whole("follow-up" if cell.regime == "follow-up" else "")) for reading in of_job[1:] for i, cell in reading.trials]
            of_job[0] = replace(of_job[0], trials=_unique([*references, *of_job[0].trials]))
            readings += [reading for reading in of_job if reading.trials]
    return readings


def _of_types(job: Job, types: Types | None, cells: Sequence[Cell], whole: bool) -> list[Trial]:
    """A document under cells of the same types, and first, if that is wanted, on a full cache of these."""
    by_setting = {cell.setting: cell for cell in cells}
    trials = [(i, _whole("", types)) for i in job.questions() if whole]
    for regime in REGIMES:
        asked = [cell.setting for cell in cells if cell.regime == regime and job.questions(regime)]
        trials += [(i, by_setting[setting]) for i, setting in order(len(job.prompts), asked)]
    return trials


@dataclass(frozen=True)
class Runnable:
    """What runs on a model.

    Attributes:
        policies: Those that do.
        refused: Why the others don't.
        fingerprint: The model's.
        n_threads: That its contexts use.
    """

    policies: list[str]
    refused: dict[str, str]
    fingerprint: str
    n_threads: int


def runnable(wanted: Sequence[str], open_small: Callable[[str], Llama], insist: bool) -> Runnable:
    """Try policies on a model.

    Args:
        wanted: Policies; or SHORTER.
        open_small: Makes a small context for a policy.
        insist: Whether all of them have to run.

    Raises:
        LaproxError: One doesn't, and has to; says why.
        ValueError: None does.
    """
    refused: dict[str, str] = {}
    fingerprint, n_threads = "", 0
    for context in ["laprox", *dict.fromkeys(map(made_with, wanted))]:
        mine = [policy for policy in wanted if made_with(policy) == context]
        try:
            llm = open_small(context)
        except ValueError as error:
            if context == "laprox":  # no policy can do without what this one needs
                raise
            refused |= dict.fromkeys(mine, str(error))
            continue
        fingerprint, n_threads = _core.model_fingerprint(llm.model), llm.n_threads
        refused |= Reader(llm).able(mine)
        llm.close()
    if refused and insist:
        policy, reason = next(iter(refused.items()))
        raise LaproxError(f"{policy} does not run on this model: {reason}")
    able = [policy for policy in wanted if policy not in refused]
    if not able:
        raise ValueError("none of the policies runs on this model")
    return Runnable(able, refused, fingerprint, n_threads)


@dataclass(frozen=True)
class Alternatives:
    """What is compared at equal bytes.

    Attributes:
        contenders: The full cache among them.
        budgets: For those that have one.
        regime: Of the questions: "aware" or "agnostic".
        bytes_per_token: Of the layers that can be compressed, by cache type.
        refused: Why some contenders can't run, by name.
        open_llm: Makes the model for a contender, with a context of so many tokens.
    """

    contenders: Sequence[Contender]
    budgets: Sequence[Budget]
    regime: str
    bytes_per_token: Mapping[str, float]
    refused: Mapping[str, str]
    open_llm: Callable[[Contender, int], Llama]


def plan_alternatives(rows: Rows, jobs: Sequence[Job], what: Alternatives) -> list[Reading]:
    """Contenders at equal bytes, document by document, and each in a context that has just the size it needs."""
    readings = []
    for job in jobs:
        found = [reading for contender in what.contenders for reading in _alternative(rows, job, contender, what)]
        found.sort(key=lambda reading: reading.context)  # type: ignore[arg-type, return-value] # alike in their types
        groups = [list(group) for _, group in groupby(found, lambda reading: reading.context)]
        shared = [_merged(group) for group in groups]
        if any(reading.trials for reading in shared):
            told = len(job.prompts) - 1
            whole = next(reading for reading in shared if reading.n_read is None and not reading.optional)
            if not any(i == told for i, _ in whole.trials):  # what all others are compared with
                shared[shared.index(whole)] = replace(whole, trials=[(told, _whole()), *whole.trials])
        readings += [reading for reading in shared if reading.trials]
    return readings


def _alternative(rows: Rows, job: Job, contender: Contender, what: Alternatives) -> Iterable[Reading]:
    """A contender at each of its budgets; where nothing is missing, without trials."""
    per_token, told = what.bytes_per_token[contender.cache_type], len(job.prompts) - 1
    n = len(job.opening)
    for budget in what.budgets if contender.budgeted else [None]:
        n_read, known, why_not, policy, engine = None, {}, what.refused.get(contender.name, ""), contender.policy, ""
        if budget is not None:
            known["target"] = budget.bytes(n, what.bytes_per_token["f16"])
            engine = f"{known['target'] // 1024}KiB"
            if policy is not None and known["target"] >= per_token * (n + ROOM):
                why_not = f"a {contender.cache_type} cache of everything is smaller than this budget"
        if budget is not None and contender.name == SHORTER:
            n_read = int(budget.tokens(n, what.bytes_per_token["f16"]))
            if n_read <= job.head:
                why_not = "the chat template alone is longer"
        if policy is None:  # llama.cpp rounds contexts up to 256 tokens; that is not held against it
            known["bytes"] = int(per_token * ((n if n_read is None else n_read) + ROOM))
        trials = []
        for i, regime in [(told, "agnostic"), *((i, what.regime) for i in range(told))]:
            named = regime if budget is not None else ""
            setting = Setting(policy, engine, regime) if policy is not None else Setting(None, "")
            trials.append((i, Cell(contender.name, budget.text if budget else "", named, setting, known, why_not)))
        missing = [(i, cell) for i, cell in trials if cell.key(job, i) not in rows]
        size = job.context(n_read)
        yield Reading(
            job, (*_rank(contender, budget), job.number), lambda size=size: what.open_llm(contender, size), missing,  # type: ignore[misc]
            contender.name + (f" at {budget.text}" if n_read is not None and budget else ""), n_read,
            optional=contender.name != FULL,
        )  # fmt: skip


def _merged(group: Sequence[Reading]) -> Reading:
    """What is asked after one reading."""
    names = ", ".join(dict.fromkeys(reading.label for reading in group))
    trials = [trial for reading in group for trial in reading.trials]
    return replace(group[0], label=f"{group[0].job.name}, {names}", trials=trials)


def _rank(contender: Contender, budget: Budget | None) -> tuple[str, ...]:
    """Those with the same one share a context. The full cache, which all are compared with, comes first."""
    if contender.policy is None:
        return ("0" if contender.name == FULL else "1", contender.name, budget.text if budget else "")
    return ("2", *contender.context)


def _whole(regime: str = "", types: Types | None = None) -> Cell:
    """The full cache, of the context's types or others."""
    return Cell(f"{FULL}@{types}" if types else FULL, "", regime, Setting(None, "", regime or "aware", types is not None))


def _unique(trials: Iterable[Trial]) -> list[Trial]:
    found: dict[tuple[int, str, str, str], Trial] = {}
    for i, cell in trials:
        found.setdefault((i, cell.name, cell.regime, cell.budget), (i, cell))
    return list(found.values())


def _work(job: Job, i: int) -> float:
    return job.prompts[i].room + READING * len(job.prompts[i].tokens)


def _add(rows: Rows, job: Job, trials: Iterable[Trial], why_not: str = "") -> None:
    """Rows that say why there are no numbers."""
    for i, cell in trials:
        if cell.key(job, i) not in rows:
            rows.add(cell.key(job, i), {"task": job.prompts[i].question.task, "why_not": why_not or cell.why_not})
