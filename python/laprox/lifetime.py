"""Attributes of a llama_cpp.Llama that point into the library's memory, for as long as that is there."""

from __future__ import annotations

import os
from typing import Any

from laprox._core import LaproxError


class Native:
    """One such attribute. After close(), and in a process forked after loading, reading it raises LaproxError.

    llama.cpp would follow the pointer, and crash or, where its threads are missing, wait forever.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, llm: Any, owner: type | None = None) -> Any:
        if llm is None:
            return self
        check_usable(llm)
        try:
            return llm.__dict__[self._name]
        except KeyError:
            raise AttributeError(self._name) from None

    def __set__(self, llm: Any, value: Any) -> None:
        llm.__dict__[self._name] = value


def check_usable(llm: Any) -> None:
    """Raises LaproxError if this Llama is closed, or of a process that this one was forked from."""
    if llm._closed:
        raise LaproxError("this Llama is closed")
    if llm._pid != os.getpid():
        raise LaproxError(
            "this Llama was loaded before the process forked, and llama.cpp's threads stayed behind: "
            'load it in the new process, or start that with multiprocessing.get_context("spawn")'
        )
