"""Files read in pieces, and outputs of long work: checked before it begins, gone on with after an interruption, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Progress = Callable[[int, int], None]
"""Is told bytes done and bytes in all."""

CHUNK = 1 << 20  # bytes read or written at once


def sha256_of(path: Path, progress: Progress | None = None) -> str:
    """Of a file, in hexadecimal."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, total)
    return digest.hexdigest()


def check_writable(output: Path, inputs: Iterable[Path | None] = ()) -> None:
    """Raises ValueError if a file can't be made there, or would take the place of an input: better now than after hours."""
    if "\0" in str(output):
        raise ValueError(f"{str(output)!r} can't be written: it has a NUL character in it")
    for path in filter(None, inputs):
        if output.resolve() == path.resolve() or output.exists() and path.exists() and output.samefile(path):
            raise ValueError(f"{output} would take the place of {path}; name another output")
    try:
        if output.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        tempfile.TemporaryFile(dir=output.parent).close()
    except OSError as error:
        raise ValueError(f"{output} can't be written: {error.strerror}") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to. It takes the place of `path` at the end; if something is raised, it is deleted."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_same_run(where: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ValueError, with the first one that differs, unless a run that goes on has the settings that it began with."""
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{where} is of another run: its {name} is {json.dumps(before.get(name))}, now it is {json.dumps(now.get(name))}. "
                "Give the same settings to go on with it, --restart to begin anew, or name another output"
            )


class Partial:
    """The folder `<output>.partial`, where a run keeps settings.json and what is finished until all of it is."""

    def __init__(self, output: Path, settings: Mapping[str, Any], restart: bool = False) -> None:
        """Begin or go on.

        Raises:
            ValueError: It is of a run with other settings; names the first one.
            OSError: It can't be written.
        """
        self.folder = output.with_name(output.name + ".partial")
        if restart and self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(exist_ok=True)
        now, path = json.loads(json.dumps(settings)), self.folder / "settings.json"
        try:
            check_same_run(self.folder, json.loads(path.read_text()), now)
        except FileNotFoundError:
            with replacing(path) as unfinished:
                unfinished.write_text(json.dumps(now, indent=1) + "\n")
        except json.JSONDecodeError:
            check_same_run(self.folder, {}, now)

    def path(self, name: str) -> Path:
        """Where a part is, or would be."""
        return self.folder / name

    def __contains__(self, name: str) -> bool:
        return self.path(name).exists()

    def remove(self) -> None:
        """The output is written: none of it is needed any more."""
        shutil.rmtree(self.folder)
