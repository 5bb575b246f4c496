"""What `laprox compare` compares: ways to hold a document in less memory, and how many bytes each may have.

A budget of 10% is 10% of the bytes that the document takes in an uncompressed f16 cache. On top of it every contender has
the same ROOM for the tokens to come, since no cache can do without. So a budget is a number of bytes, allocated ones, and
every contender gets exactly these: the engine as its budget, a shorter context as the tokens that fit into them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from laprox import LaproxError, _core
from laprox._upstream import LlamaModel
from laprox.cache_types import ROOM, CacheType
from laprox.chat.cost import measure
from laprox.config import KVConfig
from laprox.eval.reader import RECALL, SHORTER, made_with, plain, recalls, types_of, untyped

RECENT = KVConfig().recent
PROTECTED = KVConfig().sink + RECENT  # tokens of every head that no policy can evict

FULL = "full"
QUANTISED = ("q8_0", "q4_0")
POLICIES = ("streaming", "snapkv", "adakv", "criticalkv", "laprox", "laprox@q8_0")


@dataclass(frozen=True)
class Contender:
    """One way to hold a document.

    Attributes:
        name: As it is shown, and as --policies names it.
        policy: How entries are chosen, as the reader takes it; None is stock llama.cpp.
        cache_type: Of keys and values.
    """

    name: str
    policy: str | None = None
    cache_type: str = "f16"

    @property
    def budgeted(self) -> bool:
        """Whether it can be made to fit into any number of bytes; the others take what they take."""
        return self.policy is not None or self.name == SHORTER

    @property
    def context(self) -> tuple[str, str]:
        """Those with the same one share a reading of the document, but for SHORTER, which reads as much as fits."""
        return (made_with(self.policy) if self.policy else self.name, self.cache_type)


@dataclass(frozen=True)
class Budget:
    """What may be held of a document: "10%" of it, "2048" of its tokens, or "512MiB" with the room for the tokens to come."""

    text: str

    def __post_init__(self) -> None:
        """Raises ValueError if it is no budget."""
        KVConfig().check("--budgets: ", budget=self.text)

    def tokens(self, n_read: int, bytes_per_token: float) -> float:
        """Of a document of n_read tokens, on average per KV head."""
        unit, value = _core.parse_budget(self.text)
        if unit == "bytes":
            return value / bytes_per_token - ROOM
        return value * n_read if unit == "fraction" else value

    def bytes(self, n_read: int, bytes_per_token: float) -> int:
        """That every contender may allocate."""
        return int(bytes_per_token * (self.tokens(n_read, bytes_per_token) + ROOM))

    def check(self, name: str, n_read: int, bytes_per_token: float) -> None:
        """Raises ValueError unless it leaves something to choose in a document of n_read tokens."""
        tokens = self.tokens(n_read, bytes_per_token)
        if tokens >= n_read:
            raise ValueError(f"--budgets {self.text} is all of {name} ({n_read:,} tokens): take smaller ones")
        if tokens < 2 * PROTECTED:
            least = f"{-(-200 * PROTECTED // n_read)}%"
            raise ValueError(
                f"--budgets {self.text} is {max(0, int(tokens))} of the {n_read:,} tokens of {name}, of which {PROTECTED} are "
                f"always kept (the first {PROTECTED - RECENT} and the last {RECENT}): take larger ones, from {least} on, or a "
                "longer document"
            )


def make_contenders(policies: Sequence[str]) -> list[Contender]:
    """Stock llama.cpp's ways, then these policies, each once.

    Args:
        policies: As --kv-policy takes them; with RECALL behind it, or with a cache type, as "laprox@q8_0", or both in this order.

    Raises:
        ValueError: One is unknown.
    """
    found = [Contender(FULL), *(Contender(name, cache_type=name) for name in QUANTISED), Contender(SHORTER)]
    for name in dict.fromkeys(policies):
        types, policy = types_of(name), str(untyped(name)).removesuffix(RECALL)
        if "@" in policy or types and str(types) not in QUANTISED:
            raise ValueError(f"--policies has {name!r}; accepted after a policy: {RECALL}, then one of @{', @'.join(QUANTISED)}")
        if policy in ("off", FULL):
            raise ValueError(f"--policies has {name!r}, but the full cache is always there; accepted: names as for --kv-policy")
        KVConfig().check("--policies: ", policy=policy)
        found.append(Contender(name, policy + RECALL if recalls(name) else policy, str(types or "f16")))
    if len(found) == 2 + len(QUANTISED):
        raise ValueError("--policies is empty: name at least one")
    return found


def check_model(
    model: Path, weights: LlamaModel, contenders: Sequence[Contender], base: KVConfig, types: Mapping[str, CacheType]
) -> tuple[dict[str, float], dict[str, str]]:
    """Ask small contexts.

    Returns:
        The bytes of a token's K and V in the layers that can be compressed, by cache type; and why some of the default
        contenders can't run.

    Raises:
        ValueError: The model can't be compressed at all, or not by one of the contenders that were asked for.
    """
    f16 = types["f16"]
    try:
        per_element = measure(weights, f16, f16).bytes_per_token / f16.bytes_per_element
    except LaproxError as error:
        raise ValueError(f"{model} can't be compressed, so there is nothing to compare: {error}") from None
    refused: dict[str, str] = {}
    for contender in contenders:
        if contender.policy is None:
            continue
        cache_type = types[contender.cache_type]
        try:
            measure(weights, cache_type, cache_type, replace(base, policy=plain(contender.policy)))
        except LaproxError as error:
            if contender.name not in POLICIES:
                raise ValueError(f"--policies {contender.name}: {error}") from None
            refused[contender.name] = str(error)
    return {name: per_element * cache_type.bytes_per_element for name, cache_type in types.items()}, refused
