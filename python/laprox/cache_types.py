"""The types that cached keys and values can have, and which of them a budget in bytes is best spent on.

A coarser type leaves room for more entries. Which of the two loses less, coarseness or eviction, depends on the model, so it is
measured: a table says how far answers move from the full f16 cache's, by types and by the share of the entries that is held.
`laprox profile --types` makes one for a model; where there is none, that of Qwen2.5-Coder-0.5B stands for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from laprox import _core

AUTO = "auto"
FILE = ".kv-types.json"  # of a model's own table, beside MODEL.gguf
ROOM = 256 - 32  # tokens to come, for which there is room beside what is held: the engine's smallest tail, but for its recent ones


class CacheType(NamedTuple):
    """A type of numbers, as llama.cpp numbers it."""

    ggml: int
    bytes_per_element: float


CACHE_TYPES = {
    "f32": CacheType(0, 4.0),
    "f16": CacheType(1, 2.0),
    "bf16": CacheType(30, 2.0),
    "q8_0": CacheType(8, 34 / 32),
    "q4_0": CacheType(2, 18 / 32),
    "q4_1": CacheType(3, 20 / 32),
    "iq4_nl": CacheType(20, 18 / 32),
    "q5_0": CacheType(6, 22 / 32),
    "q5_1": CacheType(7, 24 / 32),
}


def name_of(ggml: int) -> str:
    """Of a type, by llama.cpp's number."""
    return next(name for name, found in CACHE_TYPES.items() if found.ggml == ggml)


@dataclass(frozen=True)
class Types:
    """The types of keys and values; as text "q8_0/q4_0", or "q8_0" where both are the same."""

    k: str = "f16"
    v: str = "f16"

    @classmethod
    def parse(cls, text: str) -> Types:
        """What was written so. Raises ValueError, which names what isn't a type."""
        k, _, v = text.partition("/")
        for name in (k, v or k):
            if name not in CACHE_TYPES:
                raise ValueError(f"{name!r} is no type of a cache; accepted: {', '.join(CACHE_TYPES)}, or two of them: q8_0/q4_0")
        return cls(k, v or k)

    def __str__(self) -> str:
        return self.k if self.k == self.v else f"{self.k}/{self.v}"


@dataclass(frozen=True)
class Auto:
    """In the place of a type: that which loses least at the budget, which has to be in bytes.

    Attributes:
        tokens: Of the text that is going to be read; 0: as many as the context holds.
        unseen: Whether it is compressed before anybody has asked.
    """

    tokens: int = 0
    unseen: bool = False


def given_types(kwargs: dict[str, Any], budget: str | float | None) -> tuple[int | Auto, int | Auto]:
    """The types of keys and values among the keywords of a Llama; those that are to be chosen are taken out, f16 stands for none.

    Args:
        kwargs: With "type_k" and "type_v", by llama.cpp's numbers, AUTO or an Auto.
        budget: Of the compressing cache; None: there is none.

    Raises:
        ValueError: One can't be a cache's type, which would end the process, or is to be chosen without a budget in bytes.
    """
    found: list[int | Auto] = []
    for option in ("type_k", "type_v"):
        given = Auto() if kwargs.get(option) == AUTO else kwargs.get(option)
        if isinstance(given, Auto):
            if budget is None or _core.parse_budget(str(budget))[0] != "bytes":
                here = "kv=None" if budget is None else f"kv_budget={budget!r}"
                raise ValueError(f'{option}="auto" divides a budget in bytes, and here is {here}; accepted with it: kv_budget="64MiB", say')
            kwargs[option] = None
        elif given is not None and given not in (numbers := [number for number, _ in CACHE_TYPES.values()]):
            accepted = ", ".join(f"{number} ({name_of(number)})" for number in numbers)
            raise ValueError(f"{option}={given} can't be the type of a cache; accepted: {accepted}" + (', or "auto"' if budget is not None else ""))
        found.append(CACHE_TYPES["f16"].ggml if given is None else given)
    return found[0], found[1]


Losses = Mapping[Types, Mapping[float, float]]
"""How far answers are from the full f16 cache's (KL in nats, per token), by types and the share of the entries held, up to 1."""


@dataclass(frozen=True)
class Choice:
    """What a budget is spent on.

    Attributes:
        types: Of keys and values,
        share: of the entries, as many as then fit into the budget,
        loss: and what that is expected to lose.
        others: The same of what was not chosen, the best first.
    """

    types: Types
    share: float
    loss: float
    others: tuple[Choice, ...] = ()

    def __str__(self) -> str:
        """As people are told of it."""
        others = ", ".join(f"{other.types} ({other.share:.0%}, {other.loss:.2f})" for other in self.others)
        return f"{self.types} holds {self.share:.0%} of the entries (expected KL {self.loss:.2f})" + (f", before {others}" if others else "")


def choose(losses: Losses, budget: float, n_tokens: int, bytes_per_token: Mapping[Types, float]) -> Choice:
    """The types, and with them the number of entries, that lose least in so many bytes.

    Args:
        losses: By types; between two shares it is interpolated over the logarithm of the share, and beyond the smallest goes on
            as between the smallest two. More entries never count as worse, whatever was measured.
        budget: In bytes, with room for the tokens to come.
        n_tokens: Of the text.
        bytes_per_token: By types: those that can be chosen.

    Raises:
        ValueError: There is nothing to choose from, or nothing fits.
    """
    found = []
    for types, of_token in bytes_per_token.items():
        share = min(1.0, (budget / of_token - ROOM) / n_tokens)
        if types in losses and share > 0:
            found.append(Choice(types, share, loss_at(losses[types], share)))
    if not found:
        least = min((bytes_per_token[types] for types in bytes_per_token if types in losses), default=None)
        if least is None:
            raise ValueError(f"nothing was measured of {', '.join(map(str, bytes_per_token))}; measured: {', '.join(map(str, losses))}")
        raise ValueError(
            f"a budget of {budget:,.0f} bytes has no room for entries of any type beside {ROOM} tokens to come; accepted: more than {least * ROOM:,.0f}"
        )
    best, *others = sorted(found, key=lambda choice: (choice.loss, -choice.share))
    return Choice(best.types, best.share, best.loss, tuple(others))


def loss_at(measured: Mapping[float, float], share: float) -> float:
    """A loss, from those at other shares: see choose()."""
    shares = sorted(measured)
    losses = [measured[at] for at in shares]
    for i in range(1, len(losses)):
        losses[i] = min(losses[i], losses[i - 1])
    if share >= shares[-1] or len(shares) == 1:
        return losses[-1]
    upper = next((i for i in range(1, len(shares)) if share <= shares[i]), len(shares) - 1)
    (a, b), (x, y) = shares[upper - 1 : upper + 1], losses[upper - 1 : upper + 1]
    return x + (y - x) * math.log(share / a) / math.log(b / a)


@dataclass(frozen=True)
class Table:
    """What was measured of a model.

    Attributes:
        model: Its file's name.
        fingerprint: Its.
        seen: With the question in view when the cache was compressed,
        unseen: and before anybody had asked.
    """

    model: str
    fingerprint: str
    seen: Losses
    unseen: Losses

    @classmethod
    def load(cls, path: Path) -> Table:
        """Raises ValueError if it is no such file; says why."""
        try:
            data = json.loads(path.read_text("utf-8"))
            return cls(str(data["model"]), str(data["fingerprint"]), _losses(data["seen"]), _losses(data["unseen"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no table of losses by types, as `laprox profile --types` makes one: {error!r}") from None

    def text(self) -> str:
        """Of its file."""
        data: dict[str, Any] = {"model": self.model, "fingerprint": self.fingerprint}
        for name, losses in (("seen", self.seen), ("unseen", self.unseen)):
            data[name] = {str(types): {f"{100 * share:g}%": loss for share, loss in sorted(of.items())} for types, of in losses.items()}
        return json.dumps(data, indent=1) + "\n"


def _losses(data: Any) -> Losses:
    found = {Types.parse(types): {_share(share): _loss(loss) for share, loss in of.items()} for types, of in data.items()}
    if not all(found.values()):
        raise ValueError("types without a loss")
    return found


def _share(text: str) -> float:
    share = float(text.removesuffix("%")) / 100
    if not (text.endswith("%") and 0 < share <= 1):
        raise ValueError(f"a share is {text!r}; accepted: above 0% and up to 100%")
    return share


def _loss(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"a loss is {value!r}; accepted: numbers from 0 on")
    return float(value)


def default_path() -> Path:
    """Of the table for models without one of their own."""
    return Path(__file__).with_name("qwen2.5-coder-0.5b" + FILE)


@cache
def default_table() -> Table:
    """For models without one of their own."""
    return Table.load(default_path())


def table_for(model: Path, fingerprint: str) -> Table:
    """The table beside a model, or else the default one.

    Raises:
        ValueError: The table beside it is broken, or another model's.
    """
    path = model.with_suffix(FILE)
    if not path.exists():
        return default_table()
    table = Table.load(path)
    if table.fingerprint != fingerprint:
        raise ValueError(f"{path} was made for another model, {table.model}; make one with `laprox profile --types`, or remove it")
    return table
