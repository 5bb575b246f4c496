"""`laprox profile`: where a model's heads need their entries, for the policy lukv."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import llama_cpp
import numpy as np
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from laprox import KVConfig, Llama, __version__, _core
from laprox.calibration import Context, read_contexts
from laprox.cli import log, options
from laprox.cli.conversation import Conversation
from laprox.cli.loading import load, load_vocabulary
from laprox.cli.options import DEFAULT
from laprox.cli.show import notes
from laprox.cli.source import takes_model
from laprox.partial import Partial, check_writable
from laprox.profiling import SEED, STEPS, TEMPERATURE, Profiler, Sample, min_keep, observing, scorers

PIECE = 8192  # tokens of a document's pieces, unless it is told otherwise


@takes_model()
def profile(
    model: options.Model,
    data: Annotated[
        list[Path],
        typer.Option(
            "--data", "-d", show_default=False,
            help='What to read and ask; repeatable. Lines of {"context": ..., "questions": [...]} in a .jsonl file, or a text, '
            "Markdown, HTML or PDF file, about which general questions are asked.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The table to write, a .npy file.", show_default=False)],
    scorer: Annotated[
        str,
        typer.Option(
            "--scorer",
            help="The scorer that ranks the entries of a head, here and when the table is used.",
        ),
    ] = "laprox",
    max_samples: Annotated[
        int,
        typer.Option(
            "--max-samples", min=1,
            help="Number of questions to ask, spread evenly over the contexts.",
        ),
    ] = 200,
    tokens: Annotated[
        int,
        typer.Option(
            "--tokens", min=1, max=1024,
            help="Length of the longest answer in tokens.",
        ),
    ] = STEPS,
    length: Annotated[
        int,
        typer.Option(
            "--length", "-c", min=0,
            help=f"Length of the longest context in tokens; documents are read in pieces of it. 0 = {PIECE} for documents.",
        ),
    ] = 0,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart",
            help="Start anew instead of going on with an interrupted run.",
        ),
    ] = False,
    kv_window: options.KVWindow = DEFAULT.window,
    kv_sink: options.KVSink = DEFAULT.sink,
    kv_recent: options.KVRecent = DEFAULT.recent,
    cache_type_k: options.CacheTypeK = "f16",
    cache_type_v: options.CacheTypeV = "f16",
    threads: options.Threads = 0,
    gpu_layers: options.GPULayers = 0,
    batch_size: options.BatchSize = 512,
    verbose: options.Verbose = False,
) -> None:
    """Measure how many entries each KV head of a model needs, for the policy lukv. Interrupted, it goes on where it was."""
    # Everything that can be wrong is found before the long work starts.
    if scorer not in (accepted := scorers()):
        raise ValueError(f"--scorer is {scorer!r}; accepted: {', '.join(accepted)}")
    config = KVConfig(policy=f"{scorer}:uniform", window=kv_window, sink=kv_sink, recent=kv_recent)
    type_k, type_v = options.cache_types(cache_type_k, cache_type_v)
    if output.suffix != ".npy":
        raise ValueError(f"{output}: the table is a .npy file")
    check_writable(output)

    model_path = model.get()
    log.record(verbose)
    vocabulary = load_vocabulary(model_path)
    trained = Conversation(vocabulary, "").trained_for
    contexts = read_contexts(
        data,
        lambda text: len(vocabulary.tokenize(text.encode(), add_bos=False, special=False)),
        longest=length,
        piece=length or min(PIECE, (trained or PIECE) * 3 // 4),
    )
    samples = choose([_tokenised(context, vocabulary) for context in contexts], max_samples)
    check_lengths(samples, config)
    longest = max(len(s.context) + max(map(len, s.questions)) for s in samples) + tokens
    if trained and longest > trained and not length:
        raise ValueError(
            f"a context with question and answer is {longest:,} tokens, but the model was trained for {trained:,}: "
            f"take shorter ones (or insist: -c {longest})"
        )

    llm = load(
        model_path,
        verbose,
        kv=observing(config, tokens),
        n_ctx=longest,
        n_batch=batch_size,
        n_threads=threads or None,
        n_gpu_layers=gpu_layers,
        type_k=type_k.ggml,
        type_v=type_v.ggml,
    )
    settings: dict[str, Any] = {
        "model": model_path.name,
        "fingerprint": _core.model_fingerprint(llm._model.model),
        "scorer": scorer,
        "window": kv_window,
        "sink": kv_sink,
        "recent": kv_recent,
        "tokens": tokens,
        "samples": sum(len(s.questions) for s in samples),
        "data": _digest(samples),
        "temperature": TEMPERATURE,
        "seed": SEED,
        "cache": f"{cache_type_k}, {cache_type_v}",
        "version": __version__,
    }
    partial = Partial(output, settings, restart)
    try:
        _run(Profiler(llm, scorer, config, tokens), samples, partial)
    except KeyboardInterrupt:
        notes.print(f"Stopped. What is finished is in {partial.folder}; the same command goes on with it.", markup=False)
        raise typer.Exit(130) from None
    table = spread(np.mean(partial.parts(settings["samples"]), axis=0), llm)
    partial.finish(npy(table, settings))
    _report(output, table, samples, config)


def choose(samples: Sequence[Sample], n: int) -> list[Sample]:
    """At most n questions: the first of each context, then the second of each ..."""
    turns = sorted((turn, i) for i, sample in enumerate(samples) for turn in range(len(sample.questions)))
    asked = [0] * len(samples)
    for _, i in turns[:n]:
        asked[i] += 1
    return [Sample(s.name, s.context, s.questions[:count]) for s, count in zip(samples, asked) if count]


def check_lengths(samples: Sequence[Sample], config: KVConfig) -> None:
    """Raises ValueError unless there is something to choose in every context."""
    if not samples:
        raise ValueError("--data holds no context")
    least = 2 * (config.sink + config.recent)
    for sample in samples:
        n = len(sample.context)
        if n < least:
            raise ValueError(
                f"{sample.name}: the context is {n} tokens, of which {config.sink} + {config.recent} are kept in any case; "
                f"accepted: at least {least}"
            )


def spread(shares: np.ndarray, llm: Llama) -> np.ndarray:
    """[99, heads of the compressed layers] as [99, layers, KV heads]; the uniform share where there is no such head."""
    metadata = llm.metadata
    counts = metadata.get(f"{metadata.get('general.architecture')}.attention.head_count_kv", "")  # one for all, or a list
    layers = llm.kv.layers
    n_head_kv = max(*layers.values(), *map(int, re.findall(r"\d+", counts)))
    table = np.tile(np.arange(1, 100)[:, None, None] / 100, (1, llama_cpp.llama_model_n_layer(llm._model.model), n_head_kv))
    start = 0
    for layer, n in layers.items():
        table[:, layer, :n] = shares[:, start : start + n]
        start += n
    return table


def npy(table: np.ndarray, settings: dict[str, Any]) -> bytes:
    """The table as a .npy file, and after it, where NumPy doesn't look, what it was made with and for."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(table, np.float64))
    names = ("model", "fingerprint", "scorer", "window", "sink", "recent", "samples", "tokens", "version")
    lines = "".join(f"{name} {settings[name]}\n" for name in names)
    return file.getvalue() + b"\nlaprox-profile\n" + lines.encode()


def _tokenised(context: Context, vocabulary: Any) -> Sample:
    conversation = Conversation(vocabulary, context.text)
    prompts = [conversation.prompt(question) for question in context.questions]
    n = shared(prompts + [conversation.opening()])
    return Sample(context.source, prompts[0][:n], [prompt[n:] for prompt in prompts])


def shared(prompts: Sequence[list[int]]) -> int:
    """Tokens that all of them begin with."""
    return next((i for i, column in enumerate(zip(*prompts)) if len(set(column)) > 1), min(map(len, prompts)))


def _digest(samples: Sequence[Sample]) -> str:
    data = json.dumps([[s.context, s.questions] for s in samples])
    return hashlib.sha256(data.encode()).hexdigest()[:16]


def _run(profiler: Profiler, samples: Sequence[Sample], partial: Partial) -> None:
    n = sum(len(s.questions) for s in samples)
    done = sum(part in partial for part in range(n))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("questions"), TimeRemainingColumn())
    with Progress(*columns, console=notes, disable=not notes.is_terminal, transient=True) as progress:
        bar = progress.add_task("", total=n, completed=done)
        part = 0
        for i, sample in enumerate(samples, 1):
            parts = range(part, part := part + len(sample.questions))
            if all(p in partial for p in parts):
                continue
            progress.update(bar, description=f"reading context {i} of {len(samples)}")
            profiler.read(sample.context)
            progress.update(bar, description=f"asking about context {i} of {len(samples)}")
            for p, question in zip(parts, sample.questions):
                if p not in partial:
                    partial.keep(p, profiler.ask(question, seed=p))
                    progress.advance(bar)


def _report(output: Path, table: np.ndarray, samples: Sequence[Sample], config: KVConfig) -> None:
    n = sum(len(s.questions) for s in samples)
    notes.print(f"{output}: {n} questions about {len(samples)} contexts, {table.shape[1]} layers of {table.shape[2]} KV heads.", markup=False)
    kept = 1 - table[94]
    notes.print("Kept at 5% overall, by layer: " + ", ".join(f"{share:.1%}" for share in kept.mean(1)), markup=False)
    reach = min(1 - min_keep(config, len(s.context)) / len(s.context) for s in samples)
    if reach < 0.95:
        notes.print(
            f"The shortest context can't go below {1 - reach:.0%}, since {config.sink} + {config.recent} tokens of each head are "
            "always kept; beyond that all heads count as equal. Longer contexts tell more.",
            markup=False,
        )
