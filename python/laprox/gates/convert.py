"""The authors' files, `trimkv_weights.pth` and `config.json`, as Gates."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from laprox.chat.reading import read_json
from laprox.gates.pickles import load_tensors
from laprox.gates.sidecar import KINDS, Gates, Layer

# <anything>.layers.N.self_attn.retention_gate.linear1.weight, and so on; a wrapper may have put more in front
_NAME = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:[\w.]*\.)?retention_gate\.(.+)$")

# The authors' names of what we call gate_in, gate_mid and gate_out. `bias` is of the last projection.
_PARTS = {
    "rg": ("linear1.weight", "linear1.bias", None, None, "linear2.weight", "bias"),
    "rg10": ("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias", "linear3.weight", "bias"),
}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu"}


def read_checkpoint(weights: Path, config: Path, model: str = "", fingerprint: str | None = None) -> Gates:
    """Read published gates.

    Args:
        weights: trimkv_weights.pth.
        config: The config.json beside it.
        model: Name of the model they are for; by default what the configuration says.
        fingerprint: Of the model's GGUF, if it is at hand.

    Raises:
        ValueError: A file can't be read, a tensor is missing, unknown, of another shape or not finite; names it.
    """
    settings = _read_config(config)
    kind = settings.get("retention_gate")
    if kind not in KINDS:
        raise ValueError(f"{config}: retention_gate is {kind!r}; accepted: {', '.join(KINDS)}")
    activation = _ACTIVATIONS.get(settings.get("hidden_act", ""))
    if activation is None:
        raise ValueError(f"{config}: hidden_act is {settings.get('hidden_act')!r}; accepted: {', '.join(_ACTIVATIONS)}")
    n_layer, n_embd = _size(config, settings, "num_hidden_layers"), _size(config, settings, "hidden_size")
    hidden = _size(config, settings, "retention_gate_intermediate_size", 512)
    n_head_kv = _size(config, settings, "num_key_value_heads", settings.get("num_attention_heads"))

    found, unknown = _by_layer(load_tensors(weights))
    if unknown:
        raise ValueError(f"{weights}: not understood: {_listed(unknown)}")
    d, h, n = (n_embd, "hidden_size"), (hidden, "retention_gate_intermediate_size"), (n_head_kv, "num_key_value_heads")
    shapes = dict(zip(_PARTS[kind], ([h, d], [h], [h, h], [h], [n, h], [n])))
    shapes.pop(None, None)
    layers = []
    for i in range(n_layer):
        layer = found.pop(i, {})
        for part, shape in shapes.items():
            if part not in layer:
                raise ValueError(f"{weights}: layers.{i}.retention_gate.{part} is missing ({config.name}: {kind}, {n_layer} layers)")
            _check(weights, config, *layer[part], shape)
        if extra := [name for part, (name, _) in layer.items() if part not in shapes]:
            raise ValueError(f"{weights}: gates of type {kind} don't have {_listed(extra)}")
        layers.append(Layer(*(layer[part][1] if part else None for part in _PARTS[kind])))  # type: ignore[arg-type]
    if found:
        raise ValueError(f"{weights} has gates of layer {max(found)}, and {config} says {n_layer} layers")

    budget = settings.get("memory_size", 0)  # below 1: a share of the sequence
    return Gates(
        kind=kind,
        activation=activation,
        layers=layers,
        training_budget=int(budget) if isinstance(budget, (int, float)) and budget >= 1 else 0,
        source=f"{weights.name} ({'DBTrimKV' if kind == 'rg10' else 'TRIM-KV'})",
        model=model or str(settings.get("base_model") or settings.get("_name_or_path") or ""),
        fingerprint=fingerprint,
    )


def _read_config(path: Path) -> dict[str, Any]:
    data = read_json(path)
    inner = data.get("text_config")  # of a model that also sees
    return {**data, **inner} if isinstance(inner, dict) else data


def _size(path: Path, settings: dict[str, Any], name: str, default: Any = None) -> int:
    value = settings.get(name, default)
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"{path}: {name} is {value!r}, not a size")
    return value


def _by_layer(tensors: dict[str, npt.NDArray[Any]]) -> tuple[dict[int, dict[str, tuple[str, npt.NDArray[Any]]]], list[str]]:
    """{layer: {"linear1.weight": (full name, tensor)}}, and the names that don't fit."""
    found: dict[int, dict[str, tuple[str, npt.NDArray[Any]]]] = {}
    unknown = []
    for name, tensor in tensors.items():
        match = _NAME.search(name)
        if not match or match[2] not in {part for parts in _PARTS.values() for part in parts}:
            unknown.append(name)
            continue
        layer = found.setdefault(int(match[1]), {})
        if match[2] in layer:
            unknown.append(name)  # twice, under two names
        layer[match[2]] = (name, tensor)
    return found, unknown


def _check(weights: Path, config: Path, name: str, tensor: npt.NDArray[Any], shape: list[tuple[int, str]]) -> None:
    wanted = tuple(n for n, _ in shape)
    if tensor.shape != wanted:
        meaning = " x ".join(f"{n} ({what})" for n, what in shape)
        raise ValueError(f"{weights}: {name} is {' x '.join(map(str, tensor.shape))}, and {config} says {meaning}")
    if tensor.dtype != np.float32:
        raise ValueError(f"{weights}: {name} holds {tensor.dtype} values, not floating-point ones")
    if not np.isfinite(tensor).all():
        raise ValueError(f"{weights}: {name} has {int((~np.isfinite(tensor)).sum())} values that are not finite (NaN or infinite)")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
