"""What types of cached keys and values lose, at each share of the entries: the table that a budget in bytes is divided by.

Each context is read with each pair of types, compressed to each share, and asked. A loss is the KL divergence, in nats per token,
from what the full f16 cache expects along its own answer to what this one expects; the mean over the questions counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from laprox import Llama
from laprox._upstream import LlamaModel
from laprox.cache_types import Losses, Table, Types
from laprox.eval.bench import Reading, plan_policies
from laprox.eval.jobs import Job, encode
from laprox.eval.reader import REFIT
from laprox.eval.rows import Rows
from laprox.eval.summary import Summary
from laprox.eval.tasks import Question, Sample
from laprox.profile.contexts import Context
from laprox.read.writing import FOR_READING

TYPES = (Types(), Types("q8_0", "q8_0"), Types("q8_0", "q4_0"), Types("q4_0", "q4_0"))
SHARES = (0.05, 0.1, 0.2, 0.5)  # and 1: the full cache
SEEN, UNSEEN = "laprox", f"{FOR_READING.policy}{REFIT}"  # what chooses with the question in view, and before it
BUDGETS = [f"{share:.0%}" for share in SHARES]
PREDICT = 24  # tokens of the longest answer


def named(policy: str, types: Types) -> str:
    """A policy as `laprox eval` names it with these types; f16 is what it has anyway."""
    return policy if types == Types() else f"{policy}@{types}"


def jobs(vocabulary: LlamaModel, contexts: Sequence[Context], n_questions: int) -> Iterator[Job]:
    """Contexts with at most so many of their questions each."""
    for number, context in enumerate(contexts):
        asked = tuple(Question("types", text, (), "any", predict=PREDICT) for text in context.questions[:n_questions])
        yield Job("types", 0, number, *encode(vocabulary, Sample(context.text, asked)), name=context.source)


def plan(rows: Rows, asked: Sequence[Job], open_llm: Callable[[str, Types | None], Llama]) -> list[Reading]:
    """What is to be measured; `open_llm` as for plan_policies()."""
    policies = ((SEEN, "aware"), (UNSEEN, "agnostic"))
    return [
        reading
        for policy, regime in policies
        for reading in plan_policies(rows, asked, [named(policy, types) for types in TYPES], BUDGETS, [regime], open_llm)
    ]


def table(summary: Summary, model: str, fingerprint: str) -> Table:
    """Of what was measured; shares that nothing was measured of are not in it, nor types that are no choice: those whose full cache
    loses more than f16 does with the fewest entries. They destroy the model, and there is nothing to spend a budget on.

    Raises:
        ValueError: Nothing was, or not of the full caches.
    """
    return Table(model, fingerprint, _losses(summary, "aware", SEEN), _losses(summary, "agnostic", UNSEEN))


def _losses(summary: Summary, regime: str, policy: str) -> Losses:
    losses = {}
    for types in TYPES:
        found = {share: summary.mean("kl", regime, named(policy, types), budget) for share, budget in zip(SHARES, BUDGETS)}
        whole = summary.mean("kl", "", named("full", types), "")
        measured = {share: round(mean.mean, 4) for share, mean in found.items() if mean}
        if measured and (whole or types == Types()):
            losses[types] = measured | {1.0: round(whole.mean, 4) if whole else 0.0}
    if not losses:
        raise ValueError(f"nothing was measured of {policy}, regime {regime}")
    most = max(losses.get(Types(), {1.0: math.inf}).values())
    return {types: of for types, of in losses.items() if of[1.0] <= most}
