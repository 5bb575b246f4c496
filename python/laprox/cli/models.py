"""`laprox models`: the models that laprox knows by name, and those that are here."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from laprox import hub
from laprox.cli import downloading
from laprox.cli.show import notes, size
from laprox.cli.streams import print_json


def models(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Download this one and print its path.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the file again and compare its sha256; without NAME, of all that are here.")
    ] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Delete it from this machine.")] = False,
) -> None:
    """List the models that laprox knows by name; NAME downloads one. Such a name works wherever a MODEL is asked for."""
    if verify and remove:
        raise typer.BadParameter("--verify and --remove exclude each other")
    if remove:
        if name is None:
            raise typer.BadParameter("--remove needs a NAME")
        n_bytes = hub.remove(name)
        notes.print(f"{name}: {size(n_bytes)} deleted." if n_bytes else f"{name} wasn't here.", markup=False)
    elif verify:
        _verify([name] if name else [known for known in hub.MODELS if hub.path_of(known).exists()])
    elif name is None:
        _list(as_json)
    else:
        path = downloading.fetch(name)
        if as_json:
            print_json(_facts(hub.MODELS[name]))
        else:
            print(path)


def _verify(names: list[str]) -> None:
    if not names:
        notes.print("No model is here.")
    wrong = []
    for name in names:
        if downloading.verify(name):
            notes.print(f"{name}: as it should be.", markup=False)
        else:
            wrong.append(name)
    if wrong:
        raise ValueError(f"changed since or damaged: {', '.join(wrong)}; `laprox models {wrong[0]}` downloads it again")


def _facts(model: hub.KnownModel) -> dict[str, Any]:
    path = hub.find(model.name)
    return {
        "name": model.name,
        "what": model.what,
        "licence": model.licence,
        "bytes": model.n_bytes,
        "sha256": model.sha256,
        "repository": model.repository and model.repository.repo,
        "path": path and str(path),
    }


def _list(as_json: bool) -> None:
    rows = [_facts(model) for model in hub.MODELS.values()]
    if as_json:
        print_json(rows)
        return
    table = Table("name", "size", "licence", "here", "what", box=None, pad_edge=False)
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for row in rows:
        table.add_row(row["name"], f"{row['bytes'] / 1e6:,.0f} MB", row["licence"], "yes" if row["path"] else "no", row["what"])
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(f"\nThey are kept in {hub.cache_folder() / 'models'}.", soft_wrap=True)
