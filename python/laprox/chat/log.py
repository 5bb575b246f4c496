"""llama.cpp reports why something failed to its log only. Keep its errors, to tell the reason in one line."""

from __future__ import annotations

import ctypes
import sys

import llama_cpp

_ERROR = 4  # enum ggml_log_level

_errors: list[str] = []
_show = False


@llama_cpp.llama_log_callback
def _record(level: int, text: bytes, _user_data: object) -> None:
    line = text.decode(errors="replace")
    if level == _ERROR:
        _errors.append(line.strip())
    if _show:
        print(line, end="", flush=True, file=sys.stderr)


def record(verbose: bool) -> None:
    """From now on, keep llama.cpp's errors, and show its log only if `verbose`."""
    global _show
    _show = verbose
    llama_cpp.llama_log_set(_record, ctypes.c_void_p(0))


def forget() -> None:
    """Something new begins."""
    _errors.clear()


def reason() -> str:
    """Why it failed: the first error is the cause, those after it are consequences."""
    if not _errors:
        return ""
    function, separator, message = _errors[0].partition(": ")
    return message if separator and " " not in function else _errors[0]
