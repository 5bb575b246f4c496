"""Made-up gates: files as torch.save writes them, and sidecars."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

import numpy as np

from laprox.gates.sidecar import Gates, Layer

STORAGES = {"bf16": "BFloat16Storage", "f16": "HalfStorage", "f32": "FloatStorage"}


def stored(x: np.ndarray, kind: str) -> bytes:
    x = np.ascontiguousarray(x, np.float32)
    if kind == "bf16":
        return (x.view(np.uint32) >> 16).astype("<u2").tobytes()
    return x.astype("<f2" if kind == "f16" else "<f4").tobytes()


def bfloat16(x: np.ndarray) -> np.ndarray:
    """What bfloat16 keeps of it."""
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


# The few opcodes of a pickle that torch.save needs.
def text(s: str) -> bytes:
    return b"X" + struct.pack("<I", len(s.encode())) + s.encode()


def number(n: int) -> bytes:
    return b"J" + struct.pack("<i", n)


def group(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


EMPTY = name("collections", "OrderedDict") + b")R"


def tensor(key: str, shape: tuple[int, ...], stride: tuple[int, ...], offset=0, n=None, storage="FloatStorage") -> bytes:
    """A call of _rebuild_tensor_v2."""
    n = int(np.prod(shape)) if n is None else n
    place = group(text("storage"), name("torch", storage), text(key), text("cpu"), number(n)) + b"Q"
    sizes = group(*map(number, shape)), group(*map(number, stride))
    return name("torch._utils", "_rebuild_tensor_v2") + group(place, number(offset), *sizes, b"\x89", EMPTY) + b"R"


def program(items: dict[str, bytes]) -> bytes:
    """A pickled OrderedDict of pickled values."""
    return b"\x80\x02" + EMPTY + b"(" + b"".join(text(key) + value for key, value in items.items()) + b"u."


def archive(path: Path, pickled: bytes, storages: dict[str, bytes], compression=zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as z:
        z.writestr("archive/data.pkl", pickled)
        z.writestr("archive/byteorder", "little")
        for key, data in storages.items():
            z.writestr(f"archive/data/{key}", data)
        z.writestr("archive/version", "3\n")
    return path


def save(path: Path, tensors: dict[str, np.ndarray], kind: str = "bf16") -> Path:
    """What torch.save(OrderedDict of tensors) writes."""
    items, storages = {}, {}
    for i, (key, x) in enumerate(tensors.items()):
        strides = tuple(s // x.itemsize for s in np.ascontiguousarray(x).strides)
        items[key], storages[str(i)] = tensor(str(i), x.shape, strides, storage=STORAGES[kind]), stored(x, kind)
    return archive(path, program(items), storages)


def published(kind="rg10", layers=3, n_embd=64, hidden=32, heads=2, tied=True, seed=0, prefix="model.") -> dict[str, np.ndarray]:
    """Tensors with the names and shapes of the authors' files."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return bfloat16(rng.standard_normal(shape, dtype=np.float32) * 0.1)

    out: dict[str, np.ndarray] = {}
    last = "linear3" if kind == "rg10" else "linear2"
    shared = draw(heads, hidden), bfloat16(np.full(heads, 18.0) + rng.standard_normal(heads))
    for i in range(layers):
        p = f"{prefix}layers.{i}.self_attn.retention_gate."
        out[p + "linear1.weight"], out[p + "linear1.bias"] = draw(hidden, n_embd), draw(hidden)
        if kind == "rg10":
            out[p + "linear2.weight"], out[p + "linear2.bias"] = draw(hidden, hidden), draw(hidden)
        weight, bias = shared if tied else (draw(heads, hidden), 18 + draw(heads))
        out[p + last + ".weight"], out[p + "bias"] = weight, bfloat16(bias)
    return out


def config(kind="rg10", layers=3, n_embd=64, hidden=32, heads=2, **changes) -> dict:
    settings = {
        "retention_gate": kind, "retention_gate_intermediate_size": hidden, "memory_size": 128, "hidden_act": "silu",
        "num_hidden_layers": layers, "hidden_size": n_embd, "num_key_value_heads": heads, "base_model": "somebody/model",
    }  # fmt: skip
    return {k: v for k, v in (settings | changes).items() if v is not None}


def write_config(path: Path, **options) -> Path:
    path.write_text(json.dumps(config(**options)))
    return path


def random_gates(layers, n_embd, heads, hidden=32, kind="rg10", tied=True, seed=0, bias=3.0, activation="silu", **about) -> Gates:
    """Gates whose z spreads over several units, so that entries are told apart."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(2 * shape[-1] ** -0.5)

    shared = draw(heads, hidden), (bias + draw(heads)).astype(np.float32)
    made = []
    for _ in range(layers):
        mid = (draw(hidden, hidden), draw(hidden) * 0.1) if kind == "rg10" else (None, None)
        out = shared if tied else (draw(heads, hidden), (bias + draw(heads)).astype(np.float32))
        made.append(Layer(draw(hidden, n_embd), draw(hidden) * 0.1, *mid, *out))
    return Gates(kind=kind, activation=activation, layers=made, **about)
