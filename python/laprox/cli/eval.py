"""`laprox eval`: benchmarks, for policies x budgets x lengths."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from llama_cpp._internals import LlamaModel
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from laprox import KVConfig, LaproxError, Llama, _core, extras
from laprox.cli import log, options
from laprox.cli.eval_jobs import Job, book_jobs, context_size, longbench_jobs, task_jobs, text_of, tokens_of
from laprox.cli.loading import load, load_vocabulary
from laprox.cli.show import notes, remark
from laprox.cli.source import takes_model
from laprox.config import policies as policy_names
from laprox.eval import books, longbench, tasks
from laprox.eval.reader import REGIMES, SHORTER, Reader, Setting, made_with
from laprox.eval.rows import Rows, make_header, make_model
from laprox.eval.summary import Summary
from laprox.eval.trials import FULL, Trials
from laprox.partial import check_writable
from laprox.reading import read_documents

ALL = "all"


@takes_model()
@options.takes_kv(without=("budget", "policy", "min_tokens", "prefill"), min_tokens=0)  # every budget is reached
def evaluate(
    model: options.Model,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Where the results go, a .jsonl file; an interrupted run goes on with it."),
    ] = Path("eval.jsonl"),
    task_names: Annotated[
        str,
        typer.Option(
            "--tasks",
            help=f"What to measure, separated by commas: {', '.join([*tasks.GROUPS, *tasks.TASKS])}.",
        ),
    ] = "",
    lengths: Annotated[
        str,
        typer.Option(
            "--lengths",
            help="Lengths of the documents in tokens, separated by commas.",
        ),
    ] = "1000,2000",
    policies: Annotated[
        str,
        typer.Option(
            "--policies",
            help=f"What to compare, separated by commas; {ALL} = every policy that has a name; {SHORTER} = the document's last "
            "tokens alone.",
        ),
    ] = "laprox,snapkv,streaming",
    budgets: Annotated[
        str,
        typer.Option(
            "--budgets",
            help="What the KV cache may keep, separated by commas: shares (5%), tokens (2048) or bytes (512MiB).",
        ),
    ] = "2%,5%,10%,20%,50%",
    regime: Annotated[
        str,
        typer.Option(
            "--regime",
            help="When the cache is compressed, separated by commas: aware (the question is in view), agnostic (before any "
            "question), follow-up (for the document's first question, then another one is asked).",
        ),
    ] = "aware",
    n_documents: Annotated[
        int,
        typer.Option(
            "--documents",
            "-d",
            min=0,
            help="Number of documents per task and length, and of lines of each LongBench file; 0 = all lines.",
        ),
    ] = 4,
    questions: Annotated[
        int, typer.Option("--questions", min=1, help="Most questions to ask about one document, where a task has several.")
    ] = 5,
    seed: Annotated[int, typer.Option("--seed", "-s", help="Seed of the documents.")] = 1,
    filler: Annotated[
        list[Path] | None,
        typer.Option(
            "--filler", help="A document to hide needles in; repeatable. By default, generated sentences.", show_default=False
        ),
    ] = None,
    paragraphs: Annotated[
        Path | None,
        typer.Option(
            "--paragraphs",
            help='For the task qa: a file with lines of {"question": ..., "answers": [...], "context": ...}.',
            show_default=False,
        ),
    ] = None,
    longbench_files: Annotated[
        list[Path] | None, typer.Option("--longbench", help="A .jsonl file of LongBench; repeatable.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="For LongBench: a JSON file of dataset -> prompt template.", show_default=False),
    ] = None,
    max_lengths: Annotated[
        Path | None,
        typer.Option(
            "--max-lengths", help="For LongBench: a JSON file of dataset -> longest answer in tokens.", show_default=False
        ),
    ] = None,
    max_prompt: Annotated[
        int,
        typer.Option(
            "--max-prompt",
            min=0,
            help="For LongBench: prompts of more tokens lose their middle; 0 = as many as the model was trained for.",
        ),
    ] = 0,
    book_questions: Annotated[
        Path | None,
        typer.Option(
            "--book-questions", help="Questions about passages of books, a .json file; needs --books.", show_default=False
        ),
    ] = None,
    book_folder: Annotated[
        Path | None, typer.Option("--books", help="A folder of Project Gutenberg's books, as pg<number>.txt.", show_default=False)
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a report, an .html file.", show_default=False)] = None,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart",
            help="Start anew instead of going on with what --output has.",
        ),
    ] = False,
    ctx_size: options.ContextSize = 0,
    kv: KVConfig = KVConfig(),
    cache_type_k: options.CacheTypeK = "f16",
    cache_type_v: options.CacheTypeV = "f16",
    threads: options.Threads = 0,
    gpu_layers: options.GPULayers = 0,
    batch_size: options.BatchSize = 512,
    verbose: options.Verbose = False,
) -> None:
    """Measure what is still answered at a budget: RULER's task families, LongBench. Greedy, so that it can be repeated."""
    # Everything that can be wrong is found before the long work starts.
    chosen = tasks.choose_tasks(task_names)
    if not chosen and not longbench_files and not book_questions:
        raise ValueError(
            f"nothing to measure: --tasks takes {', '.join([*tasks.GROUPS, *tasks.TASKS])}; --longbench and --book-questions take files"
        )
    if (book_questions is None) != (book_folder is None):
        raise ValueError("--book-questions and --books go together: questions, and the folder of the books that they are about")
    wanted = _policies(policies, kv)
    budget_list = _budgets(budgets, kv)
    length_list = _lengths(lengths) if chosen or book_questions else []
    regimes = list(dict.fromkeys(name.strip() for name in regime.split(",")))
    if unknown := [name for name in regimes if name not in REGIMES]:
        raise ValueError(f"--regime has {unknown[0]!r}; accepted: {', '.join(REGIMES)}, with commas")
    type_k, type_v = options.cache_types(cache_type_k, cache_type_v)
    if (chosen or book_questions) and not n_documents:
        raise ValueError("--documents is 0; accepted: at least 1, since tasks never end (all of a file with --longbench alone)")
    if tasks.QA in chosen and not paragraphs:
        raise ValueError("--tasks has qa, which needs --paragraphs")
    lines = _longbench_lines(longbench_files or [], prompts, max_lengths, n_documents)
    check_writable(output)
    if html:
        extras.need("report", "laprox eval --html")
        check_writable(html)
    sentences = tasks.sentences(read_documents(filler, remark)) if filler else []
    given = tasks.read_paragraphs(paragraphs) if paragraphs else []

    model_path = model.get()
    log.record(verbose)
    vocabulary = load_vocabulary(model_path)
    maker = tasks.Maker(lambda text: len(tokens_of(vocabulary, text)), seed, questions, sentences, given)
    jobs = list(task_jobs(vocabulary, maker, chosen, length_list, n_documents))
    if book_questions and book_folder:
        documents = books.load(book_questions)
        jobs += book_jobs(vocabulary, documents, book_folder, length_list, n_documents, questions)
    jobs += longbench_jobs(vocabulary, lines, max_prompt)
    n_ctx = context_size(vocabulary, jobs, ctx_size)

    def load_for(policy: str, size: int) -> Llama:
        return load(
            model_path, verbose, kv=replace(kv, policy=policy), n_ctx=size, n_batch=batch_size, n_threads=threads or None,
            n_threads_batch=threads or None, n_gpu_layers=gpu_layers, type_k=type_k.ggml, type_v=type_v.ggml,
        )  # fmt: skip

    able, fingerprint, n_threads = _able(wanted, load_for, insist=policies != ALL)
    settings = {
        "seed": seed, "questions": questions, "window": kv.window, "sink": kv.sink, "recent": kv.recent, "floor": kv.floor,
        "cache": f"{cache_type_k}, {cache_type_v}", "threads": n_threads, "gpu_layers": gpu_layers, "batch_size": batch_size,
    }  # fmt: skip
    beside = [p for p in (model_path.with_suffix(".kv-profile.npy"), model_path.with_suffix(".kv-gates.gguf")) if p.exists()]
    inputs = [*(filler or []), paragraphs, book_questions, *(longbench_files or []), prompts, max_lengths, kv.profile, kv.gates, *beside]
    header = make_header("eval", sys.argv, settings, [p for p in inputs if p], make_model(model_path, fingerprint))
    rows = Rows(output, header, restart)

    cells = [Setting(policy, budget, r) for r in regimes for policy in able for budget in budget_list]
    cells = [FULL[r] for r in regimes if r in FULL and r != "aware"] + cells
    try:
        _run(load_for, n_ctx, vocabulary, jobs, cells, rows)
    except KeyboardInterrupt:
        notes.print(f"Stopped. What is finished is in {output}; the same command goes on with it.", markup=False)
        raise typer.Exit(130) from None

    keys = {job.key(i, cell) for job in jobs for cell in [None, *cells] for i in job.questions(cell)}
    summary = Summary((k, row) for k, row in rows if k in keys)
    show(summary)
    if html:
        from laprox.viz.evaluation import evaluation_page  # matplotlib takes its time

        evaluation_page(summary, rows.header).save(html)
        notes.print(f"{html}: the report.", markup=False)


# --- what to measure -------------------------------------------------------------------------------------------------


def _policies(text: str, kv: KVConfig) -> list[str]:
    if text == ALL:
        return [name for name in policy_names() if name != "full"]
    found = list(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))
    for name in found or [text]:
        if name == SHORTER:
            continue
        kv.check("--policies: ", policy=name)
        if name in ("off", "full", ""):
            raise ValueError(f"--policies has {name!r}, which compresses nothing; the full cache is measured in any case")
    return found


def _budgets(text: str, kv: KVConfig) -> list[str]:
    found = list(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))
    for budget in found or [text]:
        kv.check("--budgets: ", budget=budget)
    return found


def _lengths(text: str) -> list[int]:
    parts = [part.strip().replace("_", "") for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--lengths is {text!r}; accepted: numbers of tokens, such as 1000,2000")
    return sorted({int(part) for part in parts})


def _longbench_lines(files: Sequence[Path], prompts: Path | None, max_lengths: Path | None, n: int) -> list[longbench.Line]:
    if not files:
        return []
    if not prompts or not max_lengths:
        raise ValueError("--longbench needs --prompts and --max-lengths, LongBench's dataset2prompt.json and dataset2maxlen.json")
    templates = longbench.read_prompts(prompts, max_lengths)
    lines = [line for file in files for line in longbench.read_lines(file, templates)[: n or None]]
    longbench.check_packages(lines)
    return lines


def _able(wanted: Sequence[str], load_for: Callable[[str, int], Llama], insist: bool) -> tuple[list[str], str, int]:
    """The policies that run on this model; its fingerprint, and its threads."""
    reasons: dict[str, str] = {}
    fingerprint, n_threads = "", 0
    for context in ["laprox", *dict.fromkeys(map(made_with, wanted))]:
        mine = [policy for policy in wanted if made_with(policy) == context]
        try:
            llm = load_for(context, 256)
        except ValueError as error:
            if context == "laprox":  # no policy can do without what this one needs
                raise
            reasons |= dict.fromkeys(mine, str(error))
            continue
        fingerprint, n_threads = _core.model_fingerprint(llm._model.model), llm.n_threads
        reasons |= Reader(llm).able(mine)
        llm.close()
    for policy, reason in reasons.items():
        if insist:
            raise LaproxError(f"{policy} does not run on this model: {reason}")
        notes.print(f"without {policy}: {reason}", markup=False)
    able = [policy for policy in wanted if policy not in reasons]
    if not able:
        raise ValueError("none of the policies runs on this model")
    return able, fingerprint, n_threads


# --- measuring -------------------------------------------------------------------------------------------------------


def _run(
    load_for: Callable[[str, int], Llama],
    n_ctx: int,
    vocabulary: LlamaModel,
    jobs: Sequence[Job],
    cells: Sequence[Setting],
    rows: Rows,
) -> None:
    """Measure what is missing. Policies that need a context of their own come one after another: a large model fits once."""
    parts: list[tuple[str, list[tuple[Job, list[Setting | None]]]]] = []
    for context in dict.fromkeys(made_with(cell.policy) for cell in cells):
        wanted = [None] * (not parts) + [cell for cell in cells if made_with(cell.policy) == context]  # None: the full cache
        left = [
            (job, [cell for cell in wanted if any(job.key(i, cell) not in rows for i in job.questions(cell))]) for job in jobs
        ]
        parts.append((context, [(job, missing) for job, missing in left if missing]))

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn())
    total = sum(job.weight * len(missing) for _, part in parts for job, missing in part)
    documents, done, begin = sum(len(part) for _, part in parts), 0, time.monotonic()
    with Progress(
        *columns, TimeRemainingColumn(), console=notes, disable=not notes.is_terminal, transient=True, speed_estimate_period=600
    ) as progress:
        bar = progress.add_task("", total=total)
        for context, part in parts:
            if not part:
                continue
            reader = Reader(load_for(context, n_ctx))
            for job, missing in part:
                done += 1
                about = f"{job.family}, {len(job.opening):,} tokens"
                progress.update(bar, description=f"document {done} of {documents}: {about}")
                for weight in _measure(reader, vocabulary, job, missing, rows):
                    progress.advance(bar, weight)
                if not notes.is_terminal:
                    notes.print(f"document {done} of {documents} ({about}): {time.monotonic() - begin:.0f} s", markup=False)
            reader.llm.close()


def _measure(reader: Reader, vocabulary: LlamaModel, job: Job, cells: Sequence[Setting | None], rows: Rows) -> Iterator[float]:
    """What is missing about one document. Yields how much of the work each trial was."""
    reader.read(job.opening, head=job.head)
    trials = Trials(reader, job.prompts, lambda tokens: text_of(vocabulary, tokens))
    step = job.weight / len(job.prompts)
    if None in cells:
        for i in range(len(job.prompts)):
            if job.key(i) not in rows:
                rows.add(job.key(i), trials.whole(i))
            yield step
    for regime in REGIMES:
        for i, cell in trials.order(regime, [cell for cell in cells if cell is not None and cell.regime == regime and job.questions(cell)]):
            if job.key(i, cell) not in rows:
                rows.add(job.key(i, cell), trials.measure(i, cell))
            yield step


# --- showing ---------------------------------------------------------------------------------------------------------


def show(summary: Summary) -> None:
    """A table for each regime and length."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for regime in summary.regimes:
        for length in summary.lengths:
            at = f"{length:,} tokens" if length else "prompts as they are"
            table = Table(
                "policy", *summary.budgets, box=None, pad_edge=False, title=f"{REGIMES[regime]}, {at}", title_justify="left"
            )
            for column in table.columns[1:]:
                column.justify = "right"
            for policy, means in summary.table("score", regime, length):
                table.add_row(policy, *(mean.percent() if mean else "-" for mean in means))
            console.print(table)
            console.print()
    counted = ", ".join(summary.tasks)
    console.print(f"Score in percent, ± one standard error: {summary.documents} documents, the mean over questions of {counted}.")
    if not summary.complete:
        console.print("Unfinished: only documents that all policies have read count, while there are any.")
