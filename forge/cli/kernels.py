"""`forge kernels`: compile the kernels for AMD GPUs ahead of time, and look at what there is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forge.cli import options, output, usage
from forge.cli.about import about
from forge.errors import ForgeError, ParameterError

if TYPE_CHECKING:
    from forge.backend.kernel_cache import State

app = typer.Typer(
    cls=usage.Group,
    rich_markup_mode=None,
    help="Build kernels for AMD GPUs ahead of time, and list them.",
    subcommand_metavar="COMMAND",
)

Out = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", help="Where they lie. [default: FORGE_KERNELS, else kernels/ in the cache directory]"
    ),
]
_UNUSABLE: tuple[State, ...] = ("stale", "corrupt", "foreign")


@app.command("build", cls=usage.Command)
def build(
    arch: Annotated[
        list[str] | None,
        typer.Option(
            "--arch", metavar="GFX", help="A GPU, such as gfx1100; may be given several times. [default: the one here]"
        ),
    ] = None,
    out: Out = None,
    as_json: options.Json = False,
) -> None:
    """Compile what supported models launch, with hipcc or clang, unless it is there.

    On another machine, set FORGE_KERNELS to a copy of the directory.
    """
    from forge.backend import kernel_cache
    from forge.devtools.variants import model_variants

    store = _store(out)
    with output.Progress() as progress:
        results = kernel_cache.build(model_variants(), arch or [_arch_here()], store, progress)
    if as_json:
        output.write_json({**_about(), "directory": str(store), "archs": [_described(r._asdict()) for r in results]})
        return
    for result in results:
        there = f"{result.present} were there" if result.present else "none were there"
        size = output.num_bytes(result.num_bytes)
        output.write(f"{result.arch}: {result.built} built, {there}; {size} in {result.directory}\n")


@app.command("list", cls=usage.Command)
def list_stores(out: Out = None, as_json: options.Json = False) -> None:
    """Check the prebuilt kernels for each GPU: how many are valid, missing, or of no use."""
    from forge.backend import kernel_cache
    from forge.devtools.variants import model_variants

    wanted = model_variants()
    rows: list[dict[str, Any]] = [
        {"arch": arch, "directory": store / arch, "num_bytes": num_bytes}
        | {state: counts[state] for state in ("valid", "missing", *_UNUSABLE)}
        for store in ([_store(out)] if out else kernel_cache.stores())
        for arch, (counts, num_bytes) in kernel_cache.survey(store, wanted).items()
    ]
    if as_json:
        output.write_json({**_about(), "archs": [_described(row) for row in rows]})
        return
    columns = ("GPU", "valid", "missing", *_UNUSABLE, "size", "directory")
    cells = [
        (
            *(row["arch"], row["valid"], row["missing"], *(row[state] for state in _UNUSABLE)),
            *(output.num_bytes(row["num_bytes"]), row["directory"]),
        )
        for row in rows
    ]
    output.write_table("prebuilt kernels", columns, cells, right=columns[1:7])
    if not rows:
        output.note("there are none: run `forge kernels build --arch GFX`")
    elif any(row[state] for row in rows for state in _UNUSABLE):
        output.note("stale, corrupt and foreign ones are not used: `forge kernels build --arch GFX` replaces them")


def _store(out: Path | None) -> Path:
    from forge.backend import kernel_cache

    if out is None:
        return kernel_cache.stores()[0]
    try:
        return Path(os.path.abspath(out.expanduser()))
    except (OSError, RuntimeError) as error:  # no working directory, or no home
        raise ForgeError(f"{output.printable(str(out))}: {error}: give --out an absolute path") from None


def _arch_here() -> str:
    from forge.backend import explain, select

    arch = select("auto").arch
    if not arch.startswith("gfx"):
        message = f"arch: there is no AMD GPU here ({explain()})"
        raise ParameterError(message, parameter="arch", hint="name one, such as arch=gfx1100")
    return arch


def _about() -> dict[str, Any]:
    from forge.backend import select

    return about(select("cpu").device)  # which compiles, and looks


def _described(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"directory": str(row["directory"])}
