"""`forge convert`: any model as one GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forge.cli import options, output
from forge.cli.about import about


def command(
    model: Annotated[
        str, typer.Argument(metavar="SRC", help="A GGUF file, a directory of safetensors or ONNX, or a model's name.")
    ],
    path: Annotated[Path, typer.Argument(metavar="DST", help="The file to write; it ends in .gguf.")],
    type: Annotated[
        str | None,
        typer.Option(
            "--type", metavar="TYPE", help="Type of the matrices: F32, F16, BF16, Q8_0, Q4_K_M, ... [default: theirs]"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: options.Json = False,
) -> None:
    """Write a model as one GGUF file that llama.cpp loads, too, with its tokenizer and all metadata."""
    import forge

    with output.ProgressDisplay() as progress:
        written = forge.convert(model, path, type=type, force=force, progress=progress)
    for note in written.notes:
        output.note(note)
    if as_json:
        output.write_json(about() | {"path": str(written.path), "bytes": written.bytes, "notes": list(written.notes)})
    else:
        output.write(f"{written.path}\n")
        output.status(output.num_bytes(written.bytes))
