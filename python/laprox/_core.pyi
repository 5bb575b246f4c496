"""The extension module: laprox.h and the selection functions of cpp/core, on NumPy arrays.

Models and contexts are passed as the integers of their addresses, as llama_cpp holds them. Whatever the engine refuses
raises LaproxError with its reason.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int32]

class LaproxError(RuntimeError): ...

# --- settings ---

class Option:
    """A setting that there is.

    Attributes:
        name: "min_tokens".
        kind: "policy", "budget", "integer", "number", "choice" or "path".
        initial: Its value where none is given, as text; of a path "", the file beside the model.
        accepted: "an integer from 1 to 1024".
        value: Stands for the value in `help` and in usage lines.
        help: What it does.
    """

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def initial(self) -> str: ...
    @property
    def accepted(self) -> str: ...
    @property
    def value(self) -> str: ...
    @property
    def help(self) -> str: ...

def options() -> list[Option]: ...

class Params:
    """A text for each setting. What isn't accepted raises ValueError with its name, what was given and what is accepted."""

    def __init__(self, before_names: str = "") -> None: ...
    def set(self, name: str, text: str) -> None: ...
    def set_custom(self, allocator: str) -> None:
        """The policy custom:<allocator>: a scorer that set_scorer() gives."""

    def get(self, name: str) -> str: ...
    def check(self) -> None:
        """Whether they go together."""

def api_version() -> int: ...
def last_error() -> str: ...
def policies() -> list[str]: ...
def meanings() -> list[str]:
    """What each of policies() is: "<scorer>:<allocator>", or "nothing is evicted"."""

def policy_probes(policy: str) -> bool:
    """Whether it scores by the latest queries, so that those of a probe can stand for them."""

def scorers() -> list[str]: ...

def allocators() -> list[str]: ...
def model_check(model: int) -> None: ...
def model_set_params(model: int, params: Params | None) -> None: ...
def set_params(ctx: int, params: Params) -> None: ...
def get_params(ctx: int) -> Params: ...

# --- compression and statistics ---
# Long calls release the GIL. Meanwhile, what llama.cpp logs waits, and what a signal raises is raised by the call.

class Meanwhile:
    """`with Meanwhile():` the same for calls of llama.cpp that aren't made here."""

    def __init__(self) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *exc_info: object) -> None: ...

def compress(ctx: int, seq_id: int = 0) -> None: ...
def probe(ctx: int, n_text: int, n_prefix: int, first: int, last: int, every: int = 0, stride: int = 0, seq_id: int = 0) -> None:
    """The tokens at n_text and behind score positions [first, last), and the prefix, of the text before them.

    `every`: the queries of every so many-th of these tokens are kept for a refit; 0: none. `stride`: only every so many-th of
    these tokens scores, if it is more than 1. See laprox_probe()."""

class Found:
    """What a probe found."""

def probe_found(ctx: int, seq_id: int = 0) -> Found:
    """A copy of it so far, which can outlive the context."""

def probe_again(ctx: int, found: Found, seq_id: int = 0) -> None:
    """The sequence holds the same text again, whole; that it is the same is for the caller to know."""

def prompt_done(ctx: int, n_again: int, again: int | None = None, seq_id: int = 0) -> int | None:
    """Compress or recall, if it is time. The first position that is to be evaluated again; None: none.

    `again`: what the last call for this prompt returned."""

def score(ctx: int, seq_id: int = 0) -> None: ...
def stats(ctx: int, seq_id: int = 0) -> dict[str, Any]: ...
def compressed_for(ctx: int, seq_id: int = 0) -> int:
    """Positions there were when entries were last chosen; 0: all are held, or can come back."""

def mark(ctx: int, seq_id: int = 0) -> None:
    """What is evaluated from now on can be taken back, whatever the layers."""

def may_protect(ctx: int, n_tokens: int, budget_bytes: float) -> bool:
    """Whether what a prompt says of functions may be protected, so many tokens of it, beside a budget of so many bytes."""

def set_archive_in_states(ctx: int, on: bool) -> None: ...
def tail_begin(ctx: int, seq_id: int = 0) -> int:
    """The first position from which on every head holds everything; 0 if nothing was evicted."""

def set_scorer(ctx: int, scorer: Callable[[int, int, int, int, Positions], Floats | None] | None) -> None:
    """What scores under the policies "custom:<allocator>": scorer(ctx, seq_id, layer, head, positions) -> [n], or None
    to refuse. It is borrowed: the caller keeps it alive."""

# --- documents ---

class Document:
    """What a sequence holds, in a file that was checked and is in memory now."""

    def __init__(self, path: str | bytes) -> None: ...
    def get(self, key: str) -> str | None: ...
    def tokens(self) -> list[int]: ...
    def load(self, ctx: int, seq_id: int = 0) -> None:
        """The sequence then holds it, and only it."""

def document_save(ctx: int, path: str | bytes, tokens: Sequence[int], texts: dict[str, str], seq_id: int = 0) -> None:
    """What the sequence holds, whose tokens these are, in a file. Refusals don't repeat the path."""

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

def parse_budget(text: str) -> tuple[str, float]:
    """("fraction" | "tokens" | "bytes", value)"""

def find_inserted(text: bytes, without: bytes) -> list[tuple[int, int]]:
    """Where `text` has more than `without`: first byte and first byte behind, ascending; nothing where `without` has more, too."""

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

def profile_save(model: int, path: bytes, table: npt.ArrayLike, texts: dict[str, str]) -> None:
    """[99, layers, KV heads] and texts about it, as a file of this model; the path as os.fsencode gives it"""

def plan_classes(
    n_kept: npt.ArrayLike, max_classes: int, block: int, slack: float = 0.05
) -> list[tuple[npt.NDArray[np.uint32], int]]:
    """(heads, rows stored for each of them) per length class."""

# --- what was built in ---

def llama_version() -> str: ...
def ggml_version() -> str: ...
def load_backends(folder: str) -> int:
    """Load backends that are modules, the best for this machine, from `folder`, unless there are any. How many there are now."""
def backends() -> list[tuple[str, list[str]]]:
    """(name, descriptions of its devices) of each backend."""
