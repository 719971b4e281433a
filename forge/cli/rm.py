"""`forge rm`: remove a model from its cache."""

from __future__ import annotations

from typing import Annotated

import typer

from forge.cli import output


def command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name that `forge list` shows.")],
) -> None:
    """Remove a model from its cache. What broken downloads of it left goes, too."""
    from forge import hub

    freed = hub.remove(name)
    output.write(f"{output.printable(name)}: removed, {output.num_bytes(freed)} freed\n")
