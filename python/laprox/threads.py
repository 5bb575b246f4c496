"""The engine works for one thread at a time: in the midst of a call, what another one reads of a cache may not be there any more."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

from laprox import _core

Y = TypeVar("Y")
S = TypeVar("S")


class InUse:
    """What a thread holds while the engine works for it. `with in_use:` waits for the call of another one to end."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """As `with`, for what had better be refused than wait for a long prompt. Raises LaproxError where another thread holds it."""
        if not self._lock.acquire(blocking=False):
            raise _core.LaproxError("this Llama is being used in another thread")
        try:
            yield
        finally:
            self._lock.release()

    def steps(self, generator: Generator[Y, S | None, None]) -> Generator[Y, S | None, None]:
        """A generator whose steps hold it: they may come from several threads, and between them others have their turn."""
        sent: S | None = None
        try:
            while True:
                with self:
                    try:
                        item = generator.send(sent)
                    except StopIteration:
                        return
                sent = yield item
        finally:
            with self:
                generator.close()
