"""`laprox eval`: benchmarks, for policies x budgets x lengths."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from llama_cpp._internals import LlamaModel
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from laprox import KVConfig, Llama, LaproxError, _core
from laprox.cli import log, options
from laprox.cli.conversation import Conversation
from laprox.cli.loading import load, load_vocabulary
from laprox.cli.options import DEFAULT
from laprox.cli.show import notes
from laprox.config import policies as policy_names
from laprox.eval import longbench, tasks
from laprox.eval.reader import REGIMES, Reader, Setting, made_with
from laprox.eval.rows import Rows, make_header, make_model
from laprox.eval.summary import Key, Summary, key
from laprox.eval.trials import Prompt, Trials
from laprox.partial import check_writable
from laprox.reading import read_documents

ALL = "all"


@dataclass(frozen=True)
class Job:
    """A document to read, and what to ask about it."""

    family: str
    length: int
    number: int
    opening: list[int]
    prompts: tuple[Prompt, ...]

    @property
    def tokens(self) -> int:
        """The longest that the cache has to hold."""
        return len(self.opening) + max(len(p.tokens) + max(len(p.reply) + 1, p.question.predict) for p in self.prompts)

    def key(self, i: int, setting: Setting | None = None) -> Key:
        """Of the row of question i."""
        cell = (setting.regime, setting.policy, setting.budget) if setting else ()
        return key(self.family, self.length, self.number, i, *cell)


def evaluate(
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Results, a .jsonl file; an interrupted run goes on with it.", show_default=False)],
    task_names: Annotated[str, typer.Option("--tasks", help=f"Of {', '.join([*tasks.GROUPS, *tasks.TASKS])}; with commas.")] = "",
    lengths: Annotated[str, typer.Option("--lengths", help="Of the documents, in tokens of the model.")] = "1000,2000",
    policies: Annotated[str, typer.Option("--policies", help=f"What to compare, with commas; {ALL}: every policy that has a name.")] = "laprox,snapkv,streaming",
    budgets: Annotated[str, typer.Option("--budgets", help="What may be kept, with commas.")] = "2%,5%,10%,20%,50%",
    regime: Annotated[str, typer.Option("--regime", help="aware: compressed with the question in view; agnostic: before it; both.")] = "aware",
    n_documents: Annotated[
        int, typer.Option("--documents", "-d", min=0, help="Per task and length, and of each LongBench file, its first so many; 0 = all of a file.")
    ] = 4,
    questions: Annotated[int, typer.Option("--questions", min=1, help="About a document, at most, where a task has several.")] = 5,
    seed: Annotated[int, typer.Option("--seed", "-s", help="Another seed, other documents.")] = 1,
    filler: Annotated[
        list[Path] | None, typer.Option("--filler", help="A document to hide needles in; repeatable. Without it, generated sentences.", show_default=False)
    ] = None,
    paragraphs: Annotated[
        Path | None, typer.Option("--paragraphs", help='For qa: lines of {"question": ..., "answers": [...], "context": ...}.', show_default=False)
    ] = None,
    longbench_files: Annotated[list[Path] | None, typer.Option("--longbench", help="A .jsonl file of LongBench; repeatable.", show_default=False)] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="For LongBench: a JSON of dataset -> template.", show_default=False)] = None,
    max_lengths: Annotated[
        Path | None, typer.Option("--max-lengths", help="For LongBench: a JSON of dataset -> longest answer in tokens.", show_default=False)
    ] = None,
    max_prompt: Annotated[
        int, typer.Option("--max-prompt", min=0, help="For LongBench: longer prompts lose their middle; 0 = what the model was trained for.")
    ] = 0,
    html: Annotated[Path | None, typer.Option("--html", help="Write a report, an .html file.", show_default=False)] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what --output has.")] = False,
    ctx_size: options.ContextSize = 0,
    kv_window: options.KVWindow = DEFAULT.window,
    kv_sink: options.KVSink = DEFAULT.sink,
    kv_recent: options.KVRecent = DEFAULT.recent,
    kv_profile: options.KVProfile = None,
    kv_gates: options.KVGates = None,
    kv_floor: options.KVFloor = DEFAULT.floor,
    cache_type_k: options.CacheTypeK = "f16",
    cache_type_v: options.CacheTypeV = "f16",
    threads: options.Threads = 0,
    gpu_layers: options.GPULayers = 0,
    batch_size: options.BatchSize = 512,
    verbose: options.Verbose = False,
) -> None:
    """Measure what is still answered at a budget: RULER's task families, facts, LongBench. Greedy, so that it can be repeated."""
    # Everything that can be wrong is found before the long work starts.
    chosen = tasks.choose_tasks(task_names)
    if not chosen and not longbench_files:
        raise ValueError(f"nothing to measure: --tasks takes {', '.join([*tasks.GROUPS, *tasks.TASKS])}; --longbench takes files")
    wanted = _policies(policies)
    budget_list = _budgets(budgets)
    length_list = _lengths(lengths) if chosen else []
    regimes = list(REGIMES) if regime == "both" else [regime]
    if regime != "both" and regime not in REGIMES:
        raise ValueError(f"--regime is {regime!r}; accepted: {', '.join(REGIMES)}, both")
    kv = {"window": kv_window, "sink": kv_sink, "recent": kv_recent, "profile": kv_profile, "gates": kv_gates, "floor": kv_floor}
    KVConfig(**kv)
    type_k, type_v = options.cache_types(cache_type_k, cache_type_v)
    if chosen and not n_documents:
        raise ValueError("--documents is 0; accepted: at least 1, since tasks never end (all of a file with --longbench alone)")
    if tasks.QA in chosen and not paragraphs:
        raise ValueError("--tasks has qa, which needs --paragraphs")
    lines = _longbench_lines(longbench_files or [], prompts, max_lengths, n_documents)
    check_writable(output)
    if html:
        check_writable(html)
    sentences = tasks.sentences(read_documents(filler)) if filler else []
    given = tasks.read_paragraphs(paragraphs) if paragraphs else []

    log.record(verbose)
    vocabulary = load_vocabulary(model)
    maker = tasks.Maker(lambda text: len(_tokens(vocabulary, text)), seed, questions, sentences, given)
    jobs = list(_jobs(vocabulary, maker, chosen, length_list, n_documents))
    jobs += _longbench_jobs(vocabulary, lines, max_prompt)
    n_ctx = _context_size(vocabulary, jobs, ctx_size)

    def load_for(policy: str, size: int) -> Llama:
        return load(
            model, verbose, kv=KVConfig(policy=policy, min_tokens=0, **kv), n_ctx=size, n_batch=batch_size, n_threads=threads or None,
            n_threads_batch=threads or None, n_gpu_layers=gpu_layers, type_k=type_k.ggml, type_v=type_v.ggml,
        )  # fmt: skip

    able, fingerprint, n_threads = _able(wanted, load_for, insist=policies != ALL)
    settings = {
        "seed": seed, "questions": questions, "window": kv_window, "sink": kv_sink, "recent": kv_recent, "floor": kv_floor,
        "cache": f"{cache_type_k}, {cache_type_v}", "threads": n_threads, "gpu_layers": gpu_layers, "batch_size": batch_size,
    }  # fmt: skip
    beside = [p for p in (model.with_suffix(".kv-profile.npy"), model.with_suffix(".kv-gates.gguf")) if p.exists()]
    inputs = [*(filler or []), paragraphs, *(longbench_files or []), prompts, max_lengths, kv_profile, kv_gates, *beside]
    header = make_header("eval", sys.argv, settings, [p for p in inputs if p], make_model(model, fingerprint))
    rows = Rows(output, header, restart)

    cells = [Setting(policy, budget, r) for r in regimes for policy in able for budget in budget_list]
    try:
        for context in dict.fromkeys(map(made_with, able)):
            part = [cell for cell in cells if made_with(cell.policy) == context]
            _run(lambda: load_for(context, n_ctx), vocabulary, jobs, part, rows)
    except KeyboardInterrupt:
        notes.print(f"Stopped. What is finished is in {output}; the same command goes on with it.", markup=False)
        raise typer.Exit(130) from None

    keys = {job.key(i, cell) for job in jobs for i in range(len(job.prompts)) for cell in [None, *cells]}
    summary = Summary((k, row) for k, row in rows if k in keys)
    show(summary)
    if html:
        from laprox.viz.evaluation import evaluation_page  # matplotlib takes its time

        evaluation_page(summary, rows.header).save(html)
        notes.print(f"{html}: the report.", markup=False)


# --- what to measure -------------------------------------------------------------------------------------------------


def _policies(text: str) -> list[str]:
    if text == ALL:
        return [name for name in policy_names() if name != "full"]
    found = list(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))
    for name in found or [text]:
        KVConfig(policy=name)
        if name in ("off", "full", ""):
            raise ValueError(f"--policies has {name!r}, which compresses nothing; the full cache is measured in any case")
    return found


def _budgets(text: str) -> list[str]:
    found = list(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))
    for budget in found or [text]:
        KVConfig(budget=budget)
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


def _jobs(vocabulary: LlamaModel, maker: tasks.Maker, chosen: Sequence[str], lengths: Sequence[int], n: int) -> Iterator[Job]:
    """By number first: what an interrupted run has measured is of every task and length."""
    for number in range(n):
        for length in lengths:
            for family, sample in maker.samples(chosen, length, number):
                yield Job(family, length, number, *_encode(vocabulary, sample))


def _longbench_jobs(vocabulary: LlamaModel, lines: Sequence[longbench.Line], max_prompt: int) -> Iterator[Job]:
    if not lines:
        return
    conversation = Conversation(vocabulary, "")
    around = len(conversation.prompt("")) + 8
    numbers: dict[str, int] = {}
    for line in lines:
        longest = max_prompt or conversation.trained_for - line.predict - around
        if longest < 64:
            raise ValueError(f"--max-prompt is {max_prompt} and the model was trained for {conversation.trained_for} tokens: too few")
        sample = longbench.sample(
            line, longest, lambda text: _tokens(vocabulary, text), lambda t: _text(vocabulary, t), chat=not conversation.stop
        )
        number = numbers[line.dataset] = numbers.get(line.dataset, -1) + 1
        yield Job(f"longbench {line.dataset}", max_prompt, number, *_encode(vocabulary, sample))


def _encode(vocabulary: LlamaModel, sample: tasks.Sample) -> tuple[list[int], tuple[Prompt, ...]]:
    """The tokens that every question's prompt begins with, and what follows in each."""
    if sample.chat:
        conversation = Conversation(vocabulary, sample.document, sample.between)
        whole = [conversation.prompt(question.text) for question in sample.questions]
        opening, ends = conversation.opening(), not conversation.stop
    else:
        opening = vocabulary.tokenize(b"", add_bos=True, special=False) + _tokens(vocabulary, sample.document)
        whole = [opening + _tokens(vocabulary, sample.between + question.text) for question in sample.questions]
        ends = False
    # A question that begins like another one may share more tokens with the opening than belong to it, or fewer.
    n = min([len(opening), *(_shared(opening, prompt) for prompt in whole), *(len(prompt) - 1 for prompt in whole)])
    prompts = []
    for question, prompt in zip(sample.questions, whole):
        begin = _tokens(vocabulary, _space(vocabulary, prompt) + question.prefix) if question.prefix else []
        reply = _tokens(vocabulary, _space(vocabulary, prompt) + question.references[0]) if question.metric == "right" else []
        prompts.append(Prompt(question, prompt[n:] + begin, reply, ends))
    return opening[:n], tuple(prompts)


def _space(vocabulary: LlamaModel, prompt: Sequence[int]) -> str:
    """What a reply begins with: a space, unless the prompt ends with white space or a control token, or the tokenizer adds it."""
    if vocabulary.metadata().get("tokenizer.ggml.model") == "llama":
        return ""
    return " " if _text(vocabulary, prompt[-1:]).strip() and not _text(vocabulary, prompt[-1:])[-1].isspace() else ""


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _tokens(vocabulary: LlamaModel, text: str) -> list[int]:
    return vocabulary.tokenize(text.encode(), add_bos=False, special=False) if text else []


def _text(vocabulary: LlamaModel, tokens: Sequence[int]) -> str:
    return vocabulary.detokenize(list(tokens)).decode(errors="replace")


def _context_size(vocabulary: LlamaModel, jobs: Sequence[Job], wanted: int) -> int:
    longest = max(jobs, key=lambda job: job.tokens)
    trained = Conversation(vocabulary, "").trained_for
    if wanted and wanted < longest.tokens:
        raise ValueError(f"{longest.family} takes {longest.tokens:,} tokens, too many for -c {wanted}")
    if not wanted and trained and trained < longest.tokens:
        raise ValueError(
            f"{longest.family} takes {longest.tokens:,} tokens, but the model was trained for {trained:,}: shorter --lengths "
            f"(or insist: -c {longest.tokens})"
        )
    return wanted or longest.tokens


def _able(wanted: Sequence[str], load_for: Any, insist: bool) -> tuple[list[str], str, int]:
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


def _run(load_it: Any, vocabulary: LlamaModel, jobs: Sequence[Job], cells: Sequence[Setting], rows: Rows) -> None:
    """Measure what is missing of some cells, all of which one context serves."""
    missing = [
        (job, [(i, c) for i in range(len(job.prompts)) for c in [None, *cells] if job.key(i, c) not in rows]) for job in jobs
    ]
    missing = [(job, left) for job, left in missing if left]
    if not missing:
        return
    reader = Reader(load_it())
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn(), TimeRemainingColumn())
    begin = time.monotonic()
    with Progress(*columns, console=notes, disable=not notes.is_terminal, transient=True, speed_estimate_period=600) as progress:
        bar = progress.add_task("", total=sum(len(job.opening) * len(left) for job, left in missing))
        for n, (job, left) in enumerate(missing, 1):
            progress.update(bar, description=f"{job.family}, {len(job.opening):,} tokens, document {n} of {len(missing)}")
            _one(reader, vocabulary, job, cells, rows, lambda: progress.advance(bar, len(job.opening)))
            if not notes.is_terminal:
                notes.print(f"document {n} of {len(missing)} ({job.family}, {len(job.opening):,} tokens): {time.monotonic() - begin:.0f} s", markup=False)
    reader.llm.close()


def _one(reader: Reader, vocabulary: LlamaModel, job: Job, cells: Sequence[Setting], rows: Rows, tick: Any) -> None:
    """Everything that is missing about one document."""
    reader.read(job.opening)
    trials = Trials(reader, job.prompts, lambda tokens: _text(vocabulary, tokens))
    for i in range(len(job.prompts)):
        if job.key(i) not in rows:
            rows.add(job.key(i), trials.whole(i))
            tick()
    for regime in REGIMES:
        for i, cell in trials.order(regime, [cell for cell in cells if cell.regime == regime]):
            if job.key(i, cell) not in rows:
                rows.add(job.key(i, cell), trials.measure(i, cell))
                tick()


# --- showing ---------------------------------------------------------------------------------------------------------


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
    counted = ", ".join(summary.answerable)
    console.print(f"Score in percent, the mean over questions of {counted}, ± one standard error; {summary.documents} documents.")
    if not summary.complete:
        console.print("Unfinished: only documents that all policies have read count, while there are any.")
