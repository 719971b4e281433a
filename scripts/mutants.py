#!/usr/bin/env python3
"""Plant faults in the kernels, one at a time, and say which test of tests/kernels finds each: what lives needs a case.

scripts/mutants.py [PART ...] plants those of `mutants.txt` whose file or text holds one of the parts; it needs clang++.
A fault is a line `file.hip: name`, the text as it is behind `- `, and the text with the fault behind `+ `.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FAULTS = ROOT / "tests" / "data" / "mutants.txt"
KERNELS = ROOT / "forge" / "raw_kernels"
TESTS = {  # by kernel file: -k of tests/kernels, quick ones first
    "activation": "silu_mul or gelu or soft_cap or add-",
    "attention_decode": "decode_attention or decode or parts",
    "attention_prefill": "paged_attention",
    "attention_steps": "attention_scores or causal_mask or softmax or attention_values",
    "embed": "embed or take_rows",
    "linear": "linear-M or add_bias or M65",
    "logprobs": "logprobs",
    "norm": "norm",
    "pages": "copy_page or take_slots",
    "penalize": "penalize",
    "quant": "embed or M65",
    "quant_vector": "T1 or M1 or stack or quant_vector",
    "rope": "rope_append_kv",
    "sample": "sample or argmax or ids or draw",
    "step": "decode_inputs or place or clear or advance",
    "tile_group": "groups or tile_group",
    "tile_join": "linear or tile",
    "tile_linear": "linear or tile",
    "vector": "rms_ or linear or vector",
    "_prelude": "norm or gelu or top_logprobs or sample or quant_vector or linear",
    "_blocks": "embed or rms_linear or linear",
    "_product": "linear or tile",
    "_row": "rms_ or linear-M1 or vector",
    "_tile_mma": "tiles or linear",
    "_tile_mfma": "tiles or linear",
    "_tile_wmma": "tiles or linear",
    "_tile_scalar": "tiles or linear",
    "_tile_wgmma": "groups or tile_group",
}


@dataclass(frozen=True)
class Fault:
    file: str
    name: str
    old: str
    new: str


def read_faults() -> Iterator[Fault]:
    for text in FAULTS.read_text().strip().split("\n\n"):
        head, *lines = text.split("\n")
        file, _, name = head.partition(": ")
        old, new = ("\n".join(line[2:] for line in lines if line[0] == sign) for sign in "-+")
        yield Fault(file.removesuffix(".hip"), name, old, new)


class FirstFailure:
    """A plugin of pytest's that notes what fails."""

    found = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.found:
            self.found = report.nodeid.partition("::")[2]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.found = f"collection: {report.longrepr}"


def found_by(fault: Fault) -> str:
    """The test that fails with the fault planted, or ""; in a child process, which ends with it."""
    from forge.backend import kernels

    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "raw_kernels"
        shutil.copytree(KERNELS, copy)
        path = copy / f"{fault.file}.hip"
        text = path.read_text()
        if text.count(fault.old) != 1:
            return f"STALE: the text is there {text.count(fault.old)} times"
        path.write_text(text.replace(fault.old, fault.new))
        kernels._DIRECTORY = copy
        plugin = FirstFailure()
        arguments = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", TESTS[fault.file]]
        with contextlib.redirect_stdout(io.StringIO()):
            code = pytest.main([*arguments, str(ROOT / "tests" / "kernels")], plugins=[plugin])
        return plugin.found or ("" if code == 0 else f"pytest: {code!r}")


def main() -> int:
    os.chdir(ROOT)
    faults = [fault for fault in read_faults() if not sys.argv[1:] or any(p in str(fault) for p in sys.argv[1:])]
    living = 0
    for fault in faults:
        start = time.monotonic()
        read_end, write_end = os.pipe()
        if not os.fork():
            os.write(write_end, found_by(fault).encode())
            os._exit(0)
        os.close(write_end)
        with open(read_end) as pipe:
            found = pipe.read()
        os.wait()
        living += not found
        seconds = time.monotonic() - start
        print(f"{fault.file}.hip: {fault.name} | {found or 'LIVES'} | {seconds:.0f} s", flush=True)
    print(f"{len(faults)} faults, {living} live")
    return 1 if living else 0


if __name__ == "__main__":
    raise SystemExit(main())
