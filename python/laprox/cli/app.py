"""The commands of `laprox`."""

from __future__ import annotations

from typing import Annotated

import typer

from laprox.cli import ask, chat, compare, convert_gates, demo, eval, info, models, profile, read, serve, train_gates, version, view

app = typer.Typer(
    name="laprox",
    help="Long documents on a small KV cache: llama.cpp that keeps only the entries that matter.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _laprox(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=version.show, is_eager=True, help="Show the versions and the backends that are built in."
        ),
    ] = False,
) -> None:
    pass


def _serve(context: typer.Context) -> None:
    """Start llama-server: all of its options, and --kv-budget, --kv-policy, ... (laprox serve --help)."""
    serve.serve(context.args)


app.command("chat")(chat.chat)
app.command("read")(read.read)
app.command("ask")(ask.ask)
app.command("info")(info.info)
app.command("demo")(demo.demo)
app.command("compare")(compare.compare)
app.command("eval")(eval.evaluate)
app.command("view")(view.view)
app.command("profile")(profile.profile)
app.command("models")(models.models)
app.command("convert-gates")(convert_gates.convert_gates)
app.command("train-gates")(train_gates.train_gates)
app.command(
    "serve",
    add_help_option=False,  # llama-server's own
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(_serve)
