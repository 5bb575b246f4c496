"""Gates as arrays, and their file: a GGUF beside the model. docs/retention-gates.md has the format as a table."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from gguf import GGUFReader

ARCHITECTURE = "laprox-gates"
VERSION = 1
KINDS = ("rg", "rg10")
ACTIVATIONS = ("silu", "gelu")
TYPES = ("f16", "q8_0", "q4_0", "f32")
QUANTISED = ("q8_0", "q4_0")
BLOCK = 32  # of both quantised types: rows must be a multiple

NAMES = ("gate_in.weight", "gate_in.bias", "gate_mid.weight", "gate_mid.bias", "gate_out.weight", "gate_out.bias")  # of a Layer's fields

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Layer:
    """The gate of one layer. A matrix [out, in] maps in -> out."""

    gate_in: Array  # [hidden, n_embd]
    gate_in_bias: Array  # [hidden]
    gate_mid: Array | None  # [hidden, hidden], rg10 only
    gate_mid_bias: Array | None
    gate_out: Array  # [n_head_kv, hidden]
    gate_out_bias: Array  # [n_head_kv]

    def tensors(self) -> dict[str, Array]:
        """By their names in the file."""
        return {name: tensor for name, tensor in zip(NAMES, vars(self).values()) if tensor is not None}


@dataclass(frozen=True)
class Gates:
    """The gates of a model.

    Attributes:
        kind: "rg" (TRIM-KV, one hidden layer) or "rg10" (DBTrimKV, two).
        activation: "silu" or "gelu", the model's own.
        layers: One gate per layer of the model.
        training_budget: M, the tokens per KV head that training pressed for; 0 = unknown.
        source: Where they come from, for people.
        model: The model they were trained for, for people.
        fingerprint: The same for laprox: `_core.model_fingerprint`; None if no GGUF of it was at hand.
    """

    kind: str
    activation: str
    layers: list[Layer] = field(repr=False)
    training_budget: int = 0
    source: str = ""
    model: str = ""
    fingerprint: str | None = None

    @property
    def n_embd(self) -> int:
        return self.layers[0].gate_in.shape[1]

    @property
    def hidden(self) -> int:
        return self.layers[0].gate_in.shape[0]

    @property
    def n_head_kv(self) -> int:
        return self.layers[0].gate_out.shape[0]

    def shared(self, name: str) -> bool:
        """Whether all layers have the same tensor, bit for bit."""
        first, *others = (layer.tensors()[name] for layer in self.layers)
        return all(first.shape == t.shape and first.tobytes() == t.tobytes() for t in others)

    def check(self) -> None:
        """Raises ValueError, with the tensor's name, if one has another shape than the first layer's, or isn't finite."""
        d, h, n = self.n_embd, self.hidden, self.n_head_kv
        shapes = {"gate_in.weight": (h, d), "gate_in.bias": (h,), "gate_out.weight": (n, h), "gate_out.bias": (n,)}
        if self.kind == "rg10":
            shapes |= {"gate_mid.weight": (h, h), "gate_mid.bias": (h,)}
        for i, layer in enumerate(self.layers):
            tensors = layer.tensors()
            if tensors.keys() != shapes.keys():
                raise ValueError(f"layer {i} of the gates has {', '.join(tensors)}; type {self.kind} has {', '.join(shapes)}")
            for name, tensor in tensors.items():
                if tensor.shape != shapes[name]:
                    raise ValueError(f"blk.{i}.{name} is {_sizes(tensor.shape)}, not {_sizes(shapes[name])}")
                if not np.isfinite(tensor).all():
                    raise ValueError(f"blk.{i}.{name} has {int((~np.isfinite(tensor)).sum())} values that are not finite")


def write(path: Path, gates: Gates, kind: str = "f16") -> None:
    """Write the file.

    Args:
        path: A .gguf file.
        gates: What to write. A last projection that all layers share is stored once.
        kind: Type of the matrices: f16, q8_0, q4_0 or f32. Biases stay float32.

    Raises:
        ValueError: Something can't be stored; names it.
    """
    from gguf import GGMLQuantizationType as QType
    from gguf import GGUFWriter, quants

    if kind not in TYPES:
        raise ValueError(f"type {kind!r}; accepted: {', '.join(TYPES)}")
    gates.check()
    qtype = QType[kind.upper()]
    w = GGUFWriter(path, ARCHITECTURE)
    w.add_name(gates.model or gates.source or path.stem)
    w.add_uint32("laprox.gates.version", VERSION)
    for name, text in (("type", gates.kind), ("activation", gates.activation), ("source", gates.source), ("model", gates.model)):
        w.add_string(f"laprox.gates.{name}", text)
    sizes = {"block_count": len(gates.layers), "embedding_length": gates.n_embd, "head_count_kv": gates.n_head_kv}
    for name, n in (sizes | {"hidden_length": gates.hidden, "training_budget": gates.training_budget}).items():
        w.add_uint32(f"laprox.gates.{name}", n)
    if gates.fingerprint:
        w.add_string("laprox.gates.model_fingerprint", gates.fingerprint)

    stored: list[tuple[str, npt.NDArray[Any], QType]] = []

    def add(name: str, tensor: Array) -> None:
        tensor = np.ascontiguousarray(tensor, np.float32)
        if name.endswith(".bias") or kind == "f32":
            stored.append((name, tensor, QType.F32))
            return
        if kind in QUANTISED and tensor.shape[1] % BLOCK:
            raise ValueError(f"{name} has rows of {tensor.shape[1]}, and {kind} needs a multiple of {BLOCK}: use f16")
        if kind == "f16" and not np.isfinite(tensor.astype(np.float16)).all():
            raise ValueError(f"{name} has values beyond float16: use q8_0 or f32")
        stored.append((name, quants.quantize(tensor, qtype), qtype))

    shared = [name for name in ("gate_out.weight", "gate_out.bias") if gates.shared(name)]
    for i, layer in enumerate(gates.layers):
        for name, tensor in layer.tensors().items():
            if name not in shared:
                add(f"blk.{i}.{name}", tensor)
    for name in shared:
        add(name, gates.layers[0].tensors()[name])
    w.add_uint32("laprox.gates.crc32", _crc32(data for _, data, _ in stored))
    for name, data, stored_type in stored:
        w.add_tensor(name, data, raw_dtype=stored_type)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def read(path: Path) -> Gates:
    """Read a file back, dequantised.

    Raises:
        ValueError: It is no such file, or damaged; the message starts with the path.
    """
    from gguf import GGUFReader, quants

    try:
        reader = GGUFReader(path)
        tensors = {t.name: quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in reader.tensors}
        return _gates(reader, tensors)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from None


def _gates(reader: GGUFReader, tensors: dict[str, Array]) -> Gates:
    def value(key: str, default: Any = None) -> Any:
        found = reader.get_field(key)
        if found is None:
            if default is None:
                raise ValueError(f"no {key} in it")
            return default
        return found.contents()

    if value("general.architecture") != ARCHITECTURE:
        raise ValueError(f"its architecture is {value('general.architecture')!r}, not {ARCHITECTURE!r}")
    if value("laprox.gates.version") != VERSION:
        raise ValueError(f"gates of version {value('laprox.gates.version')}; this laprox reads {VERSION}")

    def tensor(i: int, name: str) -> Array:
        for key in (f"blk.{i}.{name}", name):
            if key in tensors:
                return tensors[key]
        raise ValueError(f"no tensor blk.{i}.{name} in it")

    if value("laprox.gates.crc32") != _crc32(t.data for t in reader.tensors):
        raise ValueError("damaged: the checksum of its tensors is another")
    kind = value("laprox.gates.type")
    layers = [
        Layer(*(tensor(i, name) if kind == "rg10" or "mid" not in name else None for name in NAMES))  # type: ignore[arg-type]
        for i in range(value("laprox.gates.block_count"))
    ]
    gates = Gates(
        kind=kind,
        activation=value("laprox.gates.activation"),
        layers=layers,
        training_budget=value("laprox.gates.training_budget", 0),
        source=value("laprox.gates.source", ""),
        model=value("laprox.gates.model", ""),
        fingerprint=value("laprox.gates.model_fingerprint", "") or None,
    )
    gates.check()
    return gates


def _crc32(parts: Iterable[npt.NDArray[Any]]) -> int:
    """Of the tensors' data in the file's order."""
    crc = 0
    for data in parts:
        crc = zlib.crc32(np.ascontiguousarray(data).tobytes(), crc)
    return crc


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
