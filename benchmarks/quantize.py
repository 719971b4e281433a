"""How fast weights are quantized: float16 rows in memory to blocks, by type, on a device.

python benchmarks/quantize.py [--device cpu|cuda|hip] [--threads N]

On a CPU each thread takes rows of its own, as loading does; the rate by the threads' own processor time is beside that
of the clock, which other processes share. On a GPU the rows are uploaded and the blocks come back.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from forge import backend as backends
from forge.backend.parallel import run_all
from forge.checkpoints.retyped import _STEP_WEIGHTS
from forge.formats.ggml import GGMLType, row_bytes
from forge.formats.quantize import fill
from forge.ops.quantize import TYPES, quantize

_COLS = 4096
_OF_AN_8B = 7.5e9
"""Weights of Llama 3.1 8B in matrices, the output among them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    device = backends.select(arguments.device)
    rows = (0.02 * np.random.default_rng(0).standard_normal((64 * arguments.threads * 64, _COLS), np.float32)).astype(
        np.float16
    )
    if device.is_gpu:
        rows = np.tile(rows, (4, 1))
    print(f"{device.device}: float16 to blocks, in ns of a weight; seconds of an 8B's {_OF_AN_8B / 1e9:g}e9 weights")
    for name in TYPES.split():
        type = GGMLType[name]
        out = np.empty((len(rows), row_bytes(type, _COLS)), np.uint8)
        by_clock, of_thread = min(_measured(device, rows, type, out, arguments.threads) for _ in range(4))
        share = 1e9 / rows.size
        text = "" if device.is_gpu else f", {share * of_thread:6.2f} of a thread's own time"
        print(f"{name:6} {share * by_clock:6.2f} by the clock{text}; {_OF_AN_8B * by_clock / rows.size:6.1f} s")


def _measured(device: Any, rows: Any, type: GGMLType, out: Any, threads: int) -> tuple[float, float]:
    """Seconds by the clock, and of the threads' processor time together."""
    spent: list[float] = []

    def timed(do: Callable[[slice], None]) -> Callable[[slice], None]:
        def run(part: slice) -> None:
            start = time.thread_time()
            do(part)
            spent.append(time.thread_time() - start)

        return run

    def on_cpu(part: slice) -> None:
        fill(rows[part].view(np.uint8), GGMLType.F16, type, out[part])

    start = time.perf_counter()
    if device.is_gpu:
        blocks = quantize(device.asarray(rows.view(np.uint8)), stored="F16", type=type.name)
        np.copyto(out, device.to_numpy(blocks))
    else:
        step = _STEP_WEIGHTS // _COLS
        parts = [slice(first, first + step) for first in range(0, len(rows), step)]
        run_all(timed(on_cpu), parts, threads, lambda _: None)
    return time.perf_counter() - start, sum(spent)


if __name__ == "__main__":
    main()
