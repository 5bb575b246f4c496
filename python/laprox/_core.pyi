"""The extension module: laprox.h and the selection functions of cpp/core, on NumPy arrays.

Models and contexts are passed as the integers of their addresses, as llama_cpp holds them. Whatever the engine refuses
raises LaproxError with its reason.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int32]

class LaproxError(RuntimeError): ...

# --- settings ---

DEFAULT_BUDGET: str
PREFILLS: tuple[str, ...]

class Params:
    def __init__(
        self,
        *,
        policy: str,
        budget: str,
        window: int,
        sink: int,
        recent: int,
        min_tokens: int,
        prefill: str,
        profile: str | None = None,
        gates: str | None = None,
        floor: float = 0.0,
    ) -> None: ...
    @property
    def policy(self) -> str: ...
    @property
    def budget(self) -> tuple[str, float]: ...
    @property
    def window(self) -> int: ...
    @property
    def sink(self) -> int: ...
    @property
    def recent(self) -> int: ...
    @property
    def min_tokens(self) -> int: ...
    @property
    def prefill(self) -> str: ...
    @property
    def profile(self) -> str | None: ...
    @property
    def gates(self) -> str | None: ...
    @property
    def floor(self) -> float: ...

def api_version() -> int: ...
def last_error() -> str: ...
def policies() -> list[str]: ...
def meanings() -> list[str]:
    """What each of policies() is: "<scorer>:<allocator>", or "nothing is evicted"."""

def scorers() -> list[str]: ...

def allocators() -> list[str]: ...
def parse_budget(text: str) -> tuple[str, float]:
    """("fraction" | "tokens" | "bytes", value)"""

def default_params() -> Params: ...
def model_check(model: int) -> None: ...
def model_set_params(model: int, params: Params | None) -> None: ...
def set_params(ctx: int, params: Params) -> None: ...
def get_params(ctx: int) -> Params: ...

# --- compression and statistics; these release the GIL ---

def compress(ctx: int, seq_id: int = 0) -> None: ...
def score(ctx: int, seq_id: int = 0) -> None: ...
def stats(ctx: int, seq_id: int = 0) -> dict[str, Any]: ...
def tail_begin(ctx: int, seq_id: int = 0) -> int:
    """The first position from which on every head holds everything; 0 if nothing was evicted."""

def set_scorer(ctx: int, scorer: Callable[[int, int, int, int, Positions], Floats | None] | None) -> None:
    """What scores under the policies "custom:<allocator>": scorer(ctx, seq_id, layer, head, positions) -> [n], or None
    to refuse. It is borrowed: the caller keeps it alive."""

# --- looking inside ---

def model_fingerprint(model: int) -> str:
    """16 hexadecimal digits, the same however the model is quantised."""

def layers(ctx: int) -> list[tuple[int, int]]:
    """(layer, KV heads) of each compressed layer."""

def kq_scale(ctx: int, layer: int) -> float: ...
def head_shape(ctx: int, layer: int) -> tuple[int, int, int]:
    """(query heads, size of a K row, size of a V row)"""

def positions(ctx: int, layer: int, head: int, seq_id: int = 0) -> Positions:
    """[n], ascending"""

def finished_scores(ctx: int, layer: int, head: int, seq_id: int = 0) -> Floats:
    """What entries are ranked by: pooled, and seen together with the layer's other heads where the scorer does so; NaN if protected."""

def scores(ctx: int, layer: int, head: int, seq_id: int = 0) -> Floats:
    """[n], aligned with positions()"""

def entries(ctx: int, layer: int, head: int, seq_id: int = 0) -> tuple[Floats, Floats]:
    """K [n, d_k] and V [n, d_v], aligned with positions()"""

def keys(ctx: int, layer: int, head: int, seq_id: int = 0) -> Floats: ...
def values(ctx: int, layer: int, head: int, seq_id: int = 0) -> Floats: ...
def queries(ctx: int, layer: int, seq_id: int = 0) -> tuple[Floats, Positions]:
    """[n, query heads, d_k], oldest first, and their positions [n]"""

# --- cpp/core ---

def budget_entries(budget: str, n_seen: int, n_pairs: int) -> int: ...
def normalise_layer(heads: Sequence[npt.ArrayLike]) -> list[Floats]: ...
def allocate(
    allocator: str,
    layer: npt.ArrayLike,
    head: npt.ArrayLike,
    pos: Sequence[npt.ArrayLike],
    score: Sequence[npt.ArrayLike],
    n_keep: int,
    *,
    second: Sequence[npt.ArrayLike] | None = None,
    n_protected: npt.ArrayLike | None = None,
    layer_preference: npt.ArrayLike | None = None,
    profile: npt.ArrayLike | None = None,
    n_seen: int = 0,
    floor: float = 0.0,
) -> list[npt.NDArray[np.uint32]]:
    """Indices of the surviving candidates of each head, ascending. Heads of a layer are neighbours."""

def isotonic_increasing(y: npt.ArrayLike) -> npt.NDArray[np.float64]: ...
def solve_profile(
    scores: Sequence[npt.ArrayLike], utility: Sequence[npt.ArrayLike], n_tokens: int, min_keep: int
) -> npt.NDArray[np.float64]:
    """[99, heads]: the share of each head's entries to evict, of n_tokens (protected ones are in no list)"""

def read_profile(path: str | os.PathLike[str]) -> tuple[npt.NDArray[np.float64], dict[str, str]]:
    """[99, layers, KV heads] and the notes behind the array"""

def plan_classes(
    n_kept: npt.ArrayLike, max_classes: int, block: int, slack: float = 0.05
) -> list[tuple[npt.NDArray[np.uint32], int]]:
    """(heads, rows stored for each of them) per length class."""

# --- what was built in ---

def llama_version() -> str: ...
def ggml_version() -> str: ...
def backends() -> list[tuple[str, list[str]]]:
    """(name, descriptions of its devices) of each backend."""
