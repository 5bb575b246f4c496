"""The sidecar as a command's output: checked early, written whole or not at all, tied to a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import llama_cpp

from laprox import _core, extras
from laprox._upstream import LlamaModel
from laprox.files import check_writable, replacing
from laprox.gates import sidecar
from laprox.gates.sidecar import TYPES, Gates


def check_output(output: Path, kind: str, inputs: Sequence[Path | None] = ()) -> None:
    """Raises ValueError, or MissingExtra, if it can't be written in the end: better now than after hours."""
    if kind not in TYPES:
        raise ValueError(f"--type is {kind!r}; accepted: {', '.join(TYPES)}")
    if output.suffix != ".gguf":
        raise ValueError(f"{output}: gates are a .gguf file, such as MODEL.kv-gates.gguf beside MODEL.gguf")
    extras.need("gates", "writing gates")
    check_writable(output, inputs)


def fitted(gates: Gates, path: Path, model: LlamaModel) -> Gates:
    """The gates with a model's name and fingerprint.

    Raises:
        ValueError: They are for a model of other sizes; names both.
    """
    for name, theirs, its in (
        ("layers", len(gates.layers), llama_cpp.llama_model_n_layer(model.model)),
        ("embedding length", gates.n_embd, llama_cpp.llama_model_n_embd(model.model)),
        ("KV heads", gates.n_head_kv, llama_cpp.llama_model_n_head_kv(model.model)),
    ):
        if theirs != its:
            raise ValueError(f"the gates are for a model of {name} {theirs}, and {path} has {its}")
    return replace(gates, model=path.name, fingerprint=_core.model_fingerprint(model.model))


def save(output: Path, gates: Gates, kind: str) -> None:
    """Write the file, whole or not at all."""
    with replacing(output) as unfinished:
        sidecar.write(unfinished, gates, kind)
