"""`forge pull`: fetch a model into the cache."""

from __future__ import annotations

from typing import Annotated

import typer

from forge.cli import output


def command(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="smollm2, gemma3-270m, hf:owner/repo[@revision][:QUANT], the same with /file.gguf or /file.onnx, or "
            "a Hub address.",
        ),
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Check the file that is there, and fetch it again if it is damaged.")
    ] = False,
) -> None:
    """Fetch a model, unless it is there, and print its path."""
    from forge import hub

    with output.ProgressDisplay() as progress:
        path = hub.pull(name, progress=progress, force=force)
    output.write(f"{path}\n")
