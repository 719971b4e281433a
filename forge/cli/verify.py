"""`forge verify`: do the ops compute what they should, on this machine?"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from forge.cli import options, output
from forge.cli.about import about

if TYPE_CHECKING:
    from forge.devtools.verify import CaseError


def command(device: options.Device = "auto", as_json: options.Json = False) -> None:
    """Compare every op on a device with its reference. References compute in float64."""
    from forge.backend import explain, rocm, select
    from forge.devtools import verify

    backend = select(device)
    if device == "auto" and not backend.arch and rocm.installed_cupy():  # whoever installed it expects a GPU
        output.note(f"device: {backend.device}; auto: {explain()}")
    errors: dict[str, list[verify.CaseError]] = {}
    with output.ProgressDisplay() as progress:
        for error in verify.verify(backend, progress):
            errors.setdefault(error.op, []).append(error)
    failed = [error for cases in errors.values() for error in cases if not error.passed]
    if as_json:
        output.write_json(
            {
                **about(backend.device),
                "passed": not failed,
                "cases": [{**asdict(e), "passed": e.passed} for cases in errors.values() for e in cases],
            }
        )
    else:
        rows = [
            (
                op,
                len(cases),
                f"{max(e.max_abs for e in cases):.2g}",
                f"{max(e.share for e in cases):.1%}",
                _result(cases),
            )
            for op, cases in errors.items()
        ]
        columns = ("op", "cases", "largest error", "of allowed", "result")
        output.write_table(f"{backend.device}, against float64", columns, rows, right=columns[1:4])
    if failed:
        output.error(
            f"{len(failed)} of {output.count(sum(map(len, errors.values())), 'case')} failed on {backend.device}"
        )
        raise typer.Exit(1)


def _result(cases: list[CaseError]) -> str:
    failed = [f"{e.case} ({e.fault})" if e.fault else e.case for e in cases if not e.passed]
    return f"FAILED: {', '.join(failed)}" if failed else "ok"
