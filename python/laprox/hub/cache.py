"""Where models are kept, how a finished one is recognised, and who may write it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from laprox.files import replacing

POLL = 0.25  # seconds between two looks at how much is there


class DownloadError(RuntimeError):
    """A file could not be got; the message says why, in a line."""


def cache_folder() -> Path:
    """LAPROX_CACHE, or the platform's folder for such things."""
    if own := os.environ.get("LAPROX_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "laprox"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "laprox" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "laprox"
    return Path.home() / ".cache" / "laprox"


def make_folder(folder: Path) -> None:
    """Raises DownloadError if it can't be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(f"{folder} can't be made ({error.strerror}); LAPROX_CACHE names another place") from None


def is_verified(path: Path, n_bytes: int, sha256: str) -> bool:
    """Whether it was found to be this file and was not written to since. Reads none of it."""
    try:
        stat, record = path.stat(), json.loads(_record(path).read_text())
    except (OSError, ValueError):
        return False
    return stat.st_size == n_bytes and record == {"sha256": sha256, "bytes": n_bytes, "mtime_ns": stat.st_mtime_ns}


def record_verified(path: Path, sha256: str) -> None:
    """Remember for `is_verified`. A folder that can't be written to costs a hash next time, nothing else."""
    stat = path.stat()
    text = json.dumps({"sha256": sha256, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns})
    with contextlib.suppress(OSError), replacing(_record(path)) as unfinished:
        unfinished.write_text(text + "\n")


def delete(path: Path) -> None:
    """The file and what is remembered of it."""
    _record(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


class DiskFull(OSError):
    """ENOSPC, in a line that names the folder and the environment variable that moves it."""

    def __init__(self, folder: Path, details: str, variable: str = "LAPROX_CACHE") -> None:
        super().__init__(errno.ENOSPC, f"the disk of {folder} is full: {details}; {variable} names another place")

    def __str__(self) -> str:
        return str(self.strerror)


def check_space(folder: Path, needed: int, variable: str = "LAPROX_CACHE") -> None:
    """Raises DiskFull if fewer bytes are free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskFull(folder, f"{needed / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free", variable)


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None], pause: float = POLL) -> Iterator[None]:
    """Hold a lock file, so that one process at a time downloads; the others wait. `waiting` is called once if so.

    Where the file system knows no locks, nothing is held: files are renamed into place whole in any case.
    """
    with open(path, "a+b") as file:
        told = False
        while (held := _try_lock(file.fileno())) is False:
            if not told:
                waiting()
                told = True
            time.sleep(pause)
        try:
            yield
        finally:
            if held:
                _unlock(file.fileno())


@contextlib.contextmanager
def watched(measure: Callable[[], int], progress: Callable[[int], None]) -> Iterator[None]:
    """Report what `measure` says, whenever it is more than before, while another program or library writes."""
    stop = threading.Event()

    def watch() -> None:
        most = 0
        while not stop.wait(POLL):
            if (now := measure()) > most:
                most = now
                progress(most)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def largest_file(folder: Path, suffix: str = "") -> int:
    """In bytes; files may come and go meanwhile."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in filter(lambda name: name.endswith(suffix), names):
            with contextlib.suppress(OSError):
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
    return largest


def _record(path: Path) -> Path:
    return path.with_name(path.name + ".verified")


_BUSY = (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN, errno.EDEADLK)

if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        os.lseek(descriptor, 0, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

    def _unlock(descriptor: int) -> None:
        os.lseek(descriptor, 0, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _try_lock(descriptor: int) -> bool | None:
    """False: someone else has it. None: there are no locks here."""
    try:
        _lock(descriptor)
    except OSError as error:
        return False if error.errno in _BUSY else None
    return True
