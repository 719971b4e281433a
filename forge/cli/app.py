"""The command `forge` with all its commands."""

from __future__ import annotations

from typing import Annotated

import typer

from forge.cli import (
    bench,
    chat,
    convert,
    doctor,
    generate,
    inspect,
    kernels,
    list_,
    logits,
    perplexity,
    pull,
    rm,
    serve,
    tokenize,
    tune,
    usage,
    verify,
)

app = typer.Typer(
    cls=usage.Group,
    rich_markup_mode=None,  # rich's help panels would take 0.1 s
    context_settings={"help_option_names": ["-h", "--help"]},
)


_EVERYWHERE = "Every command takes --quiet (no notes or statistics) and --debug (tracebacks), too."


def _version(wanted: bool) -> None:
    if wanted:
        import forge

        typer.echo(f"forge {forge.__version__}")
        raise typer.Exit


@app.callback()
def forge(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Print the traceback of a failure. Works behind the command, too.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No notes, progress or statistics on stderr. Works behind the command, too.")
    ] = False,
) -> None:
    """LLM inference: text from GGUF models, on any machine."""


for module in (
    generate,
    chat,
    serve,
    tokenize,
    logits,
    perplexity,
    inspect,
    convert,
    pull,
    list_,
    rm,
    bench,
    verify,
    tune,
    doctor,
):
    name = module.__name__.rpartition(".")[2].removesuffix("_")
    app.command(name, cls=usage.Command, epilog=_EVERYWHERE)(module.command)
app.add_typer(kernels.app, name="kernels")
