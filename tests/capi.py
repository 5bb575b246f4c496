"""laprox.h through ctypes: its functions, its structures, and settings. A refusal raises Refused with laprox_last_error()'s reason."""

from __future__ import annotations

import ctypes as c

import devices  # noqa: F401  points llama_cpp at our libraries
import llama_cpp.llama_cpp as L


class Refused(Exception):
    """The engine said no, and why."""


class LaproxOption(c.Structure):
    _fields_ = [(name, c.c_char_p) for name in ("name", "kind", "initial", "accepted", "value", "help")]


class LaproxLook(c.Structure):
    _fields_ = [(name, c.c_int32) for name in ("n_text", "n_prefix", "first", "last", "every", "stride")]


class LaproxStats(c.Structure):
    _fields_ = [(n, c.c_int64) for n in ("tokens_seen", "entries_held", "entries_full", "kv_bytes", "kv_bytes_full")]
    _fields_ += [(n, c.c_int64) for n in ("window_bytes", "compressions", "recalls", "entries_recalled", "archived_entries", "archived_bytes", "tokens_lost")]
    _fields_ += [(n, c.c_double) for n in ("score_seconds", "select_seconds", "compact_seconds")]


int32_p, float_p = c.POINTER(c.c_int32), c.POINTER(c.c_float)
ScorerCallback = c.CFUNCTYPE(
    c.c_bool, c.c_void_p, c.c_int32, c.c_int32, c.c_int32, int32_p, c.c_int64, float_p, c.c_void_p
)

if hasattr(L._lib, "laprox_api_version"):
    for _name, _restype, _argtypes in [
        ("api_version", c.c_int32, []),
        ("last_error", c.c_char_p, []),
        ("option_count", c.c_int32, []),
        ("option_at", LaproxOption, [c.c_int32]),
        ("params_new", c.c_void_p, [c.c_char_p]),
        ("params_free", None, [c.c_void_p]),
        ("params_set", c.c_bool, [c.c_void_p, c.c_char_p, c.c_char_p]),
        ("params_set_custom", c.c_bool, [c.c_void_p, c.c_char_p]),
        ("params_get", c.c_char_p, [c.c_void_p, c.c_char_p]),
        ("params_check", c.c_bool, [c.c_void_p]),
        ("policy_count", c.c_int32, []),
        ("policy_name", c.c_char_p, [c.c_int32]),
        ("policy_meaning", c.c_char_p, [c.c_int32]),
        ("scorer_count", c.c_int32, []),
        ("scorer_name", c.c_char_p, [c.c_int32]),
        ("allocator_count", c.c_int32, []),
        ("allocator_name", c.c_char_p, [c.c_int32]),
        ("model_set_params", c.c_bool, [c.c_void_p, c.c_void_p]),
        ("model_check", c.c_bool, [c.c_void_p]),
        ("set_params", c.c_bool, [c.c_void_p, c.c_void_p]),
        ("seq_set_params", c.c_bool, [c.c_void_p, c.c_int32, c.c_void_p]),
        ("get_params", c.c_void_p, [c.c_void_p]),
        ("compress", c.c_bool, [c.c_void_p, c.c_int32]),
        ("probe", c.c_bool, [c.c_void_p, c.c_int32, c.POINTER(LaproxLook)]),
        ("probe_found", c.c_void_p, [c.c_void_p, c.c_int32]),
        ("probe_again", c.c_bool, [c.c_void_p, c.c_int32, c.c_void_p]),
        ("found_free", None, [c.c_void_p]),
        ("bias", c.c_float, [c.c_void_p, c.c_int32, c.c_int32, c.c_int32]),
        ("mark", c.c_bool, [c.c_void_p, c.c_int32]),
        ("prompt_done", c.c_bool, [c.c_void_p, c.c_int32, c.c_int32, int32_p]),
        ("set_archive_in_states", c.c_bool, [c.c_void_p, c.c_bool]),
        ("tail_begin", c.c_int32, [c.c_void_p, c.c_int32]),
        ("compressed_for", c.c_int32, [c.c_void_p, c.c_int32]),
        ("document_save", c.c_bool, [c.c_void_p, c.c_int32, c.c_char_p, int32_p, c.c_int32, c.POINTER(c.c_char_p), c.POINTER(c.c_char_p), c.c_int32]),
        ("document_open", c.c_void_p, [c.c_char_p]),
        ("document_free", None, [c.c_void_p]),
        ("document_get", c.c_char_p, [c.c_void_p, c.c_char_p]),
        ("document_tokens", c.c_int32, [c.c_void_p, int32_p, c.c_int32]),
        ("document_load", c.c_bool, [c.c_void_p, c.c_int32, c.c_void_p]),
        ("get_stats", c.c_bool, [c.c_void_p, c.c_int32, c.POINTER(LaproxStats)]),
        ("set_scorer", c.c_bool, [c.c_void_p, c.c_void_p, c.c_void_p]),
        ("model_fingerprint", c.c_bool, [c.c_void_p, c.c_char_p]),
        ("head_shape", c.c_bool, [c.c_void_p, c.c_int32, int32_p, int32_p, int32_p]),
        ("layers", c.c_int32, [c.c_void_p, int32_p, int32_p, c.c_int32]),
        ("positions", c.c_int64, [c.c_void_p, c.c_int32, c.c_int32, c.c_int32, int32_p, c.c_int64]),
        ("score", c.c_bool, [c.c_void_p, c.c_int32]),
        ("scores", c.c_int64, [c.c_void_p, c.c_int32, c.c_int32, c.c_int32, float_p, c.c_int64]),
        ("finished_scores", c.c_int64, [c.c_void_p, c.c_int32, c.c_int32, c.c_int32, float_p, c.c_int64]),
        ("entries", c.c_int64, [c.c_void_p, c.c_int32, c.c_int32, c.c_int32, float_p, float_p, c.c_int64]),
        ("queries", c.c_int64, [c.c_void_p, c.c_int32, c.c_int32, float_p, int32_p, c.c_int64]),
    ]:
        _f = getattr(L._lib, "laprox_" + _name)
        _f.restype, _f.argtypes = _restype, _argtypes


def laprox(name: str, *args):
    return getattr(L._lib, "laprox_" + name)(*args)


def last_error() -> str:
    return laprox("last_error").decode()


def _granted(ok) -> None:
    if not ok:
        reason = last_error()
        assert reason, "a refusal without a reason"
        raise Refused(reason)


class Params:
    """Settings as texts, freed with the object."""

    def __init__(self, handle: int | None = None, before_names: str = ""):
        self.handle = handle or laprox("params_new", before_names.encode())

    def __del__(self):
        laprox("params_free", self.handle)

    def set(self, name: str, text: str | None) -> None:
        _granted(laprox("params_set", self.handle, name.encode(), None if text is None else text.encode()))

    def set_custom(self, allocator: str) -> None:
        _granted(laprox("params_set_custom", self.handle, allocator.encode()))

    def get(self, name: str) -> str:
        text = laprox("params_get", self.handle, name.encode())
        _granted(text is not None)
        return text.decode()

    def check(self) -> None:
        _granted(laprox("params_check", self.handle))


def options() -> dict[str, LaproxOption]:
    rows = [laprox("option_at", i) for i in range(laprox("option_count"))]
    return {row.name.decode(): row for row in rows}


def params(policy="laprox", budget="10%", **settings) -> Params:
    """Settings of a test: nothing is too short to be compressed, and what is evicted is gone."""
    found = Params()
    for name, value in {"policy": policy, "budget": budget, "min_tokens": 0, "archive": "off", **settings}.items():
        if name == "policy" and value.partition(":")[0] == "custom":
            found.set_custom(value.partition(":")[2] or "global")
        else:
            found.set(name, None if value is None else str(value))
    return found


def _listed(what: str) -> list[str]:
    return [laprox(f"{what}_name", i).decode() for i in range(laprox(f"{what}_count"))]


def policies() -> list[str]:
    return _listed("policy")


def meanings() -> dict[str, str]:
    """What the named policies are made of: {"pyramidkv": "snapkv:pyramid", ...}."""
    return {name: laprox("policy_meaning", i).decode() for i, name in enumerate(policies())}


def scorers() -> list[str]:
    return _listed("scorer")


def allocators() -> list[str]:
    return _listed("allocator")
