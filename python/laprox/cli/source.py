"""Which model a command is about: a GGUF file, a known name, or a Hugging Face repository."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from laprox import hub
from laprox.cli import downloading
from laprox.cli.groups import grouped, signed

REPO, FILE = "hf_repo", "hf_file"
NO_MODEL = "name a model: MODEL (a GGUF file, or a name of `laprox models`), or -hf USER/MODEL"

HfRepo = Annotated[
    str | None,
    typer.Option(
        "--hf-repo", "-hf", "-hfr", metavar="USER/MODEL[:QUANT]", rich_help_panel="Model", show_default=False,
        help="Instead of MODEL: a GGUF of a Hugging Face repository; without QUANT Q4_K_M, if there is one.",
    ),
]  # fmt: skip
HfFile = Annotated[
    str | None,
    typer.Option(
        "--hf-file", "-hff", metavar="FILE", rich_help_panel="Model", show_default=False,
        help="A file of that repository; overrides QUANT.",
    ),
]  # fmt: skip


@dataclass(frozen=True)
class ModelSource:
    """Where a model is to come from. Nothing is downloaded before `get`."""

    given: str
    """MODEL, or what -hf says."""
    from_repository: bool = False
    file: str | None = None

    @property
    def here(self) -> Path | None:
        """The file, if it is one of this machine; of a repository nobody asks before it is downloaded."""
        return None if self.from_repository else hub.find(self.given) if hub.is_known(self.given) else Path(self.given)

    def get(self) -> Path:
        """The file, downloaded if it isn't here. Raises OSError, DownloadError or ValueError, each with a line that says why."""
        if self.from_repository:
            return downloading.fetch_from_repository(self.given, self.file)
        if hub.is_known(self.given):
            return downloading.fetch(self.given)
        return Path(self.given)


def check_model(given: str) -> None:
    """Raises ValueError if it is neither a file nor a known model."""
    if Path(given).exists() or given in hub.MODELS:
        return
    if given.lower().endswith(".gguf") or os.sep in given and given.count("/") != 1:
        raise ValueError(f"{given}: no such file")
    if given.count("/") == 1:
        raise ValueError(f"{given}: no such file (-hf {given} takes it from Hugging Face)")
    try:
        hub.find(given)
    except hub.NotKnown as error:
        raise ValueError(f"{given}: no such file, and {error}") from None


def takes_model(rest: str | None = None, needed: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose parameter `model` is MODEL or -hf, exactly one of both, as a ModelSource.

    Args:
        rest: Its parameter of positional arguments after MODEL, if it has one: with -hf they begin where MODEL would be.
        needed: Otherwise it may be neither, and `model` None.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        command = grouped(command)
        parameters = dict(inspect.signature(command, eval_str=True).parameters)
        rest_is_needed = rest is not None and parameters[rest].default is inspect.Parameter.empty

        def run(*args: Any, **values: Any) -> None:
            values = dict(zip(parameters, args)) | values  # as typer calls it, all by name
            model, repo, file = values.pop("model"), values.pop(REPO, None), values.pop(FILE, None)
            model = None if model is None else os.fspath(model)
            following = list(values.get(rest) or []) if rest else []
            if repo is not None and model is not None and rest is not None and not _is_model(model):
                following.insert(0, Path(model))
                model = None
            values["model"] = find_source(model, repo, file) if needed or (model, repo, file) != (None, None, None) else None
            if rest is not None:
                if rest_is_needed and not following:
                    raise typer.BadParameter("name a document, after the model")
                values[rest] = following or None
            command(**values)

        accepted = [_as_option(parameter, rest) for parameter in parameters.values()]
        accepted += [_keyword(REPO, HfRepo), _keyword(FILE, HfFile)]
        return signed(run, command, accepted)

    return decorate


def _is_model(given: str) -> bool:
    return given.lower().endswith(".gguf") or hub.is_known(given)


def find_source(model: str | None, repo: str | None, file: str | None) -> ModelSource:
    """The model that MODEL, -hf and -hff name.

    Raises:
        BadParameter: None is named, or two.
        ValueError: It is neither a file, a known model, nor a repository's name.
    """
    if not model and repo is None:
        raise typer.BadParameter(NO_MODEL)
    if model is not None and repo is not None:
        raise typer.BadParameter(f"two models are named, MODEL {model} and -hf {repo}: give one")
    if repo is None:
        if file is not None:
            raise typer.BadParameter(f"--hf-file {file} needs the repository, too: -hf USER/MODEL")
        assert model is not None
        check_model(model)
        return ModelSource(model)
    hub.split_repository(repo)
    return ModelSource(repo, True, file)


def _as_option(parameter: inspect.Parameter, rest: str | None) -> inspect.Parameter:
    # Keyword-only, so that those with and without a default may stand in any order.
    parameter = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
    if parameter.name == "model":
        _, argument = get_args(parameter.annotation)
        return parameter.replace(annotation=Annotated[str | None, argument], default=None)
    if parameter.name == rest and parameter.default is inspect.Parameter.empty:
        kind, argument = get_args(parameter.annotation)
        return parameter.replace(annotation=Annotated[kind | None, argument], default=None)
    return parameter


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=None)
