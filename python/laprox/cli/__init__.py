"""The `laprox` command."""

from __future__ import annotations

import sys

import typer

from laprox import LaproxError
from laprox.cli import chat, compare, convert_gates, demo, eval, info, models, profile, serve, train_gates, view

app = typer.Typer(
    name="laprox",
    help="Long documents on a small KV cache: llama.cpp that keeps only the entries that matter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("chat")(chat.chat)
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
)(serve.command)


def main() -> None:
    """Exit status: 0, 1 for what can't be done (one line on stderr says why), 2 for a wrong command line."""
    try:
        app(prog_name="laprox")
    except (LaproxError, ValueError, OSError, RuntimeError, MemoryError) as error:
        print(f"laprox: {error or type(error).__name__}", file=sys.stderr)
        sys.exit(1)
