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
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="What the model launches with `forge serve --deterministic`.")
]
_STATES: tuple[State, ...] = ("valid", "stale", "corrupt", "foreign")


@app.command("build", cls=usage.Command)
def build(
    model: options.Model = options.DEFAULT_MODEL,
    every: Annotated[
        bool, typer.Option("--all", help="What the cases of every op launch, instead of a model.")
    ] = False,
    arch: Annotated[
        list[str] | None,
        typer.Option(
            "--arch", metavar="GFX", help="A GPU, such as gfx1100; may be given several times. [default: the one here]"
        ),
    ] = None,
    deterministic: Deterministic = False,
    out: Out = None,
    as_json: options.Json = False,
) -> None:
    """Compile what a model launches, with hipcc or clang, unless it is there.

    On another machine, set FORGE_KERNELS to a copy of the directory. What is launched is recorded: it needs no GPU, and
    of the model's file only the header.
    """
    from forge.backend import kernel_cache
    from forge.devtools import variants

    archs = [kernel_cache.check_arch(name) for name in arch or [_arch_here()]]
    store = _store(out)
    path = None if every else options.resolve(model)
    wanted = {
        name: variants.model_variants(path, name, is_deterministic=deterministic)
        if path
        else variants.case_variants(name)
        for name in archs
    }
    with output.ProgressDisplay() as progress:
        results = kernel_cache.build(wanted, store, progress)
    if as_json:
        described = [result._asdict() | {"directory": str(result.directory)} for result in results]
        output.write_json({**about(model=path), "directory": str(store), "archs": described})
        return
    for result in results:
        there = f"{result.present} were there" if result.present else "none were there"
        size = output.num_bytes(result.num_bytes)
        output.write(f"{result.arch}: {result.built} built, {there}; {size} in {result.directory}\n")


@app.command("list", cls=usage.Command)
def list_stores(
    model: Annotated[
        str | None, typer.Option("-m", "--model", metavar="MODEL", help="Also count what is missing for this model.")
    ] = None,
    deterministic: Deterministic = False,
    out: Out = None,
    as_json: options.Json = False,
) -> None:
    """Check the prebuilt kernels for each GPU: how many are valid, or of no use."""
    from forge.backend import kernel_cache
    from forge.devtools.variants import model_variants

    path = options.resolve(model) if model else None
    rows: list[dict[str, Any]] = []
    for store in [_store(out)] if out else kernel_cache.stores():
        for arch, (counts, num_bytes) in kernel_cache.survey(store).items():
            row = {"arch": arch, "directory": str(store / arch), "num_bytes": num_bytes}
            if path:
                wanted = model_variants(path, arch, is_deterministic=deterministic)
                row["missing"] = len(kernel_cache.missing(wanted, arch, [store]))
            rows.append(row | {state: counts[state] for state in _STATES})
    if as_json:
        output.write_json({**about(model=path), "archs": rows})
        return
    states = [*_STATES, *(["missing"] if path else [])]
    cells = [
        (row["arch"], *(row[state] for state in states), output.num_bytes(row["num_bytes"]), row["directory"])
        for row in rows
    ]
    output.write_table("prebuilt kernels", ("GPU", *states, "size", "directory"), cells, right=(*states, "size"))
    if not rows:
        output.note("there are none: run `forge kernels build --arch GFX`")
    elif any(row[state] for row in rows for state in _STATES[1:]):
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
