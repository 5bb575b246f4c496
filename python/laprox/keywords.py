"""What the keywords of a `laprox.Llama` say of its cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from laprox.config import KVConfig


def take_config(kv: object, kwargs: dict[str, Any]) -> KVConfig | None:
    """Take the kv_<field> keywords out of kwargs and into the settings. None if these are off.

    Raises:
        ValueError: One isn't accepted, or they contradict each other.
        TypeError: There is no such keyword.
    """
    if kv is not None and not isinstance(kv, KVConfig):
        raise ValueError(f"kv is {kv!r}; accepted: a laprox.KVConfig, or None for stock llama.cpp")
    known = [field.name for field in fields(KVConfig)]
    changes = {name: kwargs.pop("kv_" + name) for name in known if "kv_" + name in kwargs}
    for key in kwargs:  # llama_cpp takes any keyword, so a typo would go unnoticed
        if key.startswith("kv_") and key != "kv_overrides":
            raise TypeError(f"unknown keyword {key}; accepted: {', '.join('kv_' + name for name in known)}")
    if kv is None:
        if changes:
            raise ValueError(f"kv=None turns the compressing cache off, yet kv_{next(iter(changes))} is given")
        return None
    kv = replace(kv, **changes)
    return kv if kv.on else None


def check_compatible(flash_attn: bool | None, kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError where other keywords leave no cache that can be compressed."""
    if flash_attn is False:
        raise ValueError("flash_attn=False: the compressing cache needs flash attention; kv=None does without it")
    for option in ("embedding", "vocab_only"):
        if kwargs.get(option):
            raise ValueError(f"{option}=True leaves no KV cache to compress: add kv=None")
