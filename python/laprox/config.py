"""The settings of the compressing cache, checked before a model is loaded."""

from __future__ import annotations

import numbers
import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from laprox import _core
from laprox.policy import CUSTOM, Policy

OFF = "off"

# The engine's rows: what each setting is, what is accepted, and what it does.
OPTIONS = {option.name: option for option in _core.options()}


def described(name: str) -> str:
    """What a setting does, as a sentence; of a choice, the sentence begins with what can be chosen."""
    option = OPTIONS[name]
    return (option.help if option.kind == "choice" else option.help[0].upper() + option.help[1:]) + "."


def initial(name: str) -> Any:
    """The value of a setting where none is given."""
    option = OPTIONS[name]
    if option.kind == "path":
        return None
    return {"integer": int, "number": float}.get(option.kind, str)(option.initial)


@dataclass(frozen=True)
class KVConfig:  # its docstring is made of the engine's rows, below
    budget: str | float = initial("budget")
    policy: str | Policy | None = initial("policy")
    window: int = initial("window")
    sink: int = initial("sink")
    recent: int = initial("recent")
    protect: str = initial("protect")
    min_tokens: int = initial("min_tokens")
    prefill: str = initial("prefill")
    profile: str | os.PathLike[str] | None = initial("profile")
    gates: str | os.PathLike[str] | None = initial("gates")
    floor: float = initial("floor")
    archive: str | os.PathLike[str] = initial("archive")
    archive_limit: str | float = initial("archive_limit")
    recall: int = initial("recall")
    recall_tokens: int = initial("recall_tokens")

    def __post_init__(self) -> None:
        if self.policy is None or self.policy == OFF:
            object.__setattr__(self, "policy", None)
        self.params().check()

    @property
    def on(self) -> bool:
        """Whether the cache is compressed at all."""
        return self.policy is not None

    def check(self, before_names: str, **changes: Any) -> None:
        """Raise ValueError where these changes aren't accepted; `before_names` as for `to_params`."""
        to_params({field.name: getattr(self, field.name) for field in fields(self)} | changes, before_names).check()

    def params(self) -> _core.Params:
        """The same settings for the C API."""
        return to_params({field.name: getattr(self, field.name) for field in fields(self)})


def to_params(settings: Mapping[str, Any], before_names: str = "kv ") -> _core.Params:
    """Settings for the C API, the others as they are where none is given.

    Args:
        settings: By the names of KVConfig's fields.
        before_names: Stands before a name in refusals: "--kv-", where the settings were given as options.

    Raises:
        ValueError: One isn't accepted; names it, its value and what is accepted. Whether they go together, `check` says.
    """
    params = _core.Params(before_names)
    for name, value in settings.items():
        if isinstance(value, Policy):
            params.set_custom(value.allocator)
        elif (text := _text(OPTIONS[name], value)) is not None:
            params.set(name, text)
        elif isinstance(value, type) and issubclass(value, Policy):
            raise ValueError(f"{before_names}{name} is {value!r}; accepted: an instance of it, {value.__name__}()")
        else:
            more = ", or a laprox.Policy" if name == "policy" else ""
            raise ValueError(f"{before_names}{name} is {value!r}; accepted: {OPTIONS[name].accepted}{more}")
    return params


def _text(option: _core.Option, value: Any) -> str | None:
    """As one parser, the engine's, reads it: 0.05 is a fraction and 2048 are tokens as text, too. None: of no type that it takes."""
    if value is None and option.kind in ("path", "policy"):
        return OFF if option.kind == "policy" else option.initial
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        if isinstance(value, numbers.Integral):
            return str(int(value)) if option.kind in ("integer", "number", "budget") else None
        return repr(float(value)) if option.kind in ("number", "budget", "space") else None
    if isinstance(value, os.PathLike) and option.kind in ("path", "folder"):
        value = os.fspath(value)
    named = isinstance(value, str) and option.kind not in ("integer", "number")
    return value if named and "\0" not in value and (value or option.kind != "path") else None


# What the rows can't say: the types that Python has for it.
_IN_PYTHON = {
    "budget": "A number is taken as its text: 0.05, 2048.",
    "policy": "Or a `laprox.Policy` of your own; None is off.",
}

KVConfig.__doc__ = "\n".join([
    "What the KV cache keeps.",
    "",
    "An *entry* is one K row and one V row: one (layer, KV head, token) of the cache.",
    "",
    "Attributes:",
    *(
        textwrap.fill(
            f"{name}: {described(name)} {_IN_PYTHON.get(name, '')}".rstrip(),
            120, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False,
        )
        for name in OPTIONS
    ),
    "",
    "Raises:",
    "    ValueError: A setting isn't accepted; names the setting, its value and what is accepted.",
])  # fmt: skip


def policies() -> list[str]:
    """The policies that have a name of their own."""
    return [name for name in _core.policies() if name != CUSTOM]  # that one is a laprox.Policy


def scorers() -> list[str]:
    """What can stand before the colon of "<scorer>:<allocator>", or alone."""
    return [name for name in _core.scorers() if name != CUSTOM]


def allocators() -> list[str]:
    """What can stand after it: who keeps how many."""
    return _core.allocators()
