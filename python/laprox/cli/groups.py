"""Options that belong together, as one parameter of a command: a dataclass whose fields are the options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, get_type_hints


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters that are such dataclasses are taken apart into their fields."""
    parameters = dict(inspect.signature(command, eval_str=True).parameters)
    groups = {name: p.annotation for name, p in parameters.items() if inspect.isclass(p.annotation) and is_dataclass(p.annotation)}
    accepted: list[inspect.Parameter] = []
    for name, parameter in parameters.items():
        accepted += _options(groups[name]) if name in groups else [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]

    def run(*args: Any, **values: Any) -> None:
        values = dict(zip([parameter.name for parameter in accepted], args)) | values
        for name, group in groups.items():
            values[name] = group(**{f.name: values.pop(f.name) for f in fields(group) if f.name in values})
        command(**values)

    return signed(run, command, accepted)


def signed(run: Callable[..., None], command: Callable[..., None], accepted: list[inspect.Parameter]) -> Callable[..., None]:
    """`run` under the name of a command, with these parameters, as typer looks at it."""
    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    run.__signature__ = inspect.Signature(accepted)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in accepted}
    return run


def _options(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[f.name], default=_default(f)) for f in fields(group)
    ]


def _default(field: Field[Any]) -> Any:
    return inspect.Parameter.empty if field.default is MISSING else field.default
