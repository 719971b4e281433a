"""`forge verify`: do the ops compute what they should, on this machine?"""

from __future__ import annotations

import typer

from forge.cli import options, output


def command(device: options.Device = "auto", as_json: options.Json = False) -> None:
    """Run every op's cases on a device and compare them with the references in float64."""
    from forge import verify
    from forge.backend import select

    backend = select(device)
    errors: dict[str, list[verify.CaseError]] = {}
    for error in verify.verify(backend):
        errors.setdefault(error.op, []).append(error)
    failed = [error for cases in errors.values() for error in cases if not error.passed]
    if as_json:
        output.write_json(
            {
                "device": backend.device,
                "passed": not failed,
                "cases": [
                    {
                        "op": e.op,
                        "case": e.case,
                        "max_abs": e.max_abs,
                        "share": e.share,
                        "fault": e.fault,
                        "passed": e.passed,
                    }
                    for cases in errors.values()
                    for e in cases
                ],
            }
        )
    else:
        rows = [
            (
                op,
                len(cases),
                f"{max(e.max_abs for e in cases):.2g}",
                f"{max(e.share for e in cases):.1%}",
                "ok"
                if all(e.passed for e in cases)
                else "FAILED: " + ", ".join(e.case + (f" ({e.fault})" * bool(e.fault)) for e in cases if not e.passed),
            )
            for op, cases in errors.items()
        ]
        columns = ("op", "cases", "largest error", "of allowed", "result")
        output.write_table(f"{backend.device}, against float64", columns, rows, right=columns[1:4])
    if failed:
        output.note(f"{len(failed)} of {sum(map(len, errors.values()))} cases failed on {backend.device}")
        raise typer.Exit(1)
