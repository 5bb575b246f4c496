"""Results as they come: a JSON-lines file that an interrupted run goes on with.

The first line is the header, which says what was measured and how; every other line is a row under its key. A row is in the
file, on the disk, when add() returns.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp

from laprox import __version__
from laprox.files import check_same_run, sha256_of

Key = str | int | None

# What a header says for people, and what may differ between the runs that share a file.
_FREE = ("command", "machine")


class Rows:
    """The rows of one file, in the order in which they were measured."""

    def __init__(self, path: Path, header: dict[str, Any], restart: bool = False) -> None:
        """Begin a file, or go on with it.

        Args:
            path: The file.
            header: What make_header() gives.
            restart: Begin anew, whatever there is.

        Raises:
            ValueError: The file is of something else, or of a run with other settings: says which.
            OSError: It can't be written.
        """
        self.path = path
        self.header: dict[str, Any] = json.loads(json.dumps(header))
        self._rows: dict[tuple[Key, ...], dict[str, Any]] = {}
        self._size = 0  # of the complete lines that were there, in bytes
        if restart or not path.exists() or _only_begun(path.read_bytes()):
            with open(path, "wb") as file:
                _write(file, {"header": self.header})
            return
        before = _load(path)
        self._agree(before)
        with open(path, "rb+") as file:
            file.truncate(before._size)  # without the line that was being written when the run ended
        self.header = before.header
        self._rows = before._rows

    @classmethod
    def load(cls, path: Path) -> Rows:
        """The complete rows of a file that exists, to be read only.

        Raises:
            ValueError: It is not such a file.
        """
        return _load(path)

    def __contains__(self, key: Sequence[Key]) -> bool:
        return tuple(key) in self._rows

    def __getitem__(self, key: Sequence[Key]) -> dict[str, Any]:
        return self._rows[tuple(key)]

    def get(self, key: Sequence[Key]) -> dict[str, Any]:
        """The same; empty, if there is none."""
        return self._rows.get(tuple(key), {})

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[tuple[tuple[Key, ...], dict[str, Any]]]:
        return iter(self._rows.items())

    def add(self, key: Sequence[Key], row: dict[str, Any]) -> None:
        """Append a row and see it to the disk.

        Raises:
            KeyError: There is one under this key.
        """
        if key in self:
            raise KeyError(f"{self.path} has a row {list(key)}")
        with open(self.path, "ab") as file:
            _write(file, {"key": list(key), **row})
        self._rows[tuple(key)] = json.loads(json.dumps(row))

    def _agree(self, before: Rows) -> None:
        old, new = (
            {name: value for name, value in flat(header).items() if name.split(".")[0] not in _FREE}
            for header in (before.header, self.header)
        )
        check_same_run(self.path, old, new)


def make_header(
    kind: str, command: Sequence[str], settings: dict[str, Any], inputs: Sequence[Path], model: dict[str, Any]
) -> dict[str, Any]:
    """What a results file says of itself.

    Args:
        kind: Of the rows: "compare", "eval".
        command: The arguments that the run was started with; for people, not compared. Of an absolute path only the last
            part is told: results are shared.
        settings: Everything that decides the numbers, and nothing else.
        inputs: Files that do, too; told by name and sha256.
        model: What make_model() gives.

    Raises:
        ValueError: One of the inputs is a pipe, say, whose sha256 can't be known any more.
    """
    for path in inputs:
        if path.exists() and not path.is_file():
            raise ValueError(f"{path}: not a file, which it takes to know an interrupted run's texts again; accepted: files")
    return {
        "kind": kind,
        "versions": {"laprox": __version__, "llama_cpp_python": llama_cpp.__version__},
        "settings": settings,
        "inputs": [{"name": path.name, "sha256": sha256_of(path)} for path in inputs],
        "model": model,
        "command": [os.path.basename(part) if os.path.isabs(part) else part for part in command],
        "machine": platform.platform(),
    }


def header_facts(header: dict[str, Any]) -> dict[str, str]:
    """What a header says, for people: a line each."""
    model = header["model"]
    return {
        "command": " ".join(header["command"]),
        **{name: str(value) for name, value in header["versions"].items()},
        "model": f"{model['name']}, {model.get('bytes', 0):,} bytes, fingerprint {model['fingerprint']}",
        **{f["name"]: f"sha256 {f['sha256']}" for f in header["inputs"]},
        **{name: ", ".join(map(str, v)) if isinstance(v, list) else str(v) for name, v in flat(header["settings"]).items()},
        "machine": header["machine"],
    }


def make_model(path: Path, fingerprint: str) -> dict[str, Any]:
    """What a header says of a model: name, size, and the fingerprint that `_core.model_fingerprint` gives."""
    return {"name": path.name, "bytes": path.stat().st_size, "fingerprint": fingerprint}


def _write(file: Any, line: dict[str, Any]) -> None:
    file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _only_begun(data: bytes) -> bool:
    """Whether not even the header is complete, but it is one."""
    opening = b'{"header":'
    return b"\n" not in data and data[: len(opening)] == opening[: len(data)]


def _load(path: Path) -> Rows:
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    found = Rows.__new__(Rows)
    found.path, found.header, found._rows = path, {}, {}
    try:
        first, *lines = [json.loads(line) for line in whole.splitlines()]
        found.header = dict(first["header"])
        for line in lines:
            found._rows[tuple(line.pop("key"))] = line
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is no results file of laprox: name another one, or --restart to overwrite it") from None
    found._size = len(whole)
    return found


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, inner in value.items() for k, v in flat(inner, f"{name}.{key}" if name else key).items()}
