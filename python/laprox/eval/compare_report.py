"""The report of `laprox compare` as a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from laprox.eval.comparison import EQUAL, KEPT, Entry
from laprox.eval.contenders import FULL, PROTECTED, RECENT, ROOM
from laprox.eval.jobs import Job
from laprox.eval.reader import RECALL, SHORTER, recalls
from laprox.eval.rows import Rows, header_facts
from laprox.eval.summary import Key, key
from laprox.viz.charts import Line, against_bytes
from laprox.viz.page import Page
from laprox.viz.text import shortened, size

MOST = 20  # answers that are shown
LONGEST = 50  # characters of each

_HEADER = ["", "budget", "allocated", "of full", "right", "KL divergence", "same token", "perplexity"]
_COSTS = ["", "budget", "decoding", "reading", "process memory", "entries held"]


def page(rows: Rows, table: Sequence[Entry], sentence: str, jobs: Sequence[Job]) -> Page:
    """The verdict, charts, the table, what it cost, answers to look at, and how it was measured."""
    model = rows.header["model"]
    names = ", ".join(job.name for job in jobs)
    full = next(e for e in table if e.name == FULL)
    lead = f"{model['name']} on {names}: ways to hold a document in less memory, at equal bytes."
    page = Page("What can this model forget?", lead)
    page.callout(sentence)
    page.facts(
        {
            "tokens read": " + ".join(f"{len(job.opening):,}" for job in jobs),
            "full cache": size(full.allocated or 0),
            "questions": f"{full.right.n if full.right else 0}",
            "answered by the full cache": f"{full.known}",
        }
    )
    measured = [e for e in table if e.right is not None]
    if any(e.budget for e in measured):
        page.section("What is left at how many bytes")
        page.figure(
            _chart(measured, lambda e: e.right, "right answers", percent=True),
            "Facts were put into the document; the share of questions about them that are answered right, with standard errors.",
        )
        page.figure(
            _chart(measured, lambda e: e.kl, "KL divergence in nats per token", log_y=True),
            "How far the prediction of the document's own end is from the full cache's: smaller is better.",
        )
    page.section("The table")
    page.table(_HEADER, [_quality(e) for e in table], "The same seed gives the same table, digit by digit, on one machine.")
    for e in table:
        if e.why_not:
            page.note(f"{e.label} was not measured: {e.why_not}.")
        elif e.unequal:
            page.note(f"{e.unequal}.")
    page.section("What it costs")
    page.table(_COSTS, [_costs(e) for e in table], "Measured by the clock: these numbers differ from run to run.")
    page.note(
        "Decoding is in tokens per second and reading in seconds for the whole document, compressing included, both relative "
        "to stock llama.cpp with the full cache. Process memory is what this process has in RAM while it answers, without the "
        "copies of the cache that this comparison needs; weights and libraries are part of it."
    )
    page.section("Look for yourself")
    _answers(page, rows, jobs)
    page.section("How it was measured")
    for text in _method(rows, jobs):
        page.note(text)
    page.details(header_facts(rows.header))
    return page


def _chart(measured: Sequence[Entry], value: Any, y: str, **options: Any) -> Any:
    full = next((e for e in measured if e.name == FULL), None)
    names = dict.fromkeys(e.name for e in measured if e is not full)
    lines = []
    for name in names:
        mine = [e for e in measured if e.name == name]
        at = [float(e.allocated or 0) for e in mine]
        lines.append(Line(name, at, [value(e).mean for e in mine], [value(e).error for e in mine]))
    reference = None
    if full is not None and not options.get("log_y"):  # its divergence from itself is 0
        reference = Line(FULL, [float(full.allocated or 0)], [value(full).mean], [value(full).error])
    return against_bytes(lines, reference, y=y, x="KV cache, allocated", percent=options.pop("percent", False), **options)


def _quality(e: Entry) -> list[str | None]:
    if e.right is None or e.kl is None or e.agreement is None:
        return [e.name, e.budget, *6 * ["-"]]
    return [
        e.name, e.budget, size(e.allocated or 0), f"{e.share:.1%}", f"{e.right.percent()} %",
        f"{e.kl.mean:.3f} ± {e.kl.error:.3f}", f"{e.agreement.percent()} %", f"{e.perplexity:,.2f}",
    ]  # fmt: skip


def _costs(e: Entry) -> list[str | None]:
    if e.right is None:
        return [e.name, e.budget, *4 * ["-"]]
    return [
        e.name, e.budget, f"{e.decode:.2f}x" if e.decode else "-", f"{e.prefill:.2f}x" if e.prefill else "-",
        size(e.resident) if e.resident else "-", f"{e.entries:.1%}",
    ]  # fmt: skip


def _answers(page: Page, rows: Rows, jobs: Sequence[Job]) -> None:
    settings = rows.header["settings"]
    budget = settings["budgets"][len(settings["budgets"]) // 2]
    measured = {(str(name), str(at)) for (*_, name, at), row in rows if "score" in row}
    policies = [name for name in settings["policies"] if (name, budget) in measured]
    shown = "laprox" if "laprox" in policies else policies[0] if policies else ""
    columns = [column for column in ((FULL, ""), (shown, budget), (SHORTER, budget)) if column in measured]
    lines = []
    for job in jobs:
        for i, prompt in enumerate(job.prompts):
            if prompt.told:
                continue
            cells: list[str] = [f"{prompt.question.text} ({prompt.question.references[0]})"]
            for name, at in columns:
                row = rows.get(_key(job, i, settings["regime"] if at else "", name, at))
                text = shortened(prompt.question.counted(row["answer"]), LONGEST) if "score" in row else ""
                cells.append(f"{'✓' if row['score'] else '✗'} {text}" if "score" in row else "-")
            lines.append(cells)
    head = [f"{name} at {at}" if at else name for name, at in columns]
    more = f"The first {MOST} of {len(lines)}; all" if len(lines) > MOST else "All"
    caption = f"In parentheses what is right, in the order of its places in the document. {more} answers are in {rows.path.name}."
    page.table(["question", *head], lines[:MOST], caption)


def _key(job: Job, i: int, regime: str, name: str, budget: str) -> Key:
    return key(job.family, job.length, job.number, i, regime, name, budget)


def _method(rows: Rows, jobs: Sequence[Job]) -> list[str]:
    settings = rows.header["settings"]
    regime = (
        "when document and question are in, with the question in view"
        if settings["regime"] == "aware"
        else "when the document is in, before any question is known"
    )
    cut = []
    for budget in settings["budgets"]:
        found = [(job, rows.get(_key(job, len(job.prompts) - 1, "agnostic", SHORTER, budget))) for job in jobs]
        cut += [f"{row['read']:,} of {len(job.opening):,} tokens at {budget}" for job, row in found if "read" in row]
    archived = (
        [
            f"Archive. What a contender with {RECALL} evicts stays in memory that is not the cache's, as much as the full cache takes, and "
            "is not counted above. When a question is in, the cache is chosen anew from all of it, within the same bytes. Where the "
            "document itself goes on, nothing is asked, and nothing comes back."
        ]
        if any(map(recalls, settings["policies"]))
        else []
    )
    return [
        "Bytes. A budget is a share of the bytes that the document takes in an uncompressed f16 cache, and on top of it everyone "
        f"has room for the same {ROOM} tokens to come. Every contender with a budget may allocate exactly these bytes, padding "
        f"and masks included; those that differ by more than {EQUAL:.0%} are named under the table. q8_0 and q4_0 caches have a "
        "size of their own. Counted are the layers whose cache can be compressed, right after compressing. llama.cpp rounds a "
        "context up to 256 tokens; that is not counted against it.",
        "Shorter context. What -c does: the end of the document is read, and its beginning is cut off "
        f"({'; '.join(cut) or 'not measured'}).",
        *archived,
        f"Recall. {settings['questions']} of the facts that were put into each document are asked about, in other words, and for "
        "each of them there are two that resemble it. An answer is right if it contains the value as whole words; decoding is "
        f"greedy, of at most {settings['predict']} tokens. The cache is compressed {regime}. A verdict counts a contender as "
        f"holding up if it gives at least {KEPT:.0%} of the right answers of the full cache.",
        f"Fidelity. The last {settings['continuation']} tokens of each document were held back, the cache compressed with "
        "nothing of them in view, and the tokens forced upon the model one by one. KL divergence is from the full cache's "
        "distribution of the next token; same token is where both have the same likeliest one. What the first token meets always "
        "comes from the full cache and is left out.",
        "Errors. After ± stands one standard error, over single values or over documents, whichever is larger. Neighbouring "
        "tokens and the questions of one document are not independent, so with a single document it is too small.",
        f"The first {PROTECTED - RECENT} and the last {RECENT} tokens are always kept. Nothing is too short to be compressed "
        "here (min_tokens=0; its default is 512).",
        "While a document is read, a compressing cache holds all of it; the bytes are what remains afterwards.",
    ]

