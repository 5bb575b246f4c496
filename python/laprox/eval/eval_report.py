"""The report of `laprox eval`."""

from __future__ import annotations

from typing import Any

from laprox.eval.means import Mean
from laprox.eval.reader import REGIMES
from laprox.eval.rows import header_facts
from laprox.eval.summary import Summary
from laprox.eval.trials import ALONG
from laprox.viz.charts import Chart, Line, against_bytes
from laprox.viz.page import Page
from laprox.viz.text import size

_LINES = 7  # in one chart; more can't be told apart


def evaluation_page(summary: Summary, header: dict[str, Any]) -> Page:
    """A page of what a results file has: accuracy against bytes, then tables.

    Args:
        summary: Of its rows.
        header: Its first line.
    """
    page = Page("What is still answered", f"{header['model']['name']}: {', '.join(summary.tasks)}")
    if not summary.complete:
        page.callout("Unfinished: only documents that all policies have read count, while there are any.")
    full = summary.mean("score")
    page.facts({
        "documents": f"{summary.documents:,}",
        "questions": f"{full.n:,}" if full else "none",
        "full cache": f"{full.percent()} %" if full else "not measured",
        "policies": str(len(summary.policies)),
    })  # fmt: skip
    for regime in summary.regimes:
        for length in summary.lengths:
            at = f"{length:,} tokens" if length else "prompts as they are"
            page.section(f"{REGIMES[regime]}: {at}")
            for chart in accuracy_charts(summary, regime, length):
                page.figure(chart)
            captions = {"score": "Score in percent, ± one standard error"}
            if any(row[1] != "-" for row in table(summary, "kl", regime, length)):
                captions["kl"] = "KL to the full cache, nats per token of its answer"
                captions["agreement"] = "Tokens of the full cache's answer at which both find the same one likeliest, in percent"
            captions["bytes"] = "Bytes of cache after compressing, tail and padding included"
            for name, caption in captions.items():
                page.table(["policy", *summary.budgets], table(summary, name, regime, length), caption)
    if len(summary.tasks) > 1:
        middle = summary.budgets[len(summary.budgets) // 2]
        for regime in summary.regimes:
            page.section(f"{REGIMES[regime]}: by task, at {middle}")
            page.table(
                ["policy", *summary.tasks],
                by_task(summary, regime, middle),
                "Score in percent, all lengths, ± one standard error",
            )
    page.section("How to read this")
    page.note(f"Scores are means over the questions of {', '.join(summary.tasks)}.")
    page.note(
        f"KL divergence and agreement are along the full cache's own answers, at most their first {ALONG} tokens, whatever was "
        "answered from the compressed cache."
    )
    page.note(
        "Standard errors know that questions about one document are not independent. With few questions they are rough, and 0 "
        "where all scores are equal."
    )
    for refused in summary.refused:
        page.note(f"{refused}.")
    for unequal in summary.unequal_bytes():
        page.note(
            f"Unequal bytes: {unequal}. A budget counts entries; padding and masks depend on how unevenly a policy shares them."
        )
    page.details(header_facts(header))
    return page


def accuracy_charts(
    summary: Summary, regime: str, length: int | None, policies: list[str] | None = None, title: str = ""
) -> list[Chart]:
    """Accuracy against bytes, with so many charts that their lines can be told apart.

    Args:
        summary: What was measured.
        regime: Of REGIMES.
        length: Of the documents in tokens; None: all.
        policies: Those to draw; None: all.
        title: Over the charts.
    """
    names = [p for p in (summary.policies if policies is None else policies) if summary.curve(regime, p, length)[0]]
    full = summary.curve(regime, "full", length)
    reference = Line("full", *full) if full[0] else None
    groups = [names[i : i + _LINES] for i in range(0, len(names), _LINES)]
    return [
        against_bytes([Line(p, *summary.curve(regime, p, length)) for p in group], reference, title=title, y="score")
        for group in groups
    ]


def table(summary: Summary, name: str, regime: str, length: int | None = None) -> list[list[str]]:
    """The rows of a table of a value: a policy, then its mean at each budget, "-" where there is none."""
    return [[policy, *(_cell(name, mean) for mean in means)] for policy, means in summary.table(name, regime, length)]


def by_task(summary: Summary, regime: str, budget: str, length: int | None = None) -> list[list[str]]:
    """Scores by task at one budget: the rows of a table."""
    full = ["full", *(_cell("score", summary.mean("score", length=length, tasks=[t])) for t in summary.tasks)]
    return [full] + [
        [p, *(_cell("score", summary.mean("score", regime, p, budget, length, [t])) for t in summary.tasks)]
        for p in summary.policies
    ]


def _cell(name: str, mean: Mean | None) -> str:
    if mean is None:
        return "-"
    if name == "bytes":
        return size(mean.mean)
    if name == "score":
        return mean.percent()
    return f"{100 * mean.mean:.0f}" if name == "agreement" else f"{mean.mean:.3f}"

