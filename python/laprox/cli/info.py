"""`laprox info`: what a model's KV cache costs, and whether it can be compressed."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from laprox import KVConfig, LaproxError
from laprox._upstream import MOST_TOKENS
from laprox.chat import log
from laprox.chat.cost import measure
from laprox.chat.loading import load_weights
from laprox.cli import options
from laprox.cli.show import size
from laprox.cli.source import takes_model
from laprox.cli.streams import print_json

CONTEXTS = (4096, 8192, 16384, 32768, 65536, 131072)


@takes_model()
@options.takes_kv(only=("budget",), policy="full")  # what a budget comes to, whatever else is set
def info(
    model: options.Model,
    ctx_size: Annotated[
        list[int] | None,
        typer.Option(
            "--ctx-size", "-c", min=1, max=MOST_TOKENS, help="A context size, in tokens, to show the cost of; repeatable.", show_default=False
        ),
    ] = None,
    kv: KVConfig = KVConfig(),
    cache_type_k: options.CacheTypeK = "f16",
    cache_type_v: options.CacheTypeV = "f16",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verbose: options.Verbose = False,
) -> None:
    """Say whether a GGUF can be compressed, and what a context of N tokens costs, full and at a budget."""
    budget = str(kv.budget)
    type_k, type_v = options.cache_types(cache_type_k, cache_type_v)
    model_path = model.get()
    log.record(verbose)
    weights = load_weights(model_path, use_extra_bufts=False)  # mapped, but neither read nor repacked
    metadata = weights.metadata()
    arch = metadata.get("general.architecture", "")
    trained = weights.n_ctx_train()
    facts: dict[str, Any] = {
        "file": str(model_path),
        "name": metadata.get("general.name", ""),
        "architecture": arch,
        "parameters": weights.n_params(),
        "bytes": weights.size(),
        "trained_for": trained,
        "layers": int(metadata.get(f"{arch}.block_count", 0)),
    }
    try:
        cache = measure(weights, type_k, type_v)
    except LaproxError as error:
        facts |= {"compressible": False, "reason": str(error)}
    else:
        sizes = ctx_size or [n for n in CONTEXTS if n <= trained] or [trained]
        facts |= {
            "compressible": True,
            "layers_compressed": cache.layers,
            "kv_bytes_per_token": cache.bytes_per_token,
            "budget": budget,
            "contexts": [{"tokens": n, "full": cache.full(n), "at_budget": cache.at(budget, n)} for n in sizes],
        }
    if as_json:
        print_json(facts)
    else:
        _show(facts)


def _show(facts: dict[str, Any]) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"{facts['file']}: {facts['name'] or facts['architecture']}")
    console.print(
        f"{facts['architecture']}, {facts['parameters']:,} parameters, {size(facts['bytes'])}, "
        f"trained for {facts['trained_for']:,} tokens"
    )
    if not facts["compressible"]:
        console.print(f"Can't be compressed: {facts['reason']}. --kv-policy off runs it as llama.cpp does.")
        return
    compressed, layers = facts["layers_compressed"], facts["layers"]
    rest = "" if compressed == layers else "; the others have no full attention cache and stay as they are"
    console.print(f"Can be compressed: {compressed} of {layers} layers{rest}.")
    console.print(f"KV cache of these layers: {size(facts['kv_bytes_per_token'])} per token.")
    table = Table("context", "full", f"at {facts['budget']}", box=None, pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    for row in facts["contexts"]:
        table.add_row(f"{row['tokens']:,}", size(row["full"]), size(row["at_budget"]))
    console.print(table)
    console.print("At a budget, a tail of recent tokens and padding come on top.")
