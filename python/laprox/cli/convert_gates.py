"""`laprox convert-gates`: published retention gates as a GGUF beside a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from laprox.chat import log
from laprox.chat.loading import load_weights
from laprox.cli.show import notes, size
from laprox.gates import files
from laprox.gates.convert import read_checkpoint
from laprox.gates.sidecar import TYPES, Gates


def convert_gates(
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS", help="The authors' trimkv_weights.pth.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .gguf file to write.", show_default=False)],
    config: Annotated[Path | None, typer.Option("--config", help="Their config.json; by default the one beside WEIGHTS.", show_default=False)] = None,
    model: Annotated[Path | None, typer.Option("--model", "-m", help="The GGUF of the model they are for: checked, and written down.", show_default=False)] = None,
    kind: Annotated[str, typer.Option("--type", help=f"Type of the matrices: {', '.join(TYPES)}.")] = "f16",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show llama.cpp's log.")] = False,
) -> None:
    """Write published retention gates (DBTrimKV, TRIM-KV) as a GGUF for the policy retention. Needs no PyTorch."""
    config = config or weights.with_name("config.json")
    files.check_output(output, kind, [weights, config, model])
    log.record(verbose)
    gates = read_checkpoint(weights, config)
    if model:
        gates = files.fitted(gates, model, load_weights(model))
    files.save(output, gates, kind)
    report(output, gates, kind)


def report(output: Path, gates: Gates, kind: str) -> None:
    """What was written, in a line or two."""
    tied = "shared by all layers" if gates.shared("gate_out.weight") else "one per layer"
    notes.print(
        f"{output}: {gates.kind} gates of {len(gates.layers)} layers, {gates.n_embd} -> {gates.hidden} -> {gates.n_head_kv} KV heads, "
        f"last projection {tied}; {kind}, {size(output.stat().st_size)}.",
        markup=False,
    )
    if not gates.fingerprint:
        notes.print("They don't say which GGUF they are for, so only sizes can be checked: --model MODEL.gguf writes it down.", markup=False)
