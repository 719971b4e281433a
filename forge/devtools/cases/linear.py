"""Cases of products: of float and quantized matrices, alone and with what may be fused into them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from forge.devtools.cases.case import Case, by_hand, normal
from forge.ops.norm import Normed
from forge.ops.op import Arrays
from forge.ops.quant import FORMATS, QuantTensor, Stack
from forge.tuning.lds import WITHOUT_LINES

Make = Callable[[np.random.Generator], Any]
_PLAIN = {"glu": "none", "split_k": "never"}
_OTHERS = tuple(name for name in FORMATS if name not in WITHOUT_LINES)
_ACTIVATIONS = 8 * ("silu", "gelu")


# Products of arrays


def float_case(rows: int, inner: int, outer: int, *, bias: bool = False, residual: bool = False) -> Case:
    """A product with a float matrix."""

    def make(rng: np.random.Generator) -> Arrays:
        x, weight = normal(rng, rows, inner), normal(rng, outer, inner)
        return x, weight, normal(rng, outer) if bias else None, normal(rng, rows, outer) if residual else None

    extras = " bias" * bias + " residual" * residual
    return Case(f"M{rows} K{inner} N{outer}{extras}", make, _PLAIN)


def quantized_case(name: str, rows: int = 2, inner: int = 512, outer: int = 3, *, extras: bool = False) -> Case:
    """A product with a quantized matrix. `extras`: a bias and a residual."""

    def make(rng: np.random.Generator) -> Arrays:
        # random weights are large, so x is kept small for the tolerance: it is rounded to 16 bits, or for several rows
        # the weights are to float16
        x = normal(rng, rows, inner) * np.float32(0.1 if rows == 1 else 0.01)
        weight = QuantTensor.random(name, outer, inner, rng)
        return x, weight, normal(rng, outer) if extras else None, normal(rng, rows, outer) if extras else None

    return Case(f"{name} M{rows} K{inner} N{outer}{' bias residual' * extras}", make, _PLAIN)


def _wide(name: str, rows: int, inner: int, outer: int = 302) -> Case:
    """Products near 1, of numbers that are far from float16's subnormals, which some GPUs take for zeros."""

    def make(rng: np.random.Generator) -> Arrays:
        weight = QuantTensor.random(name, outer, inner, rng, scale=0.001)
        x = normal(rng, rows, inner)
        return x / np.float32(weight.dequantize().std() * np.sqrt(inner)), weight, None, None

    return Case(f"{name} M{rows} K{inner} N{outer}", make, _PLAIN)


def _stacked(rows: int) -> Case:
    def make(rng: np.random.Generator) -> Arrays:
        x, bias, residual = normal(rng, rows, 256), normal(rng, 14), normal(rng, rows, 14)
        x *= np.float32(1 if rows == 1 else 0.01)
        half = rng.standard_normal((4, 256)).astype(np.float16)
        parts = QuantTensor.random("Q4_K", 5, 256, rng), QuantTensor.random("Q6_K", 5, 256, rng), half
        return x, Stack(parts), bias, residual

    return Case(f"stack M{rows}", make, _PLAIN)


_ARRAYS = [
    float_case(1, 1, 1),
    float_case(1, 64, 65, bias=True),
    float_case(1, 576, 31, residual=True),
    *(float_case(rows, 96, 33, bias=True, residual=True) for rows in (1, 2, 6, 7, 16, 32, 33, 70, 257)),
    float_case(16, 64, 33),  # without matrix cores in two turns of tokens, whose last and first stages have one place
    float_case(3, 1024, 1500),
    *(
        float_case(rows, inner, 3)
        for rows, inner in ((3, 40), (4, 72), (5, 1000), (8, 1001), (9, 8), (15, 31), (17, 1001))
    ),
    *(quantized_case(name) for name in ("Q4_1", "Q2_K", "Q6_K", "MXFP4")),
    *(quantized_case(name, rows=257, inner=256, outer=17) for name in FORMATS),
    *(quantized_case(name, 129, 256, 17) for name in ("Q4_0", "Q6_K")),
    *(quantized_case(name, inner=576) for name in ("Q4_1", "Q5_0", "Q8_0")),
    *(quantized_case(name, 3, 640, 1) for name in ("Q4_0", "Q5_1", "IQ4_NL")),
    *(quantized_case(name, 1, 32, 1) for name in ("Q4_0", "Q8_0")),
    *(quantized_case("Q4_K", rows, 1280, 7) for rows in (1, 3, 4, 5, 8, 9, 16)),
    quantized_case("Q6_K", 1, 768, 5),
    *(quantized_case(name, rows, 512, 37, extras=True) for name in ("Q4_0", "Q6_K") for rows in (1, 7, 40)),
    *(quantized_case(name, 1, inner, 2) for name in ("Q2_K", "Q8_0") for inner in (4096, 4352, 16_384, 16_640)),
    quantized_case("IQ1_M", 1, 14_336, 2),  # the widest row beside a large codebook
    # As wide as models are: steps that end with a row, several outputs for the threads of a row.
    *(_wide(name, 1, 2048) for name in FORMATS),
    *(_wide(name, 1, inner) for name in ("Q4_0", "Q8_0", "Q4_K", "Q6_K") for inner in (1024, 8192)),
    *(_wide(name, 5, 1024) for name in FORMATS),
    float_case(1, 4096, 302),
    float_case(9, 2048, 302),
    float_case(40, 2552, 17, bias=True, residual=True),  # in more splits than are added at a time
    _stacked(1),
    _stacked(5),
    _stacked(257),
    by_hand(
        "by hand",
        *([[1.0, 2]], [[3.0, 4], [5, 6]], [100.0, 200], [[1000.0, 2000]]),
        options=_PLAIN,
        expected=([[1111, 2217]],),
    ),
]


# Products of an array that may be split-K partials


def _partials(case: Case) -> Case:
    options = {**_PLAIN, "split_k": "allowed"}
    return Case(f"split-K {case.name}", lambda rng: (*case.make(rng)[:3], None), options)


_SPLIT_K = [
    _partials(float_case(1, 64, 5)),
    *(
        _partials(float_case(rows, inner, 33, bias=True))
        for rows, inner in ((2, 96), (16, 1000), (33, 2056), (64, 520))
    ),
    *(_partials(quantized_case(name, rows, 1024, 9)) for name in ("Q4_0", "Q4_K", "Q6_K") for rows in (5, 40)),
    _partials(float_case(5, 63, 3)),
    _partials(float_case(65, 64, 3)),
    _partials(float_case(257, 64, 3)),
    _partials(_stacked(5)),
]


# Products of a normalized stream, and with a gate


def floats(inner: int, outer: int) -> Make:
    """A float matrix (outer, inner)."""
    return lambda rng: normal(rng, outer, inner)


def blocks(name: str, inner: int, outer: int) -> Make:
    """A quantized matrix (outer, inner)."""
    return lambda rng: QuantTensor.random(name, outer, inner, rng)


def _stack(inner: int, *names: str) -> Make:
    return lambda rng: Stack(tuple(QuantTensor.random(name, 6, inner, rng) for name in names))


def normed_case(
    name: str, rows: int, weight: Make, glu: str = "none", *, bias: bool = False, scale: float = 1.0
) -> Case:
    """A product of an RMS-normalized stream, near 1: of blocks, random ones are large, and the row becomes float16."""

    def make(rng: np.random.Generator) -> Arrays:
        matrix = weight(rng)
        outer, inner = matrix.shape
        x = normal(rng, rows, inner) * np.float32(scale)
        numbers = matrix.dequantize() if isinstance(matrix, QuantTensor | Stack) else matrix
        norm = (1 + 0.1 * normal(rng, inner)) / np.float32(numbers.std() * np.sqrt(inner))
        normed = Normed(x, None, norm.astype(np.float32), None, 1e-5, True)
        return normed, matrix, normal(rng, outer) if bias else None, None

    shown = "" if glu == "none" else f"glu {glu} "
    return Case(f"rms {shown}{name}{' bias' * bias}", make, {**_PLAIN, "glu": glu})


def _glu(name: str, rows: int, weight: Make, glu: str, *, bias: bool = False) -> Case:
    """A gated product of an array."""
    case = normed_case(name, rows, weight, glu, bias=bias)

    def make(rng: np.random.Generator) -> Arrays:
        normed, *rest = case.make(rng)
        return normed.x * normed.weight, *rest

    return Case(case.name.removeprefix("rms "), make, case.options)


_RMS = [
    *(
        normed_case(f"T{rows} E{inner} N{outer}", rows, floats(inner, outer))
        for rows, inner, outer in (
            *((1, 8, 1), (1, 31, 3), (1, 248, 65), (1, 256, 17), (1, 264, 9), (1, 576, 1100), (1, 1032, 5)),
            *((1, 2048, 3), (1, 2056, 6), (1, 4104, 5), (1, 8200, 2), (2, 64, 5), (17, 72, 5)),
        )
    ),
    *(normed_case(f"{name} T1", 1, blocks(name, 512, 70)) for name in _OTHERS),
    *(normed_case(f"{name} T1 E2048", 1, blocks(name, 2048, 302)) for name in (*_OTHERS, "IQ3_XXS")),
    *(
        normed_case(f"{name} T1 E{inner}", 1, blocks(name, inner, 3))
        for name in ("Q4_0", "Q8_0", "Q4_K")
        for inner in ((32, 4128) if name != "Q4_K" else (256, 4352))
    ),
    normed_case("Q4_0 T1 E16416", 1, blocks("Q4_0", 16_416, 2)),
    normed_case("large values", 1, floats(640, 3), scale=1e5),
    normed_case("small values", 1, floats(640, 3), scale=1e-4),
    normed_case("stack T1", 1, _stack(256, "Q4_K", "Q6_K")),
    normed_case("stack T2", 2, _stack(256, "Q4_K", "Q6_K")),
    # on Hopper the norm writes these in one order or in both
    *(normed_case(f"{name} T40", 40, blocks(name, 256, 20)) for name in ("Q4_K", "Q6_K")),
    normed_case("stack T40", 40, _stack(256, "Q4_K", "Q6_K")),
    normed_case("T1 E264 N9", 1, floats(264, 9), bias=True),
    normed_case("stack T1", 1, _stack(256, "Q4_K", "Q6_K"), bias=True),
    Case(  # the norm's is [0.75, 2]
        "rms by hand",
        lambda rng: (
            Normed(np.array([[3, 4]], np.float32), None, np.array([1, 2], np.float32), None, 3.5, True),
            np.array([[4, 5], [8, -1]], np.float32),
            *(None, None),
        ),
        _PLAIN,
        expected=([[13, 4]],),
    ),
]

_RMS_GLU = [
    *(
        normed_case(f"T{rows} E{inner} F{width}", rows, floats(inner, 2 * width), glu, bias=glu == "gelu")
        for rows, inner, width, glu in (
            *((1, 8, 1, "silu"), (1, 31, 3, "gelu"), (1, 256, 33, "gelu"), (1, 264, 7, "silu")),
            *((1, 576, 700, "silu"), (1, 1032, 5, "gelu"), (1, 2056, 3, "silu"), (1, 4104, 3, "gelu")),
            *((1, 8200, 2, "silu"), (2, 64, 5, "gelu"), (17, 72, 5, "silu"), (1, 2048, 302, "silu")),
        )
    ),
    *(
        normed_case(f"{name} T1", 1, blocks(name, 512, 140), glu, bias=glu == "gelu")
        for name, glu in zip(_OTHERS, _ACTIVATIONS, strict=False)
    ),
    *(
        normed_case(f"{name} T1 E2048", 1, blocks(name, 2048, 302), glu)
        for name, glu in zip((*_OTHERS, "IQ1_M"), _ACTIVATIONS, strict=True)
    ),
    *(
        normed_case(f"{name} T1 E{inner}", 1, blocks(name, inner, 6), "silu")
        for name in ("Q4_0", "Q8_0", "Q4_K")
        for inner in ((32, 4128) if name != "Q4_K" else (256, 4352))
    ),
    normed_case("Q4_0 T1 E16416", 1, blocks("Q4_0", 16_416, 4), "silu"),
    normed_case("Q4_K T3", 3, blocks("Q4_K", 256, 6), "gelu", bias=True),
    normed_case("stack T1", 1, _stack(256, "Q4_K", "Q6_K"), "silu", bias=True),
    Case(  # the norm's is [0.75, 2]; gates 200 and -200, ups 13 and 4
        "rms glu by hand",
        lambda rng: (
            Normed(np.array([[3, 4]], np.float32), None, np.array([1, 2], np.float32), None, 3.5, True),
            np.array([[0, 50], [0, -50], [4, 5], [8, -1]], np.float32),
            np.array([100, -100, 0, 1], np.float32),
            None,
        ),
        {**_PLAIN, "glu": "silu"},
        expected=([[2600, 0]],),
    ),
]

_GLU = [
    _glu("T1", 1, floats(64, 6), "silu"),
    _glu("T2", 2, floats(64, 10), "gelu", bias=True),
    _glu("T16", 16, floats(1032, 70), "silu", bias=True),
    _glu("T40", 40, floats(2056, 18), "gelu"),
    _glu("T40 E2552", 40, floats(2552, 18), "silu", bias=True),
    _glu("Q4_K T5", 5, blocks("Q4_K", 2048, 34), "silu", bias=True),
    _glu("Q8_0 T64", 64, blocks("Q8_0", 96, 34), "gelu"),
    _glu("stack T3", 3, _stack(256, "Q4_K", "Q6_K"), "silu"),
    _glu("T3 E31", 3, floats(31, 6), "silu"),
    _glu("T65", 65, floats(64, 6), "silu"),
    _glu("T257", 257, floats(64, 6), "silu"),
]


# Products of a stream to which something pending is added first, and of one with a layer norm


def _streams() -> Iterable[Case]:
    """Each way to compute a product, behind a norm that is a launch of its own and that writes the stream."""
    for kind in ("rms", "layer"):
        for rows, glu, split_k in ((1, "none", "never"), (3, "none", "allowed"), (1, "silu", "never")):

            def make(rng: np.random.Generator, kind: str = kind, rows: int = rows) -> Arrays:
                x, pending = normal(rng, rows, 64), normal(rng, rows, 64)
                bias = normal(rng, 64) if kind == "layer" else None
                normed = Normed(x, pending, (1 + 0.1 * normal(rng, 64)) / 8, bias, 1e-5, kind == "rms")
                return normed, normal(rng, 10, 64), normal(rng, 10), None

            yield Case(f"pending {kind} T{rows} {glu} {split_k}", make, {"glu": glu, "split_k": split_k})


def _fixed(name: str, rows: int, matrix: Make, glu: str = "none", *, bias: bool = False) -> Case:
    case = normed_case(name, rows, matrix, glu, bias=bias)
    return Case(f"fixed {name}", case.make, {**case.options, "split_k": "fixed"})


_FIXED = [
    _fixed("T1", 1, floats(64, 6)),
    _fixed("T3 E2056", 3, floats(2056, 18), "silu", bias=True),
    _fixed("T70", 70, floats(64, 10), "gelu", bias=True),
    _fixed("T2 E31", 2, floats(31, 6)),
    _fixed("Q4_K T1", 1, blocks("Q4_K", 2048, 34), bias=True),
    _fixed("stack T66", 66, _stack(256, "Q4_K", "Q6_K"), "silu"),
]

CASES = {"linear": [*_ARRAYS, *_SPLIT_K, *_RMS, *_RMS_GLU, *_GLU, *_FIXED, *_streams()]}
