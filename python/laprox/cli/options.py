"""The options that several commands share, named as llama.cpp names them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from laprox import KVConfig, _core, templates
from laprox._upstream import MOST_THREADS, MOST_TOKENS
from laprox.cache_types import AUTO, Auto, CacheType
from laprox.cache_types import CACHE_TYPES as EVERY_TYPE
from laprox.cli.groups import signed
from laprox.cli.source import ModelSource
from laprox.config import OPTIONS, described, initial, to_params

INT32, UINT32 = (1 << 31) - 1, (1 << 32) - 1  # the largest that llama.cpp takes

CACHE_TYPES = {name: EVERY_TYPE[name] for name in ("f32", "f16", "bf16", "q8_0", "q4_0")}


def cache_types(k: str, v: str) -> tuple[CacheType, CacheType]:
    """The values of --cache-type-k and --cache-type-v."""
    for option, name in (("--cache-type-k", k), ("--cache-type-v", v)):
        if name not in CACHE_TYPES:
            raise ValueError(f"{option} is {name!r}; accepted: {', '.join(CACHE_TYPES)}")
    return CACHE_TYPES[k], CACHE_TYPES[v]


def budgeted_types(k: str, v: str, kv: KVConfig) -> tuple[int | Auto, int | Auto]:
    """The same, as llama.cpp numbers them, where a budget may choose them: "auto"."""
    for option, name in (("--cache-type-k", k), ("--cache-type-v", v)):
        if name == AUTO and (not kv.on or _core.parse_budget(str(kv.budget))[0] != "bytes"):
            here = f"--kv-budget {kv.budget}" if kv.on else "--kv-policy off"
            raise ValueError(f"{option} auto divides a budget in bytes, and here is {here}; accepted with it: --kv-budget 64MiB, say")
        if name not in (*CACHE_TYPES, AUTO):
            raise ValueError(f"{option} is {name!r}; accepted: {', '.join(CACHE_TYPES)}, {AUTO}")
    types = [Auto() if name == AUTO else CACHE_TYPES[name].ggml for name in (k, v)]
    return types[0], types[1]


OTHER_TEMPLATE = "--chat-template chatml, say, takes another"


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


def takes_kv(
    only: Collection[str] | None = None, without: Collection[str] = (), **others: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose parameter `kv` is a KVConfig: on the command line, an option for each setting.

    Args:
        only: The settings that have an option; None: all but those of `without`.
        without: Settings that have none.
        others: Values other than KVConfig's: where no option is given, and of settings that have none.
    """
    names = [name for name in OPTIONS if (only is None or name in only) and name not in without]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        accepted: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            options = [_kv_option(name, others.get(name, initial(name)), parameter.kind) for name in names]
            accepted += options if parameter.name == "kv" else [parameter]

        def run(*args: Any, **values: Any) -> None:
            values = dict(zip((parameter.name for parameter in accepted), args)) | values
            settings = others | {name: values.pop(f"kv_{name}") for name in names if f"kv_{name}" in values}
            to_params(settings, "--kv-").check()  # says what is wrong by the names that were typed
            command(**values, kv=KVConfig(**settings))

        return signed(run, command, accepted)

    return decorate


def typed(context: typer.Context) -> list[str]:
    """The options of settings that stand on the command line, whatever their values."""
    sources = {name: context.get_parameter_source(f"kv_{name}") for name in OPTIONS}
    return [_flag(name) for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def for_document(context: typer.Context, kv: KVConfig) -> KVConfig | None:
    """The settings that were typed, where a document that was read is asked about; None: it has its own.

    Raises:
        BadParameter: They wouldn't be followed: it is as it was read unless a policy is named.
    """
    given = typed(context)
    if given and _flag("policy") not in given:
        raise typer.BadParameter(f"{given[0]} does nothing for a document that was read, which stays as it is; accepted with it: --kv-policy laprox, say, which evicts more")
    return kv if given else None


def _flag(name: str) -> str:
    return f"--kv-{name.replace('_', '-')}"


def _kv_option(name: str, default: Any, kind: Any) -> inspect.Parameter:
    option = OPTIONS[name]
    is_path = option.kind == "path"
    of = {"integer": int, "number": float, "path": Path | None}.get(option.kind, str)
    text = described(name) + (f" Accepted: {option.accepted}." if option.kind == "policy" else "")
    flag = _kv(_flag(name), metavar=option.value, help=text, show_default=not is_path)
    return inspect.Parameter(f"kv_{name}", kind, annotation=Annotated[of, flag], default=default)


_kv = partial(typer.Option, rich_help_panel="KV cache")
_run = partial(typer.Option, rich_help_panel="Model")
_draw = partial(typer.Option, rich_help_panel="Answers")


_model = typer.Argument(metavar="MODEL", help="A GGUF file, or a name of `laprox models`.", show_default=False)

Model = Annotated[ModelSource, _model]
ModelIfNeeded = Annotated[ModelSource | None, _model]

CacheTypeK = Annotated[str, _kv("--cache-type-k", "-ctk", help=f"Data type of the cached keys: {', '.join(CACHE_TYPES)}.")]
CacheTypeV = Annotated[str, _kv("--cache-type-v", "-ctv", help=f"Data type of the cached values: {', '.join(CACHE_TYPES)}.")]

BudgetedTypeK = Annotated[
    str, _kv("--cache-type-k", "-ctk", help=f"Data type of the cached keys: {', '.join(CACHE_TYPES)}, or {AUTO}: what loses least at a --kv-budget in bytes.")
]
BudgetedTypeV = Annotated[str, _kv("--cache-type-v", "-ctv", help=f"Data type of the cached values: {', '.join(CACHE_TYPES)}, or {AUTO}.")]

BeforeQuestion = Annotated[bool, typer.Option("--compress-before-question", hidden=True, help="The same as --regime agnostic.")]

ContextSize = Annotated[int, _run("--ctx-size", "-c", min=0, max=MOST_TOKENS, help="Size of the context in tokens; 0 = as large as needed.")]
Threads = Annotated[int, _run("--threads", "-t", min=0, max=MOST_THREADS, help="Number of CPU threads; 0 = llama.cpp's choice.")]
GPULayers = Annotated[int, _run("--gpu-layers", "-ngl", min=-1, max=INT32, help="Number of layers to put on the GPU; -1 = all.")]
ChatTemplate = Annotated[
    str | None,
    _run(
        "--chat-template",
        help=f"Chat template instead of the model's: {', '.join(templates.NAMED)}, or one in Jinja.",
        show_default=False,
    ),
]
BatchSize = Annotated[int, _run("--batch-size", "-b", min=1, max=MOST_TOKENS, help="Number of tokens that are evaluated at once.")]
Verbose = Annotated[bool, _run("--verbose", "-v", help="Show llama.cpp's log.")]

Predict = Annotated[int, _draw("--predict", "-n", min=1, max=MOST_TOKENS, help="Length of the longest answer in tokens.")]
Temperature = Annotated[float, _draw("--temp", min=0.0, help="Temperature of sampling; 0 = always the likeliest token.")]
TopK = Annotated[int, _draw("--top-k", min=0, max=INT32, help="Sample from the K likeliest tokens; 0 = from all.")]
TopP = Annotated[
    float, _draw("--top-p", min=0.0, max=1.0, help="Sample from the likeliest tokens that together have the probability P.")
]
Seed = Annotated[int, _draw("--seed", "-s", min=-1, max=UINT32, help="Seed of sampling; -1 = a new one each time.")]
