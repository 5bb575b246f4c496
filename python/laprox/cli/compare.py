"""`laprox compare`: policies against each other and against the honest alternatives, on one's own model and documents."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from llama_cpp._internals import LlamaModel
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from laprox import KVConfig, LaproxError, Llama, _core
from laprox.cli import log, options
from laprox.cli.conversation import Conversation
from laprox.cli.info import measure
from laprox.cli.loading import load, load_vocabulary, load_weights
from laprox.cli.show import notes, size
from laprox.eval.comparison import Entry, entries, verdict
from laprox.eval.contenders import FULL, POLICIES, ROOM, SHORTER, Budget, Contender, make_contenders
from laprox.eval.facts import insert_facts
from laprox.eval.reader import Reader
from laprox.eval.rows import Rows, make_header, make_model
from laprox.eval.examiner import Examiner, Logprobs, Material, reference
from laprox.partial import check_writable
from laprox.reading import read_document

LEAST = 1024  # tokens of a document, without its end
READING = 0.2  # of the time that a token takes by itself, one takes that is read with many; for the time left


def compare(
    model: options.Model,
    documents: Annotated[list[Path], typer.Argument(metavar="DOCUMENT...", help="Text, Markdown, HTML or PDF files; each is read by itself.", show_default=False)],
    budgets: Annotated[
        str, typer.Option("--budgets", help='What may be held, separated by commas: shares of the full cache ("10%"), tokens ("2048") or bytes ("512MiB").')
    ] = "5%,10%,20%",
    policies: Annotated[
        str,
        typer.Option("--policies", help="What to compare, separated by commas: names as for --kv-policy; POLICY@q8_0 runs one over a q8_0 cache. "
                     "The full cache, q8_0 and q4_0 caches and a shorter context are always there."),
    ] = ",".join(POLICIES),
    output: Annotated[Path, typer.Option("--output", "-o", help="The report, an .html file; the results come beside it as .jsonl.")] = Path("compare.html"),
    n_questions: Annotated[int, typer.Option("--questions", min=3, max=100, help="Questions about facts put into each document.")] = 10,
    n_continue: Annotated[
        int, typer.Option("--continuation", min=16, max=ROOM, help="Tokens of each document's end to hold back and predict.")
    ] = 192,
    n_tokens: Annotated[int, typer.Option("--tokens", min=0, help="Read so many tokens of each document; 0 = all.")] = 0,
    before_question: Annotated[
        bool, typer.Option("--compress-before-question", help="Compress the document before the questions, as for many unrelated ones.")
    ] = False,
    n_predict: Annotated[int, typer.Option("--predict", "-n", min=1, help="Longest answer in tokens.")] = 48,
    seed: Annotated[int, typer.Option("--seed", "-s", help="Of the facts.")] = 1,
    restart: Annotated[bool, typer.Option("--restart", help="Don't go on with an interrupted run.")] = False,
    kv_profile: options.KVProfile = None,
    kv_gates: options.KVGates = None,
    threads: options.Threads = 0,
    gpu_layers: options.GPULayers = 0,
    batch_size: options.BatchSize = 512,
    verbose: options.Verbose = False,
) -> None:
    """Try policies on your own model and documents, against the full cache and what else takes as few bytes.

    Facts are put into the documents and asked about, and the documents' own ends are predicted. Interrupted, it goes on where
    it was.
    """
    # Everything that can be wrong is found before the long work starts.
    named = _split(policies, "--policies")
    contenders = make_contenders(named)
    wanted = [Budget(text) for text in _split(budgets, "--budgets")]
    if output.suffix != ".html":
        raise ValueError(f"-o {output}: the report is an .html file")
    results = output.with_suffix(".jsonl")
    for path in (output, results):
        check_writable(path)
    texts = [read_document(path) for path in documents]

    log.record(verbose)
    base = KVConfig(min_tokens=0, profile=kv_profile, gates=kv_gates)
    bytes_per_token, refused = check_model(model, contenders, base)
    vocabulary = load_vocabulary(model)
    materials = [
        prepare(path.name, text, vocabulary, n_questions, n_continue, n_tokens, seed) for path, text in zip(documents, texts)
    ]
    full_bytes = bytes_per_token["f16"]
    for material in materials:
        for budget in wanted:
            budget.check(material.name, material.n_read, full_bytes)
    wanted.sort(key=lambda budget: budget.bytes(materials[0].n_read, full_bytes))
    _warn_if_long(materials, Conversation(vocabulary, "").trained_for)

    settings = {
        "budgets": [b.text for b in wanted],
        "policies": named,
        "questions": n_questions,
        "continuation": n_continue,
        "tokens": n_tokens,
        "regime": "agnostic" if before_question else "aware",
        "predict": n_predict,
        "seed": seed,
        "threads": threads,
        "gpu_layers": gpu_layers,
        "batch_size": batch_size,
    }
    files = [path for path in (kv_profile, kv_gates) if path]
    fingerprint = _core.model_fingerprint(load_weights(model, use_extra_bufts=False).model)
    rows = Rows(results, make_header("compare", sys.argv[1:], settings, [*documents, *files], make_model(model, fingerprint)), restart)

    def open_llm(contender: Contender, n_ctx: int) -> Llama:
        made_with, name = contender.context
        cache_type = options.CACHE_TYPES[name].ggml
        kv = None if contender.policy is None else KVConfig(policy=made_with, min_tokens=0, profile=kv_profile, gates=kv_gates)
        return load(
            model, verbose, kv=kv, flash_attn=True, n_ctx=n_ctx, n_batch=batch_size, n_threads=threads or None,
            n_threads_batch=threads or None, n_gpu_layers=gpu_layers, type_k=cache_type, type_v=cache_type,
        )  # fmt: skip

    run = Run(rows, contenders, wanted, bytes_per_token, refused, open_llm)
    try:
        with _progress() as advance:
            run.all(materials, vocabulary, settings["regime"], n_predict, advance)
    except KeyboardInterrupt:
        notes.print(f"Stopped. What is finished is in {results}; the same command goes on with it.", markup=False)
        raise typer.Exit(130) from None

    table = entries(rows, contenders, [b.text for b in wanted], len(materials))
    sentence = verdict(table, [b.text for b in wanted])
    show(table, sentence)

    from laprox.viz import comparison  # matplotlib takes its time

    comparison.page(rows, table, sentence, materials).save(output)
    notes.print(f"{output} has the report, {results} every number.", markup=False)


# --- before ----------------------------------------------------------------------------------------------------------


def check_model(model: Path, contenders: Sequence[Contender], base: KVConfig) -> tuple[dict[str, float], dict[str, str]]:
    """Ask small contexts.

    Returns:
        The bytes of a token's K and V in the layers that can be compressed, by cache type; and why some contenders can't run.

    Raises:
        ValueError: The model can't be compressed at all, or not by one of the contenders that were asked for.
    """
    weights = load_weights(model, use_extra_bufts=False)
    found: dict[str, float] = {}
    refused: dict[str, str] = {}
    try:
        found["f16"] = measure(weights, *2 * [options.CACHE_TYPES["f16"]]).bytes_per_token
    except LaproxError as error:
        raise ValueError(f"{model} can't be compressed, so there is nothing to compare: {error}") from None
    from dataclasses import replace

    for contender in contenders:
        config = replace(base, policy=contender.policy) if contender.policy else base
        try:
            cache = measure(weights, *2 * [options.CACHE_TYPES[contender.cache_type]], config)
        except LaproxError as error:
            if contender.policy and contender.name not in POLICIES:
                raise ValueError(f"--policies {contender.name}: {error}") from None
            refused[contender.name] = str(error)
        else:
            found.setdefault(contender.cache_type, cache.bytes_per_token)
    return found, refused


def prepare(name: str, text: str, vocabulary: LlamaModel, n_questions: int, n_continue: int, n_tokens: int, seed: int) -> Material:
    """A document with facts in it, its end held back.

    Raises:
        ValueError: It is too short; says how long it must be.
    """

    def tokenize(text: str) -> list[int]:
        return vocabulary.tokenize(text.encode(), add_bos=False, special=False)

    def cut(tokens: list[int]) -> int:
        """Where in the text these first tokens of it end, moved back to white space."""
        end = len(vocabulary.detokenize(tokens).decode(errors="ignore"))
        near = max(0, end - 200)
        spaces = [m.start() for m in re.finditer(r"\s+", text[near:end])]
        return near + spaces[-1] if spaces else end

    tokens = tokenize(text)
    if n_tokens and len(tokens) > n_tokens:
        text = text[: cut(tokens[:n_tokens])]
        tokens = tokenize(text)
    if len(tokens) < LEAST + n_continue:
        raise ValueError(
            f"{name} is {len(tokens):,} tokens, too short to compress: accepted are {LEAST + n_continue:,} and more"
            + (f" (--tokens {n_tokens} cuts it)" if n_tokens else "")
        )
    at = cut(tokens[: len(tokens) - n_continue])
    try:
        body, questions = insert_facts(text[:at], n_questions, seed)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    conversation = Conversation(vocabulary, body)
    end = conversation.document_end()
    prompts = [conversation.prompt(q.text) for q in questions]
    start = end - len(tokenize(body))
    return Material(
        name, prompts[0][:start], prompts[0][start:end], tokenize(text[at:])[:n_continue], questions, [p[end:] for p in prompts]
    )


def _split(text: str, option: str) -> list[str]:
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise ValueError(f"{option} is empty: name at least one")
    return found


def _warn_if_long(materials: Sequence[Material], trained: int) -> None:
    for material in materials:
        if trained and material.n_read > trained:
            notes.print(
                f"{material.name} is {material.n_read:,} tokens, but the model was trained for {trained:,}: expect bad answers even "
                f"from the full cache, or take less of it with --tokens {trained - ROOM}.",
                style="yellow", markup=False,
            )  # fmt: skip


# --- the long work ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A row to measure."""

    contender: Contender
    budget: Budget | None

    @property
    def text(self) -> str:
        """Of the budget, "" without one."""
        return self.budget.text if self.budget else ""

    @property
    def label(self) -> str:
        """For the progress bar."""
        return f"{self.contender.name} at {self.text}" if self.budget else self.contender.name


Advance = Callable[[str, float, float | None], None]  # what is done, by how much, and of how much (None: as before)


class Run:
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
        self._rows = rows
        self._jobs = [Job(c, None) for c in contenders if not c.budgeted]
        self._jobs += [Job(c, b) for c in contenders if c.budgeted for b in budgets]
        self._bytes = bytes_per_token
        self._refused = refused
        self._open = open_llm

    def all(self, materials: Sequence[Material], vocabulary: LlamaModel, regime: str, predict: int, advance: Advance) -> None:
        """Every document. Rows are added as they come."""
        stop = Conversation(vocabulary, "").stop
        examiners = [Examiner(m, lambda t: vocabulary.detokenize(t).decode(errors="replace"), stop, predict, regime) for m in materials]
        total = sum(self._work(i, examiner) for i, examiner in enumerate(examiners))
        advance("", 0, total)
        for i, examiner in enumerate(examiners):
            where = f"document {i + 1} of {len(materials)}: " if len(materials) > 1 else ""
            self._document(i, examiner, lambda what, n, where=where: advance(where + what, n, None))

    def _missing(self, i: int) -> list[Job]:
        return [job for job in self._jobs if (i, job.contender.name, job.text) not in self._rows]

    def _groups(self, i: int) -> list[list[Job]]:
        """Jobs that share a reading; policies over the same cache are neighbours."""
        jobs = sorted(self._missing(i), key=lambda job: self._order(job))
        return [list(group) for _, group in groupby(jobs, self._order)]

    def _order(self, job: Job) -> tuple[int, str]:
        """The full cache, which all others are compared with, comes first; a shorter context is a reading for each budget."""
        contender = job.contender
        if contender.policy is None:
            return (0 if contender.name == FULL else 1, f"{contender.name} {job.text}")
        return (2, " ".join(contender.context))

    def _work(self, i: int, examiner: Examiner) -> float:
        """In tokens that are decoded."""
        groups = self._groups(i)
        if not groups:
            return 0.0
        reading = READING * examiner.material.n_read
        again = 0 if groups[0][0].contender.name == FULL else 1
        return (len(groups) + again) * reading + (sum(map(len, groups))) * examiner.steps + len(examiner.material.continuation)

    def _document(self, i: int, examiner: Examiner, advance: Callable[[str, float], None]) -> None:
        groups = self._groups(i)
        if not groups:
            return
        material = examiner.material
        full: Logprobs | None = None
        if groups[0][0].contender.name != FULL:  # of an earlier run only the row is there
            groups.insert(0, [Job(Contender(FULL), None)])
        for group in groups:
            if reason := self._refused.get(group[0].contender.name):
                for job in group:
                    self._rows.add(_key(i, job), {"why_not": reason})
                continue
            first = group[0]
            n_read = material.n_read
            if first.contender.name == SHORTER:
                assert first.budget is not None
                n_read = int(first.budget.tokens(material.n_read, self._bytes["f16"]))
                if n_read <= len(material.prefix):
                    self._rows.add(_key(i, first), {"why_not": "the chat template alone is longer"})
                    continue
            llm = self._open(first.contender, material.context_size(n_read, examiner.predict))
            try:
                reader = Reader(llm, keep_asked=False)
                done = 0

                def progress(n: int, label: str = first.contender.name) -> None:
                    nonlocal done
                    advance(f"reading for {label}", READING * (n - done))
                    done = n

                reader.read(material.last(n_read) if n_read < material.n_read else [*material.prefix, *material.body], progress)
                if full is None:
                    full = reference(reader, material, lambda: advance(FULL, 1))
                for job in group:
                    if _key(i, job) not in self._rows:
                        self._rows.add(_key(i, job), self._row(job, examiner, reader, full, n_read, advance))
            finally:
                llm.close()

    def _row(self, job: Job, examiner: Examiner, reader: Reader, full: Logprobs, n_read: int, advance: Callable[[str, float], None]) -> dict:
        contender, n_full = job.contender, examiner.material.n_read
        per_token = self._bytes[contender.cache_type]
        step = lambda n: advance(job.label, n)  # noqa: E731
        if contender.policy is None:
            # llama.cpp rounds contexts up to 256 tokens; that is not held against it.
            row: dict = {"allocated": int(per_token * (n_read + ROOM)), "read": n_read}
            if job.budget:
                row["target"] = job.budget.bytes(n_full, self._bytes["f16"])
            return row | examiner.examine(reader, full, advance=step)
        assert job.budget is not None
        target = job.budget.bytes(n_full, self._bytes["f16"])
        if target >= per_token * (n_full + ROOM):
            return {"why_not": f"a {contender.cache_type} cache of everything is smaller than this budget"}
        try:
            row = examiner.examine(reader, full, contender.policy, f"{target // 1024}KiB", step)
        except LaproxError as error:
            return {"why_not": str(error)}
        return {"target": target, "read": n_read} | row


def _key(i: int, job: Job) -> tuple[int, str, str]:
    return (i, job.contender.name, job.text)


@contextmanager
def _progress() -> Iterator[Advance]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=notes, disable=not notes.is_terminal, transient=True) as progress:
        bar = progress.add_task("", total=None)

        def advance(what: str, n: float, total: float | None) -> None:
            progress.update(bar, advance=n, description=what)
            if total is not None:
                progress.update(bar, total=total)

        yield advance


# --- after -----------------------------------------------------------------------------------------------------------


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
        if e.why_not or e.unequal:
            console.print(f"{e.label} was not measured: {e.why_not}" if e.why_not else e.unequal, style="dim", markup=False, soft_wrap=True)
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
