"""`forge tune`: measure on this GPU which block sizes, rows and splits its kernels are fastest with, and keep them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forge.cli import options, output
from forge.cli.about import about
from forge.errors import DeviceError, ParameterError

if TYPE_CHECKING:
    from forge.tuning.store import Measured


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="The model to tune for: a name, a GGUF file, or hf:owner/repo[:QUANT]. [default: usual 1B and 8B]",
        ),
    ] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option("--kernel", metavar="NAME", help="Only this kernel; may be given several times."),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print what is in force and where it comes from.")] = False,
    reset: Annotated[bool, typer.Option("--reset", help="Remove what was measured on this kind of GPU.")] = False,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Find the fastest settings of the kernels on this GPU. It takes minutes, once, and keeps them in the cache.

    The choices are in force from the next start on. They may change the last bits of results: sums are made in
    another order. What is measured is kept at once, so that Ctrl-C loses nothing.
    """
    from forge.tuning import store
    from forge.tuning.table import KERNELS

    if show and reset:
        raise ParameterError("--show and --reset exclude each other: give one of them", parameter="show")
    gpu = _gpu(device)
    if unknown := next((name for name in kernel or () if name not in KERNELS), None):
        raise ParameterError(f"kernel must be one of {', '.join(KERNELS)}, not {unknown!r:.60}", parameter="kernel")
    if reset:
        removed = store.remove(gpu.arch)
        if as_json:
            output.write_json({**about(gpu.device), "arch": gpu.arch, "removed": str(removed) if removed else None})
        else:
            output.write(f"{removed} is removed\n" if removed else f"nothing is stored for {gpu.arch}\n")
    elif show:
        _show(gpu, as_json)
    else:
        _tune(gpu, options.resolve(model) if model else None, kernel or KERNELS, as_json)


def _gpu(device: str) -> Any:
    from forge.backend import explain, select
    from forge.backend.gpu import GPU

    found = select(device)
    if not isinstance(found, GPU):
        raise DeviceError(f"forge tune needs a GPU, and {found.device} is none: {explain()}")
    return found


def _tune(gpu: Any, model: Path | None, kernels: Iterable[str], as_json: bool) -> None:
    import forge
    from forge.devtools import autotune, workloads
    from forge.tuning import store
    from forge.tuning.table import KERNELS

    classes = {key: shapes for key, shapes in workloads.shapes_of(gpu, model).items() if key[0] in kernels}
    found: list[Measured] = []
    path = None
    with output.ProgressDisplay() as progress:
        for measured in autotune.tune(gpu, classes, progress):
            found.append(measured)
            path = store.save(gpu.arch, gpu.name, forge.__version__, [measured])
    if as_json:
        rows = [asdict(one) | {"default": KERNELS[one.kernel].row(gpu.arch, one.shape)} for one in found]
        _write_json(gpu, model, path, rows)
        return
    cells = [
        (one.kernel, _text(one.shape), _text(one.values), f"{one.default_us:.1f}", f"{one.us:.1f}", _gain(one))
        for one in found
    ]
    columns = ("kernel", "shapes up to", "fastest", "table's us", "us", "gain")
    output.write_table(gpu.device, columns, cells, right=columns[3:])
    output.status(f"{sum(one.us < one.default_us for one in found)} of {len(found)} are faster; kept in {path}")


def _show(gpu: Any, as_json: bool) -> None:
    """What was measured here comes first: it goes before the table."""
    from forge.tuning import store
    from forge.tuning.table import KERNELS

    stored = store.read(gpu.arch)
    rows = [
        (one.kernel, one.shape, one.values, stored.origin, f"{one.us:.1f} us, by the table {one.default_us:.1f} us")
        for one in stored.choices
        if one.key in gpu.tuning.tuned
    ]
    for name, spec in KERNELS.items():
        rows += [(name, when, values, "forge's table", spec.measured) for when, values in spec.rows_of(gpu.arch)]
    if as_json:
        named = [
            {"kernel": kernel, "shape": shape, "values": values, "from": f"{origin}: {more}"}
            for kernel, shape, values, origin, more in rows
        ]
        _write_json(gpu, None, stored.path if stored.choices else None, named)
        return
    cells = [(kernel, _text(shape), _text(values), origin) for kernel, shape, values, origin, _ in rows]
    output.write_table(f"{gpu.device}, the first row that fits", ("kernel", "shapes up to", "values", "from"), cells)
    for name, spec in KERNELS.items():
        output.write(f"\n{name}, forge's table: {spec.measured}\n")


def _write_json(gpu: Any, model: Path | None, path: Path | None, rows: list[dict[str, Any]]) -> None:
    where = str(path) if path else None
    output.write_json({**about(gpu.device, model), "arch": gpu.arch, "path": where, "choices": rows})


def _gain(one: Measured) -> str:
    return f"{1 - one.us / one.default_us:.0%}" if one.us < one.default_us else "none"


def _text(values: Mapping[str, Any]) -> str:
    from forge.tuning.spec import ANY

    shown = {name: "any" if value == ANY else value for name, value in values.items()}
    parts = [f"{name} {'|'.join(value) if isinstance(value, tuple) else value}" for name, value in shown.items()]
    return ", ".join(parts) or "any"
