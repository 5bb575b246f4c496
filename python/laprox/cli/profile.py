"""`laprox profile`: where a model's heads need their entries, for the policy lukv; or what types of its cache lose, for `-ctk auto`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from laprox import KVConfig, Llama
from laprox.cache_types import AUTO, FILE, Types
from laprox.chat.loading import Loader
from laprox.chat.tokens import check_context, tokens_of, trained_for
from laprox.cli import options
from laprox.cli.measuring import measure
from laprox.cli.progress import progress
from laprox.cli.running import Restart, Running
from laprox.cli.show import notes
from laprox.cli.source import takes_model
from laprox.eval.bench import runnable
from laprox.eval.jobs import context_size
from laprox.eval.rows import Rows, make_header, make_model
from laprox.eval.summary import Summary
from laprox.files import check_writable, replacing
from laprox.profile.contexts import read_contexts
from laprox.profile.measure import STEPS, check_scorer, min_keep
from laprox.profile.table import Run, check_lengths, check_output, choose, converted, sample
from laprox.profile.types import BUDGETS, SEEN, UNSEEN, plan
from laprox.profile.types import jobs as type_jobs
from laprox.profile.types import table as table_of_types
from laprox.read.probe import WINDOW

PIECE = 8192  # tokens of a document's pieces, unless it is told otherwise


@takes_model()
@options.takes_kv(only=("window", "sink", "recent"), archive="off")
def profile(
    model: options.Model,
    data: Annotated[
        list[Path],
        typer.Option(
            "--data",
            "-d",
            show_default=False,
            help='What to read and ask; repeatable. Lines of {"context": ..., "questions": [...]} in a .jsonl file, or a text, '
            "Markdown, HTML or PDF file, about which general questions are asked.",
        ),
    ] = [],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help=f"The table to write, a .gguf file; with --types MODEL{FILE}.", show_default=False)],
    types: Annotated[
        bool,
        typer.Option(
            "--types",
            help=f"Measure what f16, q8_0 and q4_0 caches lose at {', '.join(BUDGETS)} of the entries, for -ctk {AUTO} -ctv {AUTO}: about 20 times "
            f"the time of reading. --max-samples is then of each context. What was measured lies beside the table, in a .jsonl file.",
        ),
    ] = False,
    convert: Annotated[
        Path | None,
        typer.Option("--convert", metavar="CURVES", show_default=False, help="Measure nothing: write the authors' table, a .npy file, for this model."),
    ] = None,
    scorer: Annotated[str, typer.Option("--scorer", help="The scorer that ranks the entries of a head, here and when the table is used.")] = "laprox",
    max_samples: Annotated[int, typer.Option("--max-samples", min=1, help="Number of questions to ask, spread evenly over the contexts.")] = 200,
    n_predict: Annotated[int, typer.Option("--predict", "-n", min=1, max=1024, help="Length of the longest answer in tokens.")] = STEPS,
    length: Annotated[
        int,
        typer.Option(
            "--length", min=0, help=f"Length of the longest context in tokens; documents are read in pieces of it. 0 = {PIECE} for documents."
        ),
    ] = 0,
    restart: Restart = False,
    kv: KVConfig = KVConfig(),
    cache_type_k: options.CacheTypeK = "f16",
    cache_type_v: options.CacheTypeV = "f16",
    running: Running = Running(),
) -> None:
    """Measure how many entries each KV head of a model needs, for the policy lukv. Interrupted, it goes on where it was."""
    # Everything that can be wrong is found before the long work starts.
    if bool(data) == bool(convert) or types and convert:
        raise typer.BadParameter("name what to read, --data, or what others have measured, --convert: one of both, and --types with --data only")
    if types:
        if not output.name.endswith(FILE):
            raise ValueError(f"{output}: the table is a {FILE} file")
        if (cache_type_k, cache_type_v) != ("f16", "f16"):
            raise ValueError("--types measures every type; accepted with it: no -ctk, no -ctv")
        for path in (output, output.with_suffix(".jsonl")):
            check_writable(path, [*data, model.here])
        _measure_types(running.loader(model.get()), data, output, max_samples, length, restart, kv)
        return
    check_scorer(scorer)
    config = replace(kv, policy=f"{scorer}:uniform")
    type_k, type_v = options.cache_types(cache_type_k, cache_type_v)
    check_output(output, [*(data or []), convert, model.here])

    loader = running.loader(model.get(), type_k.ggml, type_v.ggml)
    if convert:
        table = converted(convert, output, loader.path, scorer)
        notes.print(f"{output}: {table.shape[1]} layers of {table.shape[2]} KV heads, for the scorer {scorer}.", markup=False)
        return
    vocabulary = loader.vocabulary
    trained = trained_for(vocabulary)
    piece = length or min(PIECE, (trained or PIECE) * 3 // 4)
    contexts = read_contexts(data, lambda text: len(tokens_of(vocabulary, text)), longest=length, piece=piece)
    samples = choose([sample(context, vocabulary) for context in contexts], max_samples)
    check_lengths(samples, config)
    run = Run(output, loader, samples, scorer, config, n_predict)
    if not length:
        check_context("a context with question and answer", run.n_ctx, 0, trained, "take shorter ones", "--length")
    try:
        with progress("", run.n_questions, "questions") as update:
            table = run.make(restart, lambda what, done: update(description=what, completed=done))
    except KeyboardInterrupt:
        notes.print(f"Stopped. What is finished is in {output}.partial; the same command goes on with it.", markup=False)
        raise typer.Exit(130) from None
    _report(run, table)


def _measure_types(loader: Loader, data: list[Path], output: Path, questions: int, length: int, restart: bool, kv: KVConfig) -> None:
    """--types, up to the table."""
    vocabulary = loader.vocabulary
    piece = length or min(PIECE, (trained_for(vocabulary) or PIECE) // 3)  # twice in a context: the probe repeats it
    contexts = read_contexts(data, lambda text: len(tokens_of(vocabulary, text)), longest=length, piece=piece)
    jobs = list(type_jobs(vocabulary, contexts, questions))
    if not jobs:
        raise ValueError("--data holds no context")
    n_ctx = context_size(vocabulary, jobs, 0)
    kv = replace(kv, min_tokens=0)
    able = runnable([SEEN, UNSEEN], lambda policy: loader.open(256, replace(kv, policy=policy)), insist=True)
    settings = {"questions": questions, "length": piece, "window": kv.window, "sink": kv.sink, "recent": kv.recent, "threads": able.n_threads}
    header = make_header("types", sys.argv, settings, data, make_model(loader.path, able.fingerprint))
    rows = Rows(output.with_suffix(".jsonl"), header, restart)

    def open_llm(policy: str, types: Types | None) -> Llama:
        return loader.of(types).open(n_ctx, replace(kv, policy=policy, window=max(kv.window, WINDOW)))

    measure(plan(rows, jobs, open_llm), rows, vocabulary, window=kv.window, restart=restart)
    made = table_of_types(Summary(rows), loader.path.name, able.fingerprint)
    with replacing(output) as file:
        file.write_text(made.text(), "utf-8")
    notes.print(f"{output}: {sum(len(job.prompts) for job in jobs)} questions about {len(jobs)} contexts.", markup=False)
    for name, losses in (("with the question in view", made.seen), ("before any question", made.unseen)):
        for types, of in losses.items():
            notes.print(f"KL {name}, {types}: " + ", ".join(f"{loss:.2f} at {share:.0%}" for share, loss in of.items()), markup=False)


def _report(run: Run, table: np.ndarray) -> None:
    samples, config = run.samples, run.config
    notes.print(
        f"{run.output}: {run.n_questions} questions about {len(samples)} contexts, {table.shape[1]} layers of {table.shape[2]} KV heads.",
        markup=False,
    )
    kept = 1 - table[94]
    notes.print("Kept at 5% overall, by layer: " + ", ".join(f"{share:.1%}" for share in kept.mean(1)), markup=False)
    reach = min(1 - min_keep(config, len(s.context)) / len(s.context) for s in samples)
    if reach < 0.95:
        notes.print(
            f"The shortest context can't go below {1 - reach:.0%}, since {config.sink} + {config.recent} tokens of each head are "
            "always kept; beyond that all heads count as equal. Longer contexts tell more.",
            markup=False,
        )
