"""Time of memory-bound ops on a GPU at the shapes of 1B and 8B models, as a share of the device's copy bandwidth.

    python benchmarks/gpu_kernels.py [--device cuda] [--json] [filter ...]

A filter is a part of a line's label, such as Q4_K or rms. Each op is recorded once with as many inputs as hold 400
MB, so that none is in a cache, and replayed as a graph; the copy is measured in the same run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import numpy as np

import forge.ops  # noqa: F401  (fills the registry)
from forge.backend import select
from forge.backend.gpu import GPU
from forge.formats import ggml
from forge.ops.attention import AttentionSpec
from forge.ops.experts import Experts, Router
from forge.ops.kv_cache import KVPages
from forge.ops.norm import Normed
from forge.ops.op import REGISTRY
from forge.ops.quant import QuantTensor
from forge.ops.rope import RopeArgs

_ROTATED_BYTES = 400_000_000
_REPLAYS = 20
_DRAWN_ROWS = 512
"""Rows of a matrix that are drawn; it repeats them, which changes nothing about its speed."""
_MATRICES = ((4096, 4096), (14_336, 4096), (4096, 14_336), (128_256, 4096))  # N, K
_PROJECTIONS = (  # of the normalized residual stream, at 1B and 8B shapes: glu, N, K
    *(("none", 3072, 2048), ("silu", 16_384, 2048), ("none", 128_256, 2048), ("none", 6144, 4096)),
    ("silu", 28_672, 4096),
)
_PLAIN = {"glu": "none", "split_k": "never"}
_FORMATS = ("F16", "Q8_0", "Q6_K", "Q4_0", "Q4_K", "Q4_G128")

Make = Callable[[], tuple[Any, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("filters", nargs="*")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    device = select(arguments.device)
    if not isinstance(device, GPU):
        parser.error(f"{device.device} is not a GPU: benchmarks/kernels.py measures NumPy")
    rows = []
    if not arguments.json:
        print(device.device)
        print(f"{'op':<44} {'us':>9} {'MB':>8} {'GB/s':>7} {'of copy':>8}")
    for name, label, moved, make, options in workloads(device):
        if arguments.filters and not any(part in label for part in arguments.filters):
            continue
        seconds = measure(device, name, moved, make, options)
        rate, of_copy = moved / seconds / 1e9, device.read_seconds(moved) / seconds
        rows.append({"label": label, "us": seconds * 1e6, "mb": moved / 1e6, "gb_per_s": rate, "of_copy": of_copy})
        if not arguments.json:
            print(f"{label:<44} {seconds * 1e6:9.1f} {moved / 1e6:8.2f} {rate:7.0f} {of_copy:8.0%}", flush=True)
    if arguments.json:
        print(json.dumps({"device": device.device, "ops": rows}, indent=1))


def measure(device: Any, name: str, moved: int, make: Make, options: dict[str, Any]) -> float:
    """Seconds of one call: the median over replays of a recorded step that calls the op with all inputs."""
    inputs = [make() for _ in range(max(2, _ROTATED_BYTES // moved))]
    op = REGISTRY[name]
    changed = [value for given in inputs for value in op.written(given)]
    _, replay = device.capture(lambda: [op(*given, **options) for given in inputs], changed, list)
    return median(float(device.seconds(replay)) for _ in range(_REPLAYS)) / len(inputs)


def workloads(device: Any) -> Iterator[tuple[str, str, int, Make, dict[str, Any]]]:
    """(op, label, bytes that must move, inputs, options)."""
    rng = np.random.default_rng(0)

    def normal(*shape: int, dtype: Any = np.float32, scale: float = 1.0) -> Any:
        return device.asarray((rng.standard_normal(shape, np.float32) * np.float32(scale)).astype(dtype))

    def matrix(kind: str, outer: int, inner: int) -> Any:
        repeats = (-(-outer // _DRAWN_ROWS), 1)
        if kind == "F16":
            drawn = rng.standard_normal((_DRAWN_ROWS, inner), np.float32).astype(np.float16)
            return device.asarray(np.tile(drawn, repeats)[:outer])
        few = QuantTensor.random(kind, _DRAWN_ROWS, inner, rng)
        return QuantTensor(few.type, (outer, inner), np.tile(few.blocks, repeats)[:outer]).on(device)

    def normed(rows: int, width: int, pending: Any = None) -> Normed:
        return Normed(normal(rows, width), pending, normal(width), None, 1e-5, True)

    for rows in (1, 2, 4, 8, 16):
        for outer, inner in _MATRICES if rows == 1 else _MATRICES[1:2]:
            for kind in _FORMATS:

                def product(kind: str = kind, outer: int = outer, inner: int = inner, rows: int = rows) -> Any:
                    return normal(rows, inner, dtype=np.float16), matrix(kind, outer, inner), None, None

                yield "linear", f"linear {kind} M{rows} {outer}x{inner}", _nbytes(kind, outer, inner), product, _PLAIN
    for outer, inner in ((2048, 2048), (2048, 8192)):  # a 1B model's, added to the residual stream
        for kind in ("F16", "Q4_K"):

            def added(kind: str = kind, outer: int = outer, inner: int = inner) -> Any:
                return normal(1, inner, dtype=np.float16), matrix(kind, outer, inner), None, normal(1, outer)

            yield "linear", f"linear {kind} M1 {outer}x{inner} residual", _nbytes(kind, outer, inner), added, _PLAIN
    for glu, outer, inner in _PROJECTIONS:
        for kind in ("F16", "Q4_K"):

            def projected(kind: str = kind, outer: int = outer, inner: int = inner) -> Any:
                return normed(1, inner), matrix(kind, outer, inner), None, None

            label = f"linear {kind} M1 {outer}x{inner} rms{' glu' * (glu == 'silu')}"
            yield "linear", label, _nbytes(kind, outer, inner), projected, {**_PLAIN, "glu": glu}

    tokens, width = 8192, 4096
    yield (
        "norm", f"norm rms {tokens}x{width}", tokens * width * 6,
        lambda: (normed(tokens, width),), {"out": "act"},
    )  # fmt: skip
    yield (
        "norm", f"norm pending rms {tokens}x{width}", tokens * width * 14,
        lambda: (normed(tokens, width, normal(tokens, width)),), {"out": "act"},
    )  # fmt: skip
    yield (
        "act_and_mul", f"silu_mul {tokens}x{width}", tokens * width * 10,
        lambda: (normal(tokens, 2 * width),), {"activation": "silu"},
    )  # fmt: skip
    yield from _experts(device, normal, matrix)
    yield from _attention(device, normal)
    yield from _sampling(device, normal)


def _nbytes(kind: str, outer: int, inner: int) -> int:
    if kind == "F16":
        return 2 * outer * inner
    found = ggml.GGMLType[kind]
    return outer * inner // found.block_size * found.type_size


def _experts(
    device: Any, normal: Callable[..., Any], matrix: Callable[..., Any]
) -> Iterator[tuple[str, str, int, Make, dict[str, Any]]]:
    """Layers of mixtures: what chooses the experts, and what those of all rows compute."""
    rng = np.random.default_rng(1)
    router = {"scores": "softmax", "weights": "renormalized", "order": "any", "tiles": "never"}
    for model, kind, width, inner, count, used, activation in (
        ("qwen3-30b-a3b", "Q4_K", 2048, 768, 128, 8, "silu"),
        ("gpt-oss-20b", "MXFP4", 2880, 2880, 32, 4, "clamped_swiglu"),
    ):
        for rows in (1, 8, 64, 2048):
            chosen = np.stack([rng.permutation(count)[:used] for _ in range(rows)]).astype(np.int32)

            def routed(rows: int = rows, width: int = width, count: int = count, used: int = used) -> Any:
                normed = Normed(normal(rows, width), None, normal(width), None, 1e-5, True)
                return normed, Router(normal(count, width), None, None, None, used, 1, 1, 1.0)

            def computed(
                chosen: Any = chosen, kind: str = kind, width: int = width, inner: int = inner, count: int = count
            ) -> Any:
                rows = len(chosen)
                first, second = matrix(kind, count * 2 * inner, width), matrix(kind, count * width, inner)
                operand: Any = normal(rows, width, dtype=np.float16)
                if rows == 1:
                    operand = Normed(normal(1, width), None, normal(width), None, 1e-5, True)
                given = device.asarray(chosen), normal(*chosen.shape)
                return operand, *given, Experts(first, None, None, None, second, None, count), normal(rows, width)

            yield "route", f"route {model} M{rows}", 4 * width * (count + rows), routed, router
            size = len(np.unique(chosen)) * (_nbytes(kind, 2 * inner, width) + _nbytes(kind, width, inner))
            options = {"activation": activation, "weighs": "output", "order": "any", "partials": "never"}
            yield "experts", f"experts {model} {kind} M{rows}", size, computed, options


def _attention(device: Any, normal: Callable[..., Any]) -> Iterator[tuple[str, str, int, Make, dict[str, Any]]]:
    heads, kv_heads, dim, page = 32, 8, 128, 64

    def pages_of(sequences: int, length: int) -> Any:
        pages = -(-length // page)
        table = np.arange(sequences * pages, dtype=np.int32).reshape(sequences, pages)
        return sequences * pages, device.asarray(table)

    def rope(tokens: int) -> Make:
        def make() -> tuple[Any, ...]:
            count, _ = pages_of(1, tokens)
            cache = [normal(count, page, kv_heads, dim, dtype=np.float16) for _ in range(2)]
            ids = device.asarray(np.arange(tokens, dtype=np.int32))
            qkv = normal(tokens, (heads + 2 * kv_heads) * dim)
            return qkv, RopeArgs(None, None, None, normal(tokens, dim // 2, 2), None, 1e-6), ids, ids, KVPages(*cache)

        return make

    def decode(sequences: int, length: int, dim: int) -> Make:
        """In the page table of a longer context, as in an engine."""

        def make() -> tuple[Any, ...]:
            count, own = pages_of(sequences, length)
            table = np.zeros((sequences, 131_072 // page), np.int32)
            table[:, : own.shape[1]] = device.to_numpy(own)
            cache = [normal(count, page, kv_heads, dim, dtype=np.float16) for _ in range(2)]
            qkv = normal(sequences, (heads + 2 * kv_heads) * dim)
            lengths = device.asarray(np.full(sequences, length, np.int32))
            slot_mapping = device.asarray(table[:, (length - 1) // page] * page + (length - 1) % page)
            rope, spec = (
                RopeArgs(None, None, None, normal(length, dim // 2, 2), None, 1e-6),
                AttentionSpec(dim**-0.5, 0, 0.0),
            )
            return qkv, rope, lengths, slot_mapping, KVPages(*cache), device.asarray(table), spec

        return make

    size = 8192 * (heads + 2 * kv_heads) * dim * 6
    yield "rope_append_kv", "rope_append_kv 8192 tokens", size, rope(8192), {"style": "neox"}
    for sequences, length in ((1, 1024), (1, 8192), (1, 32_768), (32, 2048), (64, 1024)):
        for own_dim in (64, 128):
            label = f"decode_attention B{sequences} N{length} D{own_dim}"
            size = sequences * length * kv_heads * own_dim * 4
            yield "decode_attention", label, size, decode(sequences, length, own_dim), {"style": "neox"}


def _sampling(device: Any, normal: Callable[..., Any]) -> Iterator[tuple[str, str, int, Make, dict[str, Any]]]:
    vocabulary = 128_256
    kinds = {  # temperature, top_k, top_p, min_p; deviation of the logits
        "greedy": (0.0, 0, 1.0, 0.0, 3.0),
        "plain": (1.0, 0, 1.0, 0.0, 3.0),
        "top-k 50": (1.0, 50, 1.0, 0.0, 3.0),
        "top-k 50, top-p 0.9": (1.0, 50, 0.9, 0.0, 3.0),
        "top-p 0.9": (1.0, 0, 0.9, 0.0, 3.0),
        "min-p 0.05": (1.0, 0, 1.0, 0.05, 3.0),
        "top-p 0.9 at temperature 100": (100.0, 0, 0.9, 0.0, 3.0),
        "top-k 50, top-p 0.9 of equals": (1.0, 50, 0.9, 0.0, 0.0),  # the worst case
    }

    def draw(rows: int, *values: float) -> Make:
        def make() -> tuple[Any, ...]:
            *limits, deviation = values
            dtypes = (np.float32, np.int32, np.float32, np.float32)
            given = [device.asarray(np.full(rows, value, dtype)) for value, dtype in zip(limits, dtypes, strict=True)]
            numbers = [device.asarray(np.arange(rows, dtype=dtype)) for dtype in (np.uint64, np.uint32, np.uint32)]
            return normal(rows, vocabulary, scale=deviation), *given, *numbers

        return make

    for rows in (1, 64):
        size = rows * vocabulary * 4
        yield "argmax", f"argmax B{rows}", size, lambda: (normal(rows, vocabulary, scale=3.0),), {}  # noqa: B023
        for name, values in kinds.items():
            yield "sample", f"sample {name} B{rows}", size, draw(rows, *values), {}


if __name__ == "__main__":
    main()
