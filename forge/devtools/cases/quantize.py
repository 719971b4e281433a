"""Cases of weights that become blocks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from forge.devtools.cases.case import Case
from forge.formats.ggml import GGMLType
from forge.formats.quantize import quantize
from forge.ops.op import Array, Arrays
from forge.ops.quant import Packed
from forge.ops.quantize import TYPES


def _weights(rng: np.random.Generator, rows: int, cols: int) -> Array:
    """Rows of weights, of few different ones (ties), of many zeros, of weights above zero alone, and of one of them."""
    x = 0.02 * rng.standard_normal((rows, cols)).astype(np.float32)
    x[1::6] = np.round(64 * x[1::6]) / 32
    x[2::6] *= rng.random(x[2::6].shape) < 0.05
    x[3::6] = np.abs(x[3::6])
    x[4::6] = x[4::6, :1]
    x[4::6, :32] = np.abs(x[4::6, :1]) * (1 + rng.random((len(x[4::6]), 32)) / 5000)
    x[5::6] *= np.exp2(rng.integers(-9, 9, x[5::6].shape))
    x[0, : cols // 2] = 0
    x[0, cols // 4] = -0.75
    return x


def _case(name: str, type: str, stored: str, rows: int, cols: int) -> Case:
    def make(rng: np.random.Generator) -> Arrays:
        return (quantize(_weights(rng, rows, cols), GGMLType[stored]),)

    return Case(f"{type} {name}", make, {"type": type, "stored": stored})


def _by_hand() -> Case:
    """The largest weight, 5, is in [4, 8), so that the scale is 1: codes are E2M1, of ties the smaller number's."""
    rows = np.zeros((1, 32), np.float16)
    rows[0, [0, 1, 2, 3, 4, 5, 16, 17]] = 5, -5, 0.25, -0.25, 0.26, -2.5, 2.6, -6
    block = np.zeros((1, 17), np.uint8)
    block[0, :7] = 127, 0x56, 0xFE, 0, 0, 1, 12
    return Case("by hand", lambda _: (rows.view(np.uint8),), {"type": "MXFP4", "stored": "F16"}, expected=(block,))


def _powers(rng: np.random.Generator) -> Arrays:
    """Largest weights that are powers of two, and beside them: a float32 logarithm rounds some up."""
    powers = np.exp2(np.arange(-100, 120, 5, dtype=np.float32)).view(np.uint32)
    most = (powers[:, None] - np.arange(48, dtype=np.uint32)).reshape(-1, 1).view(np.float32)
    shares = rng.uniform(-1, 1, (len(most), 32)).astype(np.float32)
    shares[:, 9] = 1
    return ((most * shares).view(np.uint8),)


def _halves(most: float) -> Callable[[np.random.Generator], Arrays]:
    """Half steps of a scale of 1, and the numbers beside them. most: The largest number, which makes that scale."""
    halves = np.resize(np.arange(1, 32, dtype=np.float32) / 2, (3, 32))
    halves[1:] = np.nextafter(halves[1:], np.array([[0], [99]], np.float32))
    halves[:, -2:] = 0, most
    return lambda _: (halves.view(np.uint8),)


def _both_ends(rng: np.random.Generator) -> Arrays:
    """Of Q6_K, largest weights of both signs, of which one may be beyond the last code."""
    rows = rng.uniform(-1, 1, (16, 256)).astype(np.float32)
    rows[:, ::16] = rng.choice([-1, 1], (16, 16))
    rows[:, 1::16] = -rows[:, ::16] * rng.uniform(0.96, 1, (16, 16))
    return (rows.view(np.uint8),)


def _level(rng: np.random.Generator) -> Arrays:
    """Weights that are nearly the same, or two numbers that are near each other."""
    rows = 1 + rng.random((32, 256)).astype(np.float32) * np.exp2(-rng.integers(3, 24, (32, 8))).repeat(32, axis=1)
    rows[16:] = np.where(rng.random((16, 256)) < 0.5, rows[16:], rows[16:, :1] * rng.uniform(0.9, 1, (16, 1)))
    return (rows.astype(np.float32).view(np.uint8),)


def _planes(name: str, type: str, stored: str, rows: int, cols: int) -> Case:
    """Planes of a launch's last block that is not whole."""

    def make(rng: np.random.Generator) -> Arrays:
        return quantize(_weights(rng, rows, cols), GGMLType[stored]), *_to_fill(type, rows, cols)

    return Case(f"{type} {name}", make, {"type": type, "stored": stored})


def _to_fill(type: str, rows: int, cols: int) -> Arrays:
    planes = Packed.empty(GGMLType[type], (rows, cols)).planes
    return *(plane if plane is None else np.full_like(plane, 7) for plane in planes), np.zeros(1, np.int32)


def _refused() -> Case:
    """A block of ones, and one with a weight of which the scale is beyond float16."""
    rows = np.ones((2, 32), np.float32)
    rows[1, 5] = 1 << 24
    quants = np.full((2, 32), 127, np.uint8)
    quants[1, np.arange(32) != 5] = 0
    deltas = np.array([[1 / 127], [np.inf]], np.float16).view(np.uint8)
    return Case(
        "Q8_0 by hand, refused",
        lambda _: (rows.view(np.uint8), *_to_fill("Q8_0", 2, 32)),
        {"type": "Q8_0", "stored": "F32"},
        written=(quants, deltas, np.ones(1, np.int32)),
    )


CASES = {
    "quantize": [
        _by_hand(),
        *(_case("small", type, "F16", 7, 256) for type in TYPES.split()),
        *(_case("more than a launch's block", type, "BF16", 6, 768) for type in ("Q4_K", "Q5_K", "Q6_K")),
        *(_case("blocks that end within a word", type, "F32", 7, 544) for type in ("MXFP4", "Q4_0", "Q8_0", "Q5_1")),
        Case("Q6_K both ends", _both_ends, {"type": "Q6_K", "stored": "F32"}),
        *(Case(f"{type} level", _level, {"type": type, "stored": "F32"}) for type in ("Q4_K", "Q5_K")),
        *(
            Case(f"{t} halves", _halves(most), {"type": t, "stored": "F32"})
            for t, most in (("Q8_0", 127), ("Q4_1", 15), ("Q5_1", 31))
        ),
        Case("MXFP4 powers of two", _powers, {"type": "MXFP4", "stored": "F32"}),
    ],
    "quantize_planes": [
        _refused(),
        *(_planes("more than a launch's block", type, "F16", 5, 1280) for type in TYPES.split()),
        *(_planes("of an odd number of bytes", type, "F32", 3, 32 * 45) for type in ("MXFP4", "Q8_0")),
    ],
}
