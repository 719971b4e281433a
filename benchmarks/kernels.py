"""Time of every op at the shapes of a real model, and of the copies that bound it.

    python benchmarks/kernels.py [--json] [op ...]

For each op: microseconds (median), the bytes that must move, GB/s, and its share of the rate at which NumPy copies a
large array in the same run. Inputs rotate through more memory than the last cache level holds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np

import forge.ops  # noqa: F401  (fills the registry)
from forge.ops.attention import AttentionSpec
from forge.ops.kv_cache import KVPages
from forge.ops.norm import Normed
from forge.ops.op import REGISTRY, Array

Make = Callable[[np.random.Generator], tuple[Any, ...]]

_ROTATED_BYTES = 256 << 20
_SECONDS = 0.3

# The shapes of smollm2: E 576, H 9, G 3, D 64, F 1536, V 49152
_E, _H, _G, _D, _F, _V, _PAGE = 576, 9, 3, 64, 1536, 49_152, 64


def _attended(q: Array, kv: KVPages, starts: Array, lengths: Array, *rest: object) -> int:
    return int(2 * q.nbytes + int(lengths.sum()) * (kv.k[0, 0].nbytes + kv.v[0, 0].nbytes))


_MOVED: dict[str, Callable[..., int]] = {"paged_attention": _attended}
"""The least bytes that an op reads and writes, where they are not those of its arguments and its result."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", help="names; all if none is given")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    copy_rate = measure_copy()
    rows = [
        row(name, label, make, options, copy_rate)
        for name, label, make, options in workloads()
        if not arguments.ops or name in arguments.ops
    ]
    if arguments.json:
        print(json.dumps({"copy_gb_per_s": copy_rate, "ops": rows}, indent=1))
        return
    print(f"copy: {copy_rate:.1f} GB/s (read + written)")
    print(f"{'op':<18} {'shape':<26} {'us':>9} {'MB':>8} {'GB/s':>7} {'of copy':>8}")
    for r in rows:
        print(f"{r['op']:<18} {r['shape']:<26} {r['us']:9.1f} {r['mb']:8.2f} {r['gb_per_s']:7.1f} {r['of_copy']:8.0%}")


def workloads() -> Sequence[tuple[str, str, Make, dict[str, Any]]]:
    """(op, label, inputs, options): one decode step's shapes, then a prefill's."""

    def normal(rng: np.random.Generator, *shape: int) -> Array:
        return rng.standard_normal(shape, np.float32)

    def arrays(*shapes: tuple[int, ...], scalars: tuple[Any, ...] = ()) -> Make:
        return lambda rng: (*(normal(rng, *shape) for shape in shapes), *scalars)

    def normed(rows: int) -> Make:
        return lambda rng: (Normed(normal(rng, rows, _E), None, normal(rng, _E), None, 1e-5, True),)

    plain = {"glu": "none", "split_k": "never"}

    def linear(rows: int, inner: int, outer: int) -> Make:
        return arrays((rows, inner), (outer, inner), scalars=(None, None))

    def attend(queries: int, length: int) -> Make:
        def make(rng: np.random.Generator) -> tuple[Any, ...]:
            pages = -(-length // _PAGE)
            kv = KVPages(normal(rng, pages, _PAGE, _G, _D), normal(rng, pages, _PAGE, _G, _D))
            table = np.arange(pages, dtype=np.int32)[None]
            starts, lengths = np.array([0, queries], np.int32), np.array([length], np.int32)
            return normal(rng, queries, _H, _D), kv, starts, lengths, table, AttentionSpec(_D**-0.5, 0, 0.0)

        return make

    def sampling(rng: np.random.Generator) -> tuple[Any, ...]:
        floats = [np.array([value], np.float32) for value in (0.8, 0.9, 0.0)]
        ids = np.array([1], np.uint32)
        return normal(rng, 1, _V) * 4, floats[0], np.array([50], np.int32), *floats[1:], np.ones(1, np.uint64), ids, ids

    found: list[tuple[str, str, Make, dict[str, Any]]] = []
    for rows in (1, 512):
        found += [
            ("norm", f"rms T{rows} E{_E}", normed(rows), {"out": "act"}),
            ("act_and_mul", f"silu T{rows} F{_F}", arrays((rows, 2 * _F)), {"activation": "silu"}),
        ]
    for rows in (1, 4, 8, 512):
        found += [
            ("linear", f"M{rows} K{_E} N{2 * _F}", linear(rows, _E, 2 * _F), plain),
            ("linear", f"M{rows} K{_F} N{_E}", linear(rows, _F, _E), plain),
        ]
    found += [
        ("linear", f"M1 K{_E} N{_V}", linear(1, _E, _V), plain),
        ("paged_attention", "decode, 1024 positions", attend(1, 1024), {}),
        ("paged_attention", "prefill of 512", attend(512, 512), {}),
        ("sample", f"V{_V} top-k 50 top-p 0.9", sampling, {}),
    ]
    return found


def row(name: str, label: str, make: Make, options: dict[str, Any], copy: float) -> dict[str, Any]:
    op = REGISTRY[name]
    rng = np.random.default_rng(0)
    inputs = [make(rng)]
    size = sum(value.nbytes for _, value in op.flat(inputs[0]) if isinstance(value, np.ndarray))
    inputs += [make(rng) for _ in range(min(_ROTATED_BYTES // size, 64))]
    result = op(*inputs[0], **options)
    moved = _MOVED[name](*inputs[0]) if name in _MOVED else size + result.nbytes
    times: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(times) < 5 or time.perf_counter() < end:
        for arguments in inputs:
            start = time.perf_counter()
            op(*arguments, **options)
            times.append(time.perf_counter() - start)
    seconds = median(times)
    rate = moved / seconds / 1e9
    return {
        "op": name,
        "shape": label,
        "us": seconds * 1e6,
        "mb": moved / 1e6,
        "gb_per_s": rate,
        "of_copy": rate / copy,
    }


def measure_copy() -> float:
    """GB/s of a copy, bytes read and written, on one thread: NumPy has no other."""
    source = np.ones(_ROTATED_BYTES // 4, np.float32)
    target = np.empty_like(source)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / median(times) / 1e9


if __name__ == "__main__":
    main()
