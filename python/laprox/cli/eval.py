"""`laprox eval`: benchmarks, for policies x budgets x lengths."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from laprox import KVConfig, extras
from laprox._upstream import LlamaModel
from laprox.chat.reading import read_documents
from laprox.chat.tokens import tokens_of
from laprox.cli import options
from laprox.cli.measuring import measure, split
from laprox.cli.running import Restart, Running
from laprox.cli.show import notes, remark
from laprox.cli.source import takes_model
from laprox.config import policies as policy_names
from laprox.eval import books, longbench, tasks
from laprox.eval.bench import plan_policies, runnable
from laprox.eval.contenders import FULL
from laprox.eval.jobs import Job, book_jobs, context_size, longbench_jobs, task_jobs
from laprox.eval.reader import RECALL, REFIT, REGIMES, REPEAT, SHORTER, archive_for, check_suits, plain, probes, types_of
from laprox.eval.rows import Rows, make_header, make_model
from laprox.eval.summary import Summary
from laprox.files import check_writable
from laprox.read.probe import WINDOW

ALL = "all"


@dataclass(frozen=True)
class Asked:
    """What is read and asked."""

    task_names: Annotated[str, typer.Option("--tasks", help=f"What to measure, separated by commas: {', '.join([*tasks.GROUPS, *tasks.TASKS])}.")] = (
        ""
    )
    lengths: Annotated[str, typer.Option("--lengths", help="Lengths of the documents in tokens, separated by commas.")] = "1000,2000"
    n_documents: Annotated[
        int, typer.Option("--documents", min=0, help="Number of documents per task and length, and of lines of each LongBench file; 0 = all lines.")
    ] = 4
    questions: Annotated[int, typer.Option("--questions", min=1, help="Most questions to ask about one document, where a task has several.")] = 5
    seed: Annotated[int, typer.Option("--seed", "-s", help="Seed of the documents.")] = 1
    filler: Annotated[
        list[Path] | None,
        typer.Option("--filler", help="A document to hide needles in; repeatable. By default, generated sentences.", show_default=False),
    ] = None
    paragraphs: Annotated[
        Path | None,
        typer.Option(
            "--paragraphs", help='For the task qa: a file with lines of {"question": ..., "answers": [...], "context": ...}.', show_default=False
        ),
    ] = None
    longbench_files: Annotated[list[Path] | None, typer.Option("--longbench", help="A .jsonl file of LongBench; repeatable.", show_default=False)] = (
        None
    )
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="For LongBench: a JSON file of dataset -> prompt template.", show_default=False)
    ] = None
    max_lengths: Annotated[
        Path | None, typer.Option("--max-lengths", help="For LongBench: a JSON file of dataset -> longest answer in tokens.", show_default=False)
    ] = None
    max_prompt: Annotated[
        int,
        typer.Option(
            "--max-prompt", min=0, help="For LongBench: prompts of more tokens lose their middle; 0 = as many as the model was trained for."
        ),
    ] = 0
    book_questions: Annotated[
        Path | None, typer.Option("--book-questions", help="Questions about passages of books, a .json file; needs --books.", show_default=False)
    ] = None
    book_folder: Annotated[
        Path | None, typer.Option("--books", help="A folder of Project Gutenberg's books, as pg<number>.txt.", show_default=False)
    ] = None

    @property
    def files(self) -> list[Path]:
        """All that decide it."""
        single = [self.paragraphs, self.book_questions, *(self.longbench_files or []), self.prompts, self.max_lengths]
        return [*(self.filler or []), *(path for path in single if path)]

    @cached_property
    def chosen(self) -> list[str]:
        """Tasks. Raises ValueError if they are unknown, or lack something."""
        chosen = tasks.choose_tasks(self.task_names)
        accepted = f"--tasks takes {', '.join([*tasks.GROUPS, *tasks.TASKS])}; --longbench and --book-questions take files"
        if not chosen and not self.longbench_files and not self.book_questions:
            raise ValueError(f"nothing to measure: {accepted}")
        if (self.book_questions is None) != (self.book_folder is None):
            raise ValueError("--book-questions and --books go together: questions, and the folder of the books that they are about")
        if (chosen or self.book_questions) and not self.n_documents:
            raise ValueError("--documents is 0; accepted: at least 1, since tasks never end (all of a file with --longbench alone)")
        if tasks.QA in chosen and not self.paragraphs:
            raise ValueError("--tasks has qa, which needs --paragraphs")
        return chosen

    @cached_property
    def of_length(self) -> list[int]:
        """Lengths of documents that have one. Raises ValueError if they are no numbers."""
        parts = [part.strip().replace("_", "") for part in self.lengths.split(",") if part.strip()]
        if not self.chosen and not self.book_questions:
            return []
        if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f"--lengths is {self.lengths!r}; accepted: numbers of tokens, such as 1000,2000")
        return sorted({int(part) for part in parts})

    @cached_property
    def lines(self) -> list[longbench.Line]:
        """Of LongBench. Raises ValueError, or MissingExtra."""
        if not self.longbench_files:
            return []
        if not self.prompts or not self.max_lengths:
            raise ValueError("--longbench needs --prompts and --max-lengths, LongBench's dataset2prompt.json and dataset2maxlen.json")
        templates = longbench.read_prompts(self.prompts, self.max_lengths)
        lines = [line for file in self.longbench_files for line in longbench.read_lines(file, templates)[: self.n_documents or None]]
        longbench.check_packages(lines)
        return lines

    @cached_property
    def sentences(self) -> list[str]:
        """Those to hide needles among. Raises ValueError if they can't be read."""
        return tasks.sentences(read_documents(self.filler, remark)) if self.filler else []

    @cached_property
    def given(self) -> list[tasks.Paragraph]:
        """For the task qa. Raises ValueError if they can't be read."""
        return tasks.read_paragraphs(self.paragraphs) if self.paragraphs else []

    def check(self) -> None:
        """Find everything that can be wrong without the model."""
        _ = self.chosen, self.of_length, self.lines, self.sentences, self.given

    def jobs(self, vocabulary: LlamaModel) -> Iterator[Job]:
        """As tokens. Raises ValueError where a length does not suit."""
        maker = tasks.Maker(lambda text: len(tokens_of(vocabulary, text)), self.seed, self.questions, self.sentences, self.given)
        yield from task_jobs(vocabulary, maker, self.chosen, self.of_length, self.n_documents)
        if self.book_questions and self.book_folder:
            documents = books.load(self.book_questions)
            yield from book_jobs(vocabulary, documents, self.book_folder, self.of_length, self.n_documents, self.questions)
        yield from longbench_jobs(vocabulary, self.lines, self.max_prompt)


@takes_model()
@options.takes_kv(without=("budget", "policy", "min_tokens", "prefill", "archive", "archive_limit", "recall", "protect"), min_tokens=0)  # every budget is reached
def evaluate(
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the results go, a .jsonl file; an interrupted run goes on with it.")] = Path(
        "eval.jsonl"
    ),
    asked: Asked = Asked(),
    policies: Annotated[
        str,
        typer.Option(
            "--policies",
            help=f"What to compare, separated by commas; {ALL} = every policy that has a name; {SHORTER} = the document's last tokens alone; "
            f"POLICY{RECALL} = with an archive, from which entries come back for a later question; POLICY{REPEAT} = by what the model "
            f"looks at as it repeats the document; POLICY{REFIT} = the same, and what stays is refitted to that. Last of all @q8_0, say, or "
            "@q8_0/q4_0: types of cached keys and values other than -ctk and -ctv, whose full cache it is compared with.",
        ),
    ] = "laprox,snapkv,streaming",
    budgets: Annotated[
        str, typer.Option("--budgets", help="What the KV cache may keep, separated by commas: shares (5%), tokens (2048) or bytes (512MiB).")
    ] = "2%,5%,10%,20%,50%",
    regime: Annotated[
        str,
        typer.Option(
            "--regime",
            help="When the cache is compressed, separated by commas: aware (the question is in view), agnostic (before any "
            "question), follow-up (for the document's first question, then another one is asked).",
        ),
    ] = "aware",
    html: Annotated[Path | None, typer.Option("--html", help="Write a report, an .html file.", show_default=False)] = None,
    restart: Restart = False,
    ctx_size: options.ContextSize = 0,
    kv: KVConfig = KVConfig(),
    cache_type_k: options.CacheTypeK = "f16",
    cache_type_v: options.CacheTypeV = "f16",
    running: Running = Running(),
) -> None:
    """Measure what is still answered at a budget: RULER's task families, LongBench. Greedy, so that it can be repeated."""
    # Everything that can be wrong is found before the long work starts.
    asked.check()
    wanted = _policies(policies, kv)
    kv = replace(kv, archive=archive_for(wanted))
    budget_list = _budgets(budgets, kv)
    regimes = split(regime, "--regime")
    if unknown := [name for name in regimes if name not in REGIMES]:
        raise ValueError(f"--regime has {unknown[0]!r}; accepted: {', '.join(REGIMES)}, with commas")
    check_suits(wanted, regimes)
    type_k, type_v = options.cache_types(cache_type_k, cache_type_v)
    files = [*asked.files, *(Path(path) for path in (kv.profile, kv.gates) if path)]
    check_writable(output, [*files, model.here])
    if html:
        extras.need("report", "laprox eval --html")
        check_writable(html, [*files, model.here, output])

    loader = running.loader(model.get(), type_k.ggml, type_v.ggml)
    vocabulary = loader.vocabulary
    jobs = list(asked.jobs(vocabulary))
    if not any(map(probes, wanted)):  # needs no room then
        jobs = [replace(job, probe=None) for job in jobs]
    n_ctx = context_size(vocabulary, jobs, ctx_size)
    able = runnable(wanted, lambda policy: loader.open(256, replace(kv, policy=policy)), insist=policies != ALL)
    for policy, reason in able.refused.items():
        notes.print(f"without {policy}: {reason}", markup=False)
    settings = {
        "seed": asked.seed, "questions": asked.questions, "window": kv.window, "sink": kv.sink, "recent": kv.recent, "floor": kv.floor,
        "cache": f"{cache_type_k}, {cache_type_v}", "threads": able.n_threads, "gpu_layers": running.gpu_layers,
        "batch_size": running.batch_size,
    }  # fmt: skip
    beside = [loader.path.with_suffix(kind) for kind in (".kv-profile.gguf", ".kv-gates.gguf")]
    inputs = [*files, *(path for path in beside if path.exists())]
    header = make_header("eval", sys.argv, settings, inputs, make_model(loader.path, able.fingerprint))
    rows = Rows(output, header, restart)

    observed = max(kv.window, WINDOW) if any(map(probes, wanted)) else kv.window
    readings = plan_policies(
        rows, jobs, able.policies, budget_list, regimes,
        lambda policy, types: loader.of(types).open(n_ctx, replace(kv, policy=policy, window=observed)),
    )  # fmt: skip
    measure(readings, rows, vocabulary, window=kv.window, restart=restart)

    cells = {(r, policy, b) for r in regimes for policy in able.policies for b in budget_list}
    cells |= {Summary.full_cell(r) for r in ("", *regimes)} | {("", f"{FULL}@{types}", "") for policy in able.policies if (types := types_of(policy))}
    asked_now = {(job.family, job.length, job.number, i) for job in jobs for i in job.questions()}
    summary = Summary((k, row) for k, row in rows if k[:4] in asked_now and k[4:] in cells)
    show(summary)
    if html:
        from laprox.eval.eval_report import evaluation_page  # matplotlib takes its time

        evaluation_page(summary, rows.header).save(html)
        notes.print(f"{html}: the report.", markup=False)


def _policies(text: str, kv: KVConfig) -> list[str]:
    if text == ALL:
        return [name for name in policy_names() if name != "full"]
    found = split(text, "--policies")
    for name in found:
        if name == SHORTER:
            continue
        kv.check("--policies: ", policy=plain(name))
        if plain(name) in ("off", "full"):
            raise ValueError(f"--policies has {name!r}, which compresses nothing; the full cache is measured in any case")
    return found


def _budgets(text: str, kv: KVConfig) -> list[str]:
    found = split(text, "--budgets")
    for budget in found:
        kv.check("--budgets: ", budget=budget)
    return found


def show(summary: Summary) -> None:
    """A table for each regime and length."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for regime in summary.regimes:
        for length in summary.lengths:
            at = f"{length:,} tokens" if length else "prompts as they are"
            table = Table("policy", *summary.budgets, box=None, pad_edge=False, title=f"{REGIMES[regime]}, {at}", title_justify="left")
            for column in table.columns[1:]:
                column.justify = "right"
            for policy, means in summary.table("score", regime, length):
                table.add_row(policy, *(mean.percent() if mean else "-" for mean in means))
            console.print(table)
            console.print()
    counted = ", ".join(summary.tasks)
    console.print(f"Score in percent, ± one standard error: {summary.documents} documents, the mean over questions of {counted}.")
    for refused in summary.refused:
        console.print(refused)
    if not summary.complete:
        console.print("Unfinished: only documents that all policies have read count, while there are any.")
