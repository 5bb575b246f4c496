"""The options that several commands share, named as llama.cpp names them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import llama_cpp
import typer

from laprox import KVConfig, templates
from laprox.cli.source import ModelSource
from laprox.config import OFF, policies

DEFAULT = KVConfig()


class CacheType(NamedTuple):
    """A type that cached keys and values can have."""

    ggml: int
    bytes_per_element: float


CACHE_TYPES = {
    "f32": CacheType(llama_cpp.GGML_TYPE_F32, 4.0),
    "f16": CacheType(llama_cpp.GGML_TYPE_F16, 2.0),
    "bf16": CacheType(30, 2.0),  # llama_cpp has no name for it
    "q8_0": CacheType(llama_cpp.GGML_TYPE_Q8_0, 34 / 32),
    "q4_0": CacheType(llama_cpp.GGML_TYPE_Q4_0, 18 / 32),
}


def cache_types(k: str, v: str) -> tuple[CacheType, CacheType]:
    """The values of --cache-type-k and --cache-type-v."""
    for option, name in (("--cache-type-k", k), ("--cache-type-v", v)):
        if name not in CACHE_TYPES:
            raise ValueError(f"{option} is {name!r}; accepted: {', '.join(CACHE_TYPES)}")
    return CACHE_TYPES[k], CACHE_TYPES[v]


def chat_template(text: str) -> str:
    """The value of --chat-template, as Jinja."""
    if text not in templates.NAMED and "{" not in text:
        raise ValueError(f"--chat-template is {text!r}; accepted: {', '.join(templates.NAMED)}, or a Jinja template")
    return templates.NAMED.get(text, text)


def regime(given: str, before_question: bool) -> str:
    """The value of --regime where a cache is compressed for one question or for none."""
    accepted = ("aware", "agnostic")
    if given not in accepted:
        raise ValueError(f"--regime is {given!r}; accepted: {', '.join(accepted)}")
    return "agnostic" if before_question else given


_kv = partial(typer.Option, rich_help_panel="KV cache")
_run = partial(typer.Option, rich_help_panel="Model")
_draw = partial(typer.Option, rich_help_panel="Answers")


Model = Annotated[ModelSource, typer.Argument(metavar="MODEL", help="A GGUF file, or a name of `laprox models`.", show_default=False)]

KVBudget = Annotated[
    str,
    _kv(
        "--kv-budget",
        help="What the KV cache may keep: a share of its entries (5%), tokens per KV head on average (2048), or bytes (512MiB).",
    ),
]
KVPolicy = Annotated[
    str,
    _kv(
        "--kv-policy",
        help=f"How the entries that stay are chosen: {', '.join(policies())}, or <scorer>:<allocator>; {OFF} = no compression.",
    ),
]
KVWindow = Annotated[int, _kv("--kv-window", help="The queries of the last N tokens of a prompt score the entries.")]
KVSink = Annotated[int, _kv("--kv-sink", help="The first N tokens always stay in the KV cache.")]
KVRecent = Annotated[int, _kv("--kv-recent", help="The last N tokens of a prompt always stay in the KV cache.")]
KVMinTokens = Annotated[int, _kv("--kv-min-tokens", help="Nothing is evicted from a prompt of at most N tokens.")]
KVPrefill = Annotated[
    str,
    _kv(
        "--kv-prefill",
        help="dense: the whole prompt is in the KV cache before entries are evicted; chunked: they are evicted whenever a small "
        "cache is full, which bounds its memory.",
    ),
]
KVProfile = Annotated[
    Path | None,
    _kv(
        "--kv-profile",
        help="Table of `laprox profile`, for --kv-policy lukv and the allocator profile; "
        "by default MODEL.kv-profile.npy beside the model.",
        show_default=False,
    ),
]
KVGates = Annotated[
    Path | None,
    _kv(
        "--kv-gates",
        help="Retention gates of `laprox train-gates` or `laprox convert-gates`, for the scorer retention; "
        "by default MODEL.kv-gates.gguf beside the model.",
        show_default=False,
    ),
]
KVFloor = Annotated[
    float,
    _kv(
        "--kv-floor",
        help="The share of the average budget that every KV head keeps, 0.0 to 1.0, with the allocators global and global-raw.",
    ),
]
CacheTypeK = Annotated[str, _kv("--cache-type-k", "-ctk", help=f"Data type of the cached keys: {', '.join(CACHE_TYPES)}.")]
CacheTypeV = Annotated[str, _kv("--cache-type-v", "-ctv", help=f"Data type of the cached values: {', '.join(CACHE_TYPES)}.")]

BeforeQuestion = Annotated[bool, typer.Option("--compress-before-question", hidden=True, help="The same as --regime agnostic.")]

ContextSize = Annotated[int, _run("--ctx-size", "-c", min=0, help="Size of the context in tokens; 0 = as large as needed.")]
Threads = Annotated[int, _run("--threads", "-t", min=0, help="Number of CPU threads; 0 = llama.cpp's choice.")]
GPULayers = Annotated[int, _run("--gpu-layers", "-ngl", min=-1, help="Number of layers to put on the GPU; -1 = all.")]
ChatTemplate = Annotated[
    str | None,
    _run(
        "--chat-template",
        help=f"Chat template instead of the model's: {', '.join(templates.NAMED)}, or one in Jinja.",
        show_default=False,
    ),
]
BatchSize = Annotated[int, _run("--batch-size", "-b", min=1, help="Number of tokens that are evaluated at once.")]
Verbose = Annotated[bool, _run("--verbose", "-v", help="Show llama.cpp's log.")]

Predict = Annotated[int, _draw("--predict", "-n", min=1, help="Length of the longest answer in tokens.")]
Temperature = Annotated[float, _draw("--temp", min=0.0, help="Temperature of sampling; 0 = always the likeliest token.")]
TopK = Annotated[int, _draw("--top-k", min=0, help="Sample from the K likeliest tokens; 0 = from all.")]
TopP = Annotated[
    float, _draw("--top-p", min=0.0, max=1.0, help="Sample from the likeliest tokens that together have the probability P.")
]
Seed = Annotated[int, _draw("--seed", "-s", min=-1, help="Seed of sampling; -1 = a new one each time.")]
