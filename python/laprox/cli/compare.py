"""`laprox compare`: policies against each other and against the honest alternatives, on one's own model and documents."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from llama_cpp._internals import LlamaModel
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from laprox import KVConfig, LaproxError, Llama, _core, extras
from laprox.cli import log, options
from laprox.cli.conversation import Conversation
from laprox.cli.info import measure
from laprox.cli.loading import load, load_vocabulary, load_weights
from laprox.cli.show import notes, remark, size
from laprox.cli.source import takes_model
from laprox.eval.comparison import Entry, entries, verdict
from laprox.eval.contenders import POLICIES, ROOM, Budget, Contender, make_contenders
from laprox.eval.examiner import Examiner, Material
from laprox.eval.facts import insert_facts
from laprox.eval.measuring import Advance, Comparison
from laprox.eval.rows import Rows, make_header, make_model
from laprox.partial import check_writable
from laprox.reading import read_document

LEAST = 1024  # tokens of a document, without its end


@takes_model(rest="documents")
@options.takes_kv(only=("profile", "gates"), min_tokens=0)
def compare(
    model: options.Model,
    documents: Annotated[
        list[Path],
        typer.Argument(
            metavar="DOCUMENT", help="Text, Markdown, HTML or PDF files; each is read by itself.", show_default=False
        ),
    ],
    budgets: Annotated[
        str,
        typer.Option(
            "--budgets",
            help='What may be held, separated by commas: shares of the full cache ("10%"), tokens ("2048") or bytes ("512MiB").',
        ),
    ] = "5%,10%,20%",
    policies: Annotated[
        str,
        typer.Option(
            "--policies",
            help="What to compare, separated by commas: names as for --kv-policy; POLICY@q8_0 runs one over a q8_0 cache. "
            "The full cache, q8_0 and q4_0 caches and a shorter context are always there.",
        ),
    ] = ", ".join(POLICIES),
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The report, an .html file; the results come beside it as .jsonl.")
    ] = Path("compare.html"),
    n_questions: Annotated[
        int,
        typer.Option(
            "--questions", metavar="N", min=3, max=100, help="Number of facts to put into each document and ask about."
        ),
    ] = 10,
    n_continue: Annotated[
        int,
        typer.Option(
            "--continuation",
            metavar="N",
            min=16,
            help=f"Tokens of each document's end to hold back and predict, at most {ROOM}.",
        ),
    ] = 192,
    n_tokens: Annotated[
        int,
        typer.Option(
            "--tokens", metavar="N", min=0,
            help="Read at most N tokens of each document; 0 = all.",
        ),
    ] = 0,
    before_question: Annotated[
        bool,
        typer.Option(
            "--compress-before-question",
            help="Compress the document before the questions, as for many unrelated ones.",
            rich_help_panel="Compression",  # where no short option takes the room that its name needs
        ),
    ] = False,
    n_predict: Annotated[
        int,
        typer.Option(
            "--predict", "-n", metavar="N", min=1,
            help="Length of the longest answer in tokens.",
        ),
    ] = 48,
    seed: Annotated[int, typer.Option("--seed", "-s", help="Seed of the facts.")] = 1,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart",
            help="Start anew instead of going on with an interrupted run.",
        ),
    ] = False,
    kv: KVConfig = KVConfig(),
    threads: options.Threads = 0,
    gpu_layers: options.GPULayers = 0,
    batch_size: options.BatchSize = 512,
    verbose: options.Verbose = False,
) -> None:
    """Try policies on your own model and documents, against the full cache and what else takes as few bytes.

    Facts are put into the documents and asked about, and the documents' ends are predicted. Interrupted, it goes on where it was.
    """
    # Everything that can be wrong is found before the long work starts.
    extras.need("report", "laprox compare")
    if n_continue > ROOM:
        raise typer.BadParameter(f"--continuation is {n_continue}; accepted: 16 to {ROOM}")
    named = _split(policies, "--policies")
    contenders = make_contenders(named)
    wanted = [Budget(text) for text in _split(budgets, "--budgets")]
    if output.suffix != ".html":
        raise ValueError(f"-o {output}: the report is an .html file")
    results = output.with_suffix(".jsonl")
    for path in (output, results):
        check_writable(path)
    texts = [read_document(path, remark) for path in documents]

    model_path = model.get()
    log.record(verbose)
    with closing(load_weights(model_path, use_extra_bufts=False)) as weights:  # mapped, but neither read nor repacked
        bytes_per_token, refused = check_model(model_path, weights, contenders, kv)
        about = make_model(model_path, _core.model_fingerprint(weights.model))
    vocabulary = load_vocabulary(model_path)
    materials = [
        prepare(path.name, text, vocabulary, n_questions, n_continue, n_tokens, seed) for path, text in zip(documents, texts)
    ]
    full_bytes = bytes_per_token["f16"]
    for material in materials:
        for budget in wanted:
            budget.check(material.name, material.n_read, full_bytes)
    wanted.sort(key=lambda budget: budget.bytes(materials[0].n_read, full_bytes))
    _warn_if_long(materials, Conversation(vocabulary, "").trained_for)

    regime = "agnostic" if before_question else "aware"
    settings = {
        "budgets": [b.text for b in wanted],
        "policies": named,
        "questions": n_questions,
        "continuation": n_continue,
        "tokens": n_tokens,
        "regime": regime,
        "predict": n_predict,
        "seed": seed,
        "threads": threads,
        "gpu_layers": gpu_layers,
        "batch_size": batch_size,
    }
    files = [path for path in (kv.profile, kv.gates) if path]
    rows = Rows(results, make_header("compare", sys.argv[1:], settings, [*documents, *files], about), restart)

    def open_llm(contender: Contender, n_ctx: int) -> Llama:
        made_with, name = contender.context
        cache_type = options.CACHE_TYPES[name].ggml
        own = None if contender.policy is None else replace(kv, policy=made_with)
        return load(
            model_path, verbose, kv=own, flash_attn=True, n_ctx=n_ctx, n_batch=batch_size, n_threads=threads or None,
            n_threads_batch=threads or None, n_gpu_layers=gpu_layers, type_k=cache_type, type_v=cache_type,
        )  # fmt: skip

    def detokenize(tokens: Sequence[int]) -> str:
        return vocabulary.detokenize(list(tokens)).decode(errors="replace")

    stop = Conversation(vocabulary, "").stop
    examiners = [Examiner(material, detokenize, stop, n_predict, regime) for material in materials]
    try:
        with _progress() as advance:
            Comparison(rows, contenders, wanted, bytes_per_token, refused, open_llm).run(examiners, advance)
    except KeyboardInterrupt:
        again = " without --restart" if restart else ""
        notes.print(f"Stopped. What is finished is in {results}; the same command{again} goes on with it.", markup=False)
        raise typer.Exit(130) from None

    table = entries(rows, contenders, [b.text for b in wanted], len(materials))
    sentence = verdict(table, [b.text for b in wanted])
    show(table, sentence)

    from laprox.viz import comparison  # matplotlib takes its time

    comparison.page(rows, table, sentence, materials).save(output)
    notes.print(f"{output} has the report, {results} every number.", markup=False)


# --- before ----------------------------------------------------------------------------------------------------------


def check_model(
    model: Path, weights: LlamaModel, contenders: Sequence[Contender], base: KVConfig
) -> tuple[dict[str, float], dict[str, str]]:
    """Ask small contexts.

    Returns:
        The bytes of a token's K and V in the layers that can be compressed, by cache type; and why some of the default
        contenders can't run.

    Raises:
        ValueError: The model can't be compressed at all, or not by one of the contenders that were asked for.
    """
    f16 = options.CACHE_TYPES["f16"]
    try:
        per_element = measure(weights, f16, f16).bytes_per_token / f16.bytes_per_element
    except LaproxError as error:
        raise ValueError(f"{model} can't be compressed, so there is nothing to compare: {error}") from None
    refused: dict[str, str] = {}
    for contender in contenders:
        if contender.policy is None:
            continue
        cache_type = options.CACHE_TYPES[contender.cache_type]
        try:
            measure(weights, cache_type, cache_type, replace(base, policy=contender.policy))
        except LaproxError as error:
            if contender.name not in POLICIES:
                raise ValueError(f"--policies {contender.name}: {error}") from None
            refused[contender.name] = str(error)
    return {name: per_element * cache_type.bytes_per_element for name, cache_type in options.CACHE_TYPES.items()}, refused


def prepare(
    name: str, text: str, vocabulary: LlamaModel, n_questions: int, n_continue: int, n_tokens: int, seed: int
) -> Material:
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
    read = tokenize(body)
    start = end - len(read)
    if len(read) > 2 * len(tokens):
        raise ValueError(
            f"--questions {n_questions} puts {len(read) - len(tokens):,} tokens of facts into {name}, which is {len(tokens):,} "
            "tokens itself: take fewer questions or a longer document"
        )
    # Some tokenizers put a space before a text, which is not there within one.
    whole = tokenize(body + text[at:])
    continuation = whole[len(read) :] if whole[: len(read)] == read else tokenize(text[at:])
    return Material(name, prompts[0][:start], read, continuation[:n_continue], questions, [p[end:] for p in prompts])


def _split(text: str, option: str) -> list[str]:
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise ValueError(f"{option} is empty: name at least one")
    return found


def _warn_if_long(materials: Sequence[Material], trained: int) -> None:
    for material in materials:
        if trained and material.n_read > trained:
            notes.print(
                f"{material.name} is {material.n_read:,} tokens, but the model was trained for {trained:,}: expect bad answers "
                f"even from the full cache, or read less of it with --tokens.",
                style="yellow",
                markup=False,
            )


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
