"""The report of `laprox compare` as a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from laprox.eval.comparison import EQUAL, KEPT, Entry
from laprox.eval.contenders import FULL, PROTECTED, RECENT, ROOM, SHORTER
from laprox.eval.examiner import Material
from laprox.eval.rows import Rows
from laprox.viz.charts import Line, against_bytes, size
from laprox.viz.page import Page

MOST = 20  # answers that are shown
LONGEST = 50  # characters of each

_HEADER = ["", "budget", "allocated", "of full", "right", "KL divergence", "same token", "perplexity"]
_COSTS = ["", "budget", "decoding", "reading", "process memory", "entries held"]


def page(rows: Rows, table: Sequence[Entry], sentence: str, materials: Sequence[Material]) -> Page:
    """The verdict, charts, the table, what it cost, answers to look at, and how it was measured."""
    settings, model = rows.header["settings"], rows.header["model"]
    names = ", ".join(m.name for m in materials)
    full = next(e for e in table if e.name == FULL)
    lead = f"{model['name']} on {names}: ways to hold a document in less memory, at equal bytes."
    page = Page("What can this model forget?", lead)
    page.callout(sentence)
    page.facts(
        {
            "tokens read": " + ".join(f"{m.n_read:,}" for m in materials),
            "full cache": size(full.allocated or 0),
            "questions": f"{sum(len(m.questions) for m in materials)}",
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
    page.table(_COSTS, [_costs(e, rows) for e in table], "Measured by the clock: these numbers differ from run to run.")
    page.note(
        "Decoding is in tokens per second and reading in seconds for the whole document, compressing included, both relative "
        "to stock llama.cpp with the full cache. Process memory is what this process has in RAM while it answers, without the "
        "copies of the cache that this comparison needs; weights and libraries are part of it."
    )
    page.section("Look for yourself")
    _answers(page, rows, materials, settings["budgets"])
    page.section("How it was measured")
    for text in _method(settings, materials, rows):
        page.note(text)
    page.details(_details(rows))
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


def _costs(e: Entry, rows: Rows) -> list[str | None]:
    if e.right is None:
        return [e.name, e.budget, *4 * ["-"]]
    row = next(row for key, row in rows if key[1:] == (e.name, e.budget) and "right" in row)
    held = f"{row['entries'] / row['entries_full']:.1%}" if "entries" in row else f"{row['read'] / _read(rows):.1%}"
    return [
        e.name, e.budget, f"{e.decode:.2f}x" if e.decode else "-", f"{e.prefill:.2f}x" if e.prefill else "-",
        size(e.resident) if e.resident else "-", held,
    ]  # fmt: skip


def _read(rows: Rows) -> int:
    return next(row["read"] for key, row in rows if key[1] == FULL)


def _answers(page: Page, rows: Rows, materials: Sequence[Material], budgets: Sequence[str]) -> None:
    budget = budgets[len(budgets) // 2]
    policies = [name for (_, name, at), row in rows if at == budget and "right" in row and name != SHORTER]
    shown = "laprox" if "laprox" in policies else policies[0] if policies else None
    named = [(FULL, ""), *([(str(shown), budget)] if shown else []), (SHORTER, budget)]
    columns = [c for c in named if any(key[1:] == c and "right" in row for key, row in rows)]
    lines = []
    for i, material in enumerate(materials):
        for j, question in enumerate(material.questions):
            cells: list[str] = [f"{question.text} ({question.value})"]
            for name, at in columns:
                row = rows[i, name, at] if (i, name, at) in rows else {}
                if "right" in row:
                    text = " ".join(row["answers"][j].split())
                    text = text if len(text) <= LONGEST else text[:LONGEST] + "…"
                    cells.append(f"{'✓' if row['right'][j] else '✗'} {text}")
                else:
                    cells.append("-")
            lines.append(cells)
    head = [f"{name} at {at}" if at else name for name, at in columns]
    more = f"The first {MOST} of {len(lines)}; all" if len(lines) > MOST else "All"
    caption = f"In parentheses what is right, in the order of its places in the document. {more} answers are in {rows.path.name}."
    page.table(["question", *head], lines[:MOST], caption)


def _method(settings: dict[str, Any], materials: Sequence[Material], rows: Rows) -> list[str]:
    regime = (
        "when document and question are in, with the question in view"
        if settings["regime"] == "aware"
        else "when the document is in, before any question is known"
    )
    cut = []
    for budget in settings["budgets"]:
        found = [(m, rows[i, SHORTER, budget]) for i, m in enumerate(materials) if (i, SHORTER, budget) in rows]
        cut += [f"{row['read']:,} of {m.n_read:,} tokens at {budget}" for m, row in found if "read" in row]
    return [
        "Bytes. A budget is a share of the bytes that the document takes in an uncompressed f16 cache, and on top of it everyone "
        f"has room for the same {ROOM} tokens to come. Every contender with a budget may allocate exactly these bytes, padding "
        f"and masks included; those that differ by more than {EQUAL:.0%} are named under the table. q8_0 and q4_0 caches have a "
        "size of their own. Counted are the layers whose cache can be compressed, right after compressing. llama.cpp rounds a "
        "context up to 256 tokens; that is not counted against it.",
        "Shorter context. What -c does: the end of the document is read, and its beginning is cut off "
        f"({'; '.join(cut) or 'not measured'}).",
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


def _details(rows: Rows) -> dict[str, str]:
    header = rows.header
    settings = {k: ", ".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in header["settings"].items()}
    return {
        "command": "laprox " + " ".join(header["command"]),
        **{name: str(value) for name, value in header["versions"].items()},
        "model": f"{header['model']['name']}, {header['model']['bytes']:,} bytes, fingerprint {header['model']['fingerprint']}",
        **{f["name"]: f"sha256 {f['sha256']}" for f in header["inputs"]},
        **settings,
        "machine": header["machine"],
    }
