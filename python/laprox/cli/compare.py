"""`laprox compare`: policies against each other and against the honest alternatives, on one's own model and documents."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from laprox import KVConfig, Llama, _core, extras
from laprox._upstream import MOST_TOKENS
from laprox.chat.loading import load_weights
from laprox.chat.reading import read_document
from laprox.chat.tokens import trained_for
from laprox.cli import options
from laprox.cli.measuring import measure, split
from laprox.cli.running import Restart, Running
from laprox.cli.show import notes, remark, size
from laprox.cli.source import takes_model
from laprox.eval.bench import Alternatives, plan_alternatives
from laprox.eval.comparison import Entry, entries, verdict
from laprox.eval.contenders import POLICIES, ROOM, Budget, Contender, check_model, make_contenders
from laprox.eval.jobs import Facts, Job, fact_job
from laprox.eval.reader import RECALL, archive_for, check_suits
from laprox.eval.rows import Rows, make_header, make_model
from laprox.eval.summary import Summary
from laprox.files import check_writable


@dataclass(frozen=True)
class Asked(Facts):
    """What is put into documents and asked."""

    n_questions: Annotated[
        int, typer.Option("--questions", metavar="N", min=3, max=100, help="Number of facts to put into each document and ask about.")
    ] = 10
    n_continue: Annotated[
        int, typer.Option("--continuation", metavar="N", min=16, help=f"Tokens of each document's end to hold back and predict, at most {ROOM}.")
    ] = 192
    n_tokens: Annotated[int, typer.Option("--tokens", metavar="N", min=0, help="Read at most N tokens of each document; 0 = all.")] = 0
    n_predict: Annotated[int, typer.Option("--predict", "-n", metavar="N", min=1, max=MOST_TOKENS, help="Length of the longest answer in tokens.")] = 48
    seed: Annotated[int, typer.Option("--seed", "-s", help="Seed of the facts.")] = 1


@takes_model(rest="documents")
@options.takes_kv(only=("profile", "gates"), min_tokens=0, archive="off")
def compare(
    model: options.Model,
    documents: Annotated[
        list[Path], typer.Argument(metavar="DOCUMENT", help="Text, Markdown, HTML or PDF files; each is read by itself.", show_default=False)
    ],
    budgets: Annotated[
        str,
        typer.Option(
            "--budgets", help='What may be held, separated by commas: shares of the full cache ("10%"), tokens ("2048") or bytes ("512MiB").'
        ),
    ] = "5%,10%,20%",
    policies: Annotated[
        str,
        typer.Option(
            "--policies",
            help="What to compare, separated by commas: names as for --kv-policy; POLICY@q8_0 runs one over a q8_0 cache, "
            f"POLICY{RECALL} with an archive, from which entries come back for a later question. "
            "The full cache, q8_0 and q4_0 caches and a shorter context are always there.",
        ),
    ] = ", ".join(POLICIES),
    output: Annotated[Path, typer.Option("--output", "-o", help="The report, an .html file; the results come beside it as .jsonl.")] = Path(
        "compare.html"
    ),
    facts: Asked = Asked(),
    regime: Annotated[
        str, typer.Option("--regime", help="When the cache is compressed: aware (the question is in view), agnostic (before any question).")
    ] = "aware",
    before_question: options.BeforeQuestion = False,
    restart: Restart = False,
    kv: KVConfig = KVConfig(),
    running: Running = Running(),
) -> None:
    """Try policies on your own model and documents, against the full cache and what else takes as few bytes.

    Facts are put into the documents and asked about, and the documents' ends are predicted. Interrupted, it goes on where it was.
    """
    # Everything that can be wrong is found before the long work starts.
    extras.need("report", "laprox compare")
    if facts.n_continue > ROOM:
        raise typer.BadParameter(f"--continuation is {facts.n_continue}; accepted: 16 to {ROOM}")
    regime = options.regime(regime, before_question)
    named = split(policies, "--policies")
    contenders = make_contenders(named)
    check_suits(named, [regime])
    kv = replace(kv, archive=archive_for(named))
    wanted = [Budget(text) for text in split(budgets, "--budgets")]
    if output.suffix != ".html":
        raise ValueError(f"-o {output}: the report is an .html file")
    results = output.with_suffix(".jsonl")
    files = [Path(path) for path in (kv.profile, kv.gates) if path]
    for path in (output, results):
        check_writable(path, [*documents, model.here, *files])
    texts = [read_document(path, remark) for path in documents]

    loader = running.loader(model.get())
    with closing(load_weights(loader.path, use_extra_bufts=False)) as weights:  # mapped, but neither read nor repacked
        bytes_per_token, refused = check_model(loader.path, weights, contenders, kv, options.CACHE_TYPES)
        about = make_model(loader.path, _core.model_fingerprint(weights.model))
    vocabulary = loader.vocabulary
    jobs = [fact_job(vocabulary, text, facts, path.name, i) for i, (path, text) in enumerate(zip(documents, texts))]
    full_bytes = bytes_per_token["f16"]
    for job in jobs:
        for budget in wanted:
            budget.check(job.name, len(job.opening), full_bytes)
    wanted.sort(key=lambda budget: budget.bytes(len(jobs[0].opening), full_bytes))
    _warn_if_long(jobs, trained_for(vocabulary))

    settings = {
        "budgets": [b.text for b in wanted],
        "policies": named,
        "questions": facts.n_questions,
        "continuation": facts.n_continue,
        "tokens": facts.n_tokens,
        "regime": regime,
        "predict": facts.n_predict,
        "seed": facts.seed,
        "threads": running.threads,
        "gpu_layers": running.gpu_layers,
        "batch_size": running.batch_size,
    }
    rows = Rows(results, make_header("compare", sys.argv, settings, [*documents, *files], about), restart)

    def open_llm(contender: Contender, n_ctx: int) -> Llama:
        made_with, name = contender.context
        own = None if contender.policy is None else replace(kv, policy=made_with)
        cache_type = options.CACHE_TYPES[name].ggml
        return loader.open(n_ctx, own, flash_attn=True, type_k=cache_type, type_v=cache_type)

    what = Alternatives(contenders, wanted, regime, bytes_per_token, refused, open_llm)
    measure(plan_alternatives(rows, jobs, what), rows, vocabulary, along=0, restart=restart)

    table = entries(Summary(rows), contenders, [b.text for b in wanted], regime)
    sentence = verdict(table, [b.text for b in wanted])
    show(table, sentence)

    from laprox.eval import compare_report  # matplotlib takes its time

    compare_report.page(rows, table, sentence, jobs).save(output)
    notes.print(f"{output} has the report, {results} every number.", markup=False)


def _warn_if_long(jobs: Sequence[Job], trained: int) -> None:
    for job in jobs:
        if trained and len(job.opening) > trained:
            notes.print(
                f"{job.name} is {len(job.opening):,} tokens, but the model was trained for {trained:,}: expect bad answers "
                f"even from the full cache, or read less of it with --tokens.",
                style="yellow",
                markup=False,
            )


def show(table: Sequence[Entry], sentence: str) -> None:
    """The table and the verdict."""
    console = Console(highlight=False)
    view = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("", "bytes", "right", "KL", "same", "perplexity", "decode", "read", "memory"):
        view.add_column(name, justify="right" if name else "left", no_wrap=True)
    budget = ""
    for e in table:
        if e.budget != budget:
            budget = e.budget
            view.add_row(f"[bold]at {budget}[/]")
        view.add_row(*_cells(e))
    if not console.is_terminal:
        console.width = max(console.width, 120)  # nothing is cut off in a pipe
    console.print(view)
    console.print(
        "KL and same token: against the full cache, on the document's own end. decode, read: tokens/s and seconds relative to\n"
        "the full cache; these and memory differ from run to run.",
        style="dim", soft_wrap=True,
    )  # fmt: skip
    for e in table:
        if note := f"{e.label} was not measured: {e.why_not}" if e.why_not else e.unequal:
            console.print(note, style="dim", markup=False, soft_wrap=True)
    console.print()
    console.print(sentence, style="bold", markup=False, soft_wrap=True)


def _cells(e: Entry) -> list[str]:
    if e.right is None or e.kl is None or e.agreement is None:
        return [e.name, *8 * ["-"]]
    return [
        e.name,
        size(e.allocated or 0),
        e.right.percent() + "%",
        f"{e.kl.mean:.3f}",
        f"{e.agreement.mean:.0%}",
        f"{e.perplexity:,.1f}",
        f"{e.decode:.2f}x" if e.decode else "-",
        f"{e.prefill:.2f}x" if e.prefill else "-",
        size(e.resident) if e.resident else "-",
    ]
