"""The settings of the compressing cache, checked before a model is loaded."""

from __future__ import annotations

import numbers
import os
from dataclasses import dataclass

from laprox import _core
from laprox.policy import CUSTOM, Policy

OFF = "off"

# The types that cached keys and values can have, as llama.cpp numbers them.
CACHE_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2, "q4_1": 3, "iq4_nl": 20, "q5_0": 6, "q5_1": 7}


@dataclass(frozen=True)
class KVConfig:
    """What the KV cache keeps.

    An *entry* is one K row and one V row: one (layer, KV head, token) of the cache.

    Attributes:
        budget: What may be kept: "5%" or 0.05 of the entries seen, "2048" or 2048 tokens (on average per KV head), or
            "512MiB" of cache (also KiB, GiB, kB, MB, GB; tail and padding included).
        policy: How entries are chosen: a name of `laprox.policies()`; a scorer of `laprox.scorers()`, alone or with an
            allocator of `laprox.allocators()` ("snapkv:ada"); or a `laprox.Policy` of your own. None or "off" is stock
            llama.cpp.
        window: The observation window: the queries of the last `window` tokens score the entries.
        sink: The first `sink` tokens (attention sinks) are never evicted.
        recent: The last `recent` tokens are never evicted.
        min_tokens: Nothing is evicted from a sequence of at most this many tokens.
        prefill: "dense" caches the whole prompt and compresses it once; "chunked" compresses whenever a small physical
            cache is full, which bounds the peak and evicts before the question is seen.
        profile: LU-KV's table (.npy) for the allocator "profile"; None is MODEL.kv-profile.npy beside the model.
        gates: Retention gates (.gguf) for the scorer "retention"; None is MODEL.kv-gates.gguf beside the model.
        floor: The share of the average budget, 0 to 1, that the allocators "global" and "global-raw" leave to every head.

    Raises:
        ValueError: A setting is out of range; names the setting, its value and what is accepted.
    """

    budget: str | float = _core.DEFAULT_BUDGET
    policy: str | Policy | None = "laprox"
    window: int = 32
    sink: int = 4
    recent: int = 32
    min_tokens: int = 512
    prefill: str = "dense"
    profile: str | os.PathLike[str] | None = None
    gates: str | os.PathLike[str] | None = None
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.policy == OFF:
            object.__setattr__(self, "policy", None)
        if self.policy is not None:
            _check_policy(self.policy)
        if self.prefill not in _core.PREFILLS:
            raise _refused("prefill", self.prefill, ", ".join(_core.PREFILLS))
        for name, least in (("window", 1), ("sink", 0), ("recent", 1), ("min_tokens", 0)):
            value = getattr(self, name)
            if not _is_integer(value) or not least <= value < 2**31:
                raise _refused(name, value, f"an integer of at least {least}")
        for name, kind in (("profile", ".npy"), ("gates", ".gguf")):
            value = getattr(self, name)
            path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
            if value is not None and (not isinstance(path, str) or not path or "\0" in path):
                raise _refused(name, value, f"the path of a {kind} file")
        if isinstance(self.floor, bool) or not isinstance(self.floor, numbers.Real) or not 0 <= self.floor <= 1:
            raise _refused("floor", self.floor, "0 to 1")
        try:
            _core.parse_budget(self._budget_text())
        except _core.LaproxError as error:
            raise ValueError(f"kv {error}") from None

    @property
    def on(self) -> bool:
        """Whether the cache is compressed at all."""
        return self.policy is not None

    def params(self) -> _core.Params:
        """The same settings for the C API (only when `on`)."""
        assert self.policy is not None
        return _core.Params(
            policy=f"{CUSTOM}:{self.policy.allocator}" if isinstance(self.policy, Policy) else self.policy,
            budget=self._budget_text(),
            window=self.window,
            sink=self.sink,
            recent=self.recent,
            min_tokens=self.min_tokens,
            prefill=self.prefill,
            profile=None if self.profile is None else os.fspath(self.profile),
            gates=None if self.gates is None else os.fspath(self.gates),
            floor=float(self.floor),
        )

    def _budget_text(self) -> str:
        """One parser, the engine's, reads every budget: 0.05 is a fraction and 2048 are tokens as text, too."""
        if _is_integer(self.budget):
            return str(int(self.budget))
        if isinstance(self.budget, numbers.Real) and not isinstance(self.budget, bool):
            return repr(float(self.budget))
        if isinstance(self.budget, str):
            return self.budget
        raise _refused("budget", self.budget, 'such as "5%", 0.05, 2048 (tokens) or "512MiB"')


def policies() -> list[str]:
    """The policies that have a name of their own."""
    return [name for name in _core.policies() if name != CUSTOM]  # that one is a laprox.Policy


def scorers() -> list[str]:
    """What can stand before the colon of "<scorer>:<allocator>", or alone."""
    return [name for name in _core.scorers() if name != CUSTOM]


def allocators() -> list[str]:
    """What can stand after it: who keeps how many."""
    return _core.allocators()


def _check_policy(policy: object) -> None:
    if isinstance(policy, Policy):
        if policy.allocator not in allocators():
            raise ValueError(
                f"kv policy {type(policy).__name__} has allocator = {policy.allocator!r}; accepted: {', '.join(allocators())}"
            )
        return
    if isinstance(policy, type) and issubclass(policy, Policy):
        raise _refused("policy", policy, f"an instance of it, {policy.__name__}()")
    if isinstance(policy, str):
        scorer, colon, allocator = policy.partition(":")
        if policy in policies() or scorer in scorers() and (not colon or allocator in allocators()):
            return
    raise _refused(
        "policy",
        policy,
        f"{', '.join(policies())}, {OFF}; <scorer> or <scorer>:<allocator> of the scorers {', '.join(scorers())} and the "
        f"allocators {', '.join(allocators())}; a laprox.Policy",
    )


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _refused(name: str, value: object, accepted: str) -> ValueError:
    return ValueError(f"kv {name} is {value!r}; accepted: {accepted}")
