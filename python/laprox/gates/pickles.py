"""Tensors out of a file of `torch.save`, without PyTorch and without running what the file may contain.

A pickle is a program: it can call any function by name. This one may name tensors, their storages and OrderedDict, and
nothing else; everything it builds is checked against what is in the file. `torch.load(weights_only=True)` is for the same, but
ran code of hostile files before PyTorch 2.6 (CVE-2025-32434) and 2.10 (CVE-2026-24747), knows many more names than are needed here,
and comes with twenty packages that who only converts gates has no use for. The gates aren't published in a safer format.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

# Storage class -> how its bytes are read. bfloat16 is the upper half of a float32.
_STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": "<u2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
}


def load_tensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a state dict, by name. Floating-point ones become float32, exactly (float64 is rounded).

    Raises:
        ValueError: The file is damaged, or holds anything but tensors; says what. Nothing in it was executed.
    """
    try:
        with open(path, "rb") as file:
            return _load(file)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except (pickle.UnpicklingError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path}: {error or 'it ends early'}") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError, MemoryError, NotImplementedError) as error:
        # what a damaged or hostile pickle makes the unpickler stumble over
        raise ValueError(f"{path}: {error if isinstance(error, _Refused) else f'the pickle in it is damaged ({error!r})'}") from None


class _Refused(ValueError):
    """What the file holds is not wanted; the message says what."""


def _load(file: IO[bytes]) -> dict[str, npt.NDArray[Any]]:
    if not zipfile.is_zipfile(file):
        raise _Refused("not a file of torch.save in its zip format (PyTorch 1.6 and later), or cut off")
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise _Refused("not a file of torch.save: there is no data.pkl in it")
        folder = names[0].removesuffix("data.pkl")
        if folder + "byteorder" in archive.namelist() and _member(archive, folder + "byteorder") != b"little":
            raise _Refused("it was written on a big-endian machine")
        with archive.open(_stored(archive, names[0])) as program:
            state = _Unpickler(program, archive, folder).load()
    if not isinstance(state, dict):
        raise _Refused(f"it holds a {type(state).__name__}, not a dict of tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise _Refused(f"it holds {name!r} = {type(value).__name__}, and only tensors with names are accepted")
    return dict(state)


def _stored(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """torch.save compresses nothing, so nothing can turn out larger than the file."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise _Refused(f"{name} in it is compressed or encrypted, which torch.save does not do")
    return info


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    return archive.read(_stored(archive, name))


class _Storage(NamedTuple):
    """The bytes of one or more tensors."""

    data: npt.NDArray[Any]
    bfloat16: bool


class _Function:
    """Stands for one of PyTorch's functions. Without attributes, so that a pickle can't set any."""

    __slots__ = ()


class _RebuildTensor(_Function):
    __slots__ = ()

    def __call__(self, storage: _Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> npt.NDArray[Any]:
        if not isinstance(storage, _Storage) or len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
            raise _Refused("a tensor in it is not described as torch.save does")
        data, n = storage
        last = offset + sum((length - 1) * step for length, step in zip(size, stride))
        count = int(np.prod(size, dtype=object)) if size else 1
        if count and (last >= data.size or count > data.size):
            raise _Refused(f"a tensor of {' x '.join(map(str, size)) or 'one value'} in it reaches beyond its {data.size} stored values")
        steps = [step * data.itemsize for step in stride]
        tensor = np.lib.stride_tricks.as_strided(data[offset:], size, steps, writeable=False)
        if storage.bfloat16:
            return (np.ascontiguousarray(tensor).astype("<u4") << 16).view("<f4").reshape(size)
        return tensor.astype(np.float32) if tensor.dtype.kind == "f" else tensor.copy()


class _RebuildParameter(_Function):
    __slots__ = ()

    def __call__(self, tensor: npt.NDArray[Any], *_: Any) -> npt.NDArray[Any]:
        return tensor


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    **{("torch", name): name for name in _STORAGES},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, program: IO[bytes], archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(program, encoding="utf-8")
        self._archive, self._folder = archive, folder
        self._storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _Refused(f"it asks for {module}.{name}, which is not a tensor: refused, nothing was executed") from None

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or pid[1] not in _STORAGES or not isinstance(pid[2], str):
            raise _Refused(f"it refers to {pid!r}, which is no storage of numbers")
        _, kind, key, _, n = pid[:5]
        if key not in self._storages:
            data = np.frombuffer(_member(self._archive, f"{self._folder}data/{key}"), _STORAGES[kind])
            if data.size != n:
                raise _Refused(f"its storage {key} has {data.size} values, and should have {n}")
            self._storages[key] = _Storage(data, kind == "BFloat16Storage")
        return self._storages[key]
