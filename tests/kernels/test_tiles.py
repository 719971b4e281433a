"""Products on the matrix cores of each family, which the harness plays after the vendors' manuals, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from harness import COMPILER, TILE_FAMILIES, Harness

from forge.devtools.cases import CASES
from forge.devtools.cases.case import Case
from forge.devtools.cases.experts import experts_case, route_case
from forge.devtools.recorder import Recorded, Recorder
from forge.devtools.verify import inputs, on, run_case
from forge.ops.experts import Router, route
from forge.ops.linear import linear
from forge.ops.matmul import matmul
from forge.ops.norm import Normed, norm
from forge.ops.op import REGISTRY
from forge.ops.ordered import Ordered
from forge.ops.quant import FORMATS, QuantTensor, Stack
from forge.tuning import Choices
from forge.tuning.lds import FEW_FORMATS, FEW_ROWS, WITHOUT_LINES
from forge.tuning.table import KERNELS

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no clang++: scripts/install-toolchain installs it")

FAMILIES = {**TILE_FAMILIES, "TILE_MMA, groups": {"wave": 32, "groups": True}}
NAMES = ("M2 K96", "M16 K64", "M16 K96", "M33 K96", "Q4_K M5", "Q6_K M2", "Q8_0 M2 K576", "Q2_K M2", "stack M5")
QUICK = ("M2 K96", "M33 K96", "Q4_K M5", "Q6_K M2", "stack M5")
slow = pytest.mark.slow


def device_of(family: str) -> Harness:
    return Harness(seed=1, tile=family.partition(",")[0], **FAMILIES[family])


_GATE = {"format": "Q4_K", "inner": 256, "outer": 9216, "rows": 512}
PRODUCTS = [case for case in CASES["linear"] if case.name.startswith(NAMES)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=() if case.name.startswith(QUICK) else slow) for case in PRODUCTS]
)
def test_each_family_computes_the_product(case: Case, family: str) -> None:
    error, _ = run_case(REGISTRY["linear"], case, device_of(family))
    assert error.passed, error


@pytest.mark.slow
@pytest.mark.parametrize("rows", [9, 17, 33, 100, 300])
@pytest.mark.parametrize("kind", [*(name for name in FORMATS if name not in WITHOUT_LINES), "F16"])
def test_groups_of_waves_multiply_each_format(kind: str, rows: int) -> None:
    """Of more rows of the matrix than a block has, in splits of unequal length, with a bias and added to."""
    rng = np.random.default_rng(rows)
    device = device_of("TILE_MMA, groups")
    blocks = QuantTensor.random("Q4_0" if kind == "F16" else kind, 150, 1280, rng)
    weight = device.asarray(blocks.dequantize(), np.float16) if kind == "F16" else blocks.on(device)
    x = (rng.standard_normal((rows, 1280)) / 30).astype(np.float16)
    bias, before = (rng.standard_normal(shape).astype(np.float32) for shape in (150, (rows, 152)))
    y = device.asarray(before)
    matmul(device, device.asarray(x), weight, device.asarray(bias), y, 1, accumulate=True)
    product = x.astype(np.float64) @ blocks.dequantize().T.astype(np.float64)
    expected = before.astype(np.float64)
    expected[:, 1:151] += product + bias
    np.testing.assert_allclose(np.asarray(y), expected, rtol=0, atol=4e-3 * product.std() + 1e-6)
    float_kernel = "matmul_wgmma" if rows <= 64 else "matmul_tma"
    many = "matmul_wgmma_quant" if rows <= 32 else "matmul_wgmma_quant_many"
    is_few = kind in FEW_FORMATS and kind != "Q8_0" and rows <= FEW_ROWS[-1]
    of_blocks = "matmul_mma_quant" if is_few else many
    assert {variant.file for variant in device.variants} >= {float_kernel if kind == "F16" else of_blocks}


@pytest.mark.parametrize("wave", [32, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", [route_case("ties", 2, 64, 96, 7, distinct=3), route_case("many", 33, 64, 96, 8)])
def test_a_router_lists_the_tiles_of_its_choice(case: Case, wave: int) -> None:
    """Pairs are sorted by expert; tiles name an expert, the place of the first pair, and how many there are."""
    device = Harness(wave, seed=1)
    given = on(route, inputs(route, case, device), device)
    for _ in range(2):  # counters are as before
        grouped, _ = device.launch(route, given, {**case.options, "tiles": "allowed"})
    chosen, pairs, tiles = (device.to_numpy(each) for each in (grouped.chosen, grouped.pairs, grouped.tiles))
    np.testing.assert_array_equal(pairs, np.argsort(chosen.reshape(-1), kind="stable"))
    wanted, first = [], 0
    for expert, count in zip(*np.unique(chosen, return_counts=True), strict=True):
        wanted += [(expert, first + at, min(grouped.rows, count - at), 0) for at in range(0, count, grouped.rows)]
        first += count
    np.testing.assert_array_equal(tiles[: len(wanted)], wanted)
    assert not tiles[len(wanted) :, 2].any()


@pytest.mark.parametrize("bits", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FC00000])
@pytest.mark.parametrize(("rows", "order"), [(1, "any"), (3, "any"), (3, "fixed")])
def test_a_router_whose_logits_are_not_numbers_chooses_an_expert_once(rows: int, order: str, bits: int) -> None:
    device, rng = Harness(32, seed=1), np.random.default_rng(0)
    normed = Normed(rng.standard_normal((rows, 64)).astype(np.float32), None, np.ones(64, np.float32), None, 1e-5, True)
    weight = rng.standard_normal((9, 64)).astype(np.float32)
    bias = np.where(np.arange(9) == 4, np.array(bits, np.uint32).view(np.float32), np.float32(0))
    given = on(route, (normed, Router(weight, bias, None, None, 9, 1, 1, 1.0)), device)
    options = {"scores": "softmax", "weights": "renormalized", "order": order, "tiles": "never"}
    chosen, _ = device.launch(route, given, options)
    np.testing.assert_array_equal(np.sort(device.to_numpy(chosen)), np.tile(np.arange(9), (rows, 1)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rows", "sizes", "how"),
    [
        ("Q4_K", 8, (2304, 1280, 2, 2), {"extras": "residual bias"}),  # x is placed in parts, in each round
        ("Q4_K", 12, (512, 512, 9, 1), {"among": 9, "partials": "allowed"}),
        ("Q5_K", 7, (512, 256, 3, 2), {"weighs": "input", "extras": "residual"}),
        ("Q6_K", 5, (512, 768, 4, 2), {"activation": "gelu"}),
        ("MXFP4", 5, (320, 192, 4, 2), {"extras": "bias"}),  # lines that are not whole
        ("MXFP4", 8, (256, 512, 3, 1), {"among": 1}),
        ("Q4_0", 20, (256, 256, 5, 1), {"among": 2}),  # more rows of an expert than a tile has
        ("Q4_1", 5, (512, 256, 4, 2), {"activation": "relu2"}),
        ("Q4_G128", 7, (512, 768, 3, 2), {"extras": "residual"}),
        ("Q8_0", 6, (512, 256, 4, 1), {"among": 1, "extras": "residual"}),
    ],
)
def test_experts_by_tiles_of_few_rows(kind: str, rows: int, sizes: tuple[int, ...], how: dict[str, Any]) -> None:
    device = Harness(seed=2, tile="TILE_MMA", **FAMILIES["TILE_MMA, groups"])  # its first wave is not the last
    error, _ = run_case(REGISTRY["experts"], experts_case("by tiles", rows, *sizes, format=kind, **how), device)
    assert error.passed, error
    assert "expert_mma_quant" in {variant.file for variant in device.variants}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rows", "sizes", "how"),
    [
        ("Q8_0", 21, (768, 256, 2, 1), {"among": 1, "extras": "residual"}),  # experts without rows; tiles of 32
        ("Q5_0", 40, (512, 512, 3, 2), {"weighs": "input", "extras": "bias residual"}),  # tiles of 64
        ("MXFP4 MXFP4 Q6_K", 65, (256, 768, 2, 1), {"among": 1, "extras": "bias", "partials": "allowed"}),
        ("Q6_K Q6_K Q4_0", 260, (256, 256, 2, 1), {"among": 1, "activation": "gelu"}),  # of 128, the last of few
        *((kind, 24, (512, 256, 2, 2), {}) for kind in FORMATS if kind not in WITHOUT_LINES),
    ],
)
def test_experts_by_tiles_of_many_rows(kind: str, rows: int, sizes: tuple[int, ...], how: dict[str, Any]) -> None:
    """Of so many numbers some are further off than a case allows: two products round."""
    device = device_of("TILE_MMA, groups")
    error, _ = run_case(REGISTRY["experts"], experts_case("by tiles", rows, *sizes, format=kind, **how), device)
    assert error.share < 2, error
    assert "expert_wgmma_quant" in {variant.file for variant in device.variants}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["Q4_K", "F16"])
@pytest.mark.parametrize("rows", [2, pytest.param(40, marks=pytest.mark.slow), 70])
def test_rows_do_not_see_each_other(rows: int, kind: str, family: str) -> None:
    rng = np.random.default_rng(0)
    device = device_of(family)
    blocks = QuantTensor.random("Q4_K", 40, 512, rng)
    weight = blocks.on(device) if kind == "Q4_K" else device.asarray(blocks.dequantize(), np.float16)
    x = rng.standard_normal((rows, 512)).astype(np.float16)
    results = []
    for others in (x, np.full_like(x, np.nan)):
        y = device.empty((rows, 40), np.float32)
        matmul(device, device.asarray(np.concatenate([x[:1], others[1:]])), weight, None, y)
        results.append(np.asarray(y[0]))
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize(
    ("rows", "width", "is_rms", "adds", "kinds"),
    [
        (33, 512, True, True, ("Q4_K",)),
        (70, 512, True, False, ("Q6_K",)),
        pytest.param(33, 4352, True, True, ("Q4_K", "Q6_K"), marks=pytest.mark.slow),
        (200, 256, False, True, ("Q6_K", "Q4_K")),
        (40, 512, False, False, ("Q4_K", "F16")),
    ],
)
def test_a_norm_writes_the_order_that_products_take(
    rows: int, width: int, is_rms: bool, adds: bool, kinds: tuple[str, ...]
) -> None:
    """The same numbers as an array of them gives, to the bit, without a launch between the norm and the products."""
    rng = np.random.default_rng(rows)
    blocks = [QuantTensor.random("Q5_0" if kind == "F16" else kind, 20, width, rng) for kind in kinds]
    sizes = ((rows, width), (rows, width), (width,), (width,))
    x, addend, scale, shift = (rng.standard_normal(size).astype(np.float32) for size in sizes)
    results = []
    for is_apart in (True, False):
        device = device_of("TILE_MMA, groups")
        parts = tuple(
            device.asarray(each.dequantize(), np.float16) if kind == "F16" else each.on(device)
            for kind, each in zip(kinds, blocks, strict=True)
        )
        arrays = (device.asarray(each) for each in (x, addend, scale, shift))
        normed = _normed(*arrays, is_rms=is_rms, adds=adds)
        operand = device.launch(norm, (normed,), {"out": "act"}) if is_apart else normed
        weight = Stack(parts) if len(parts) > 1 else parts[0]
        y = device.launch(linear, (operand, weight, None, None), {"glu": "none", "split_k": "never"})
        results.append(device.to_numpy(y))
        files = {variant.file for variant in device.variants}
        assert "matmul_wgmma_quant_many" in files
        assert ("reorder_x" in files) == (is_apart or "F16" in kinds)
    np.testing.assert_array_equal(*results)
    wide = (each.astype(np.float64) for each in (x, addend, scale, shift))
    product = norm.reference(_normed(*wide, is_rms=is_rms, adds=adds), out="act")
    product = product @ np.concatenate([each.dequantize() for each in blocks]).T
    np.testing.assert_allclose(results[1], product, rtol=0, atol=4e-3 * product.std())


def _normed(x: Any, addend: Any, scale: Any, shift: Any, *, is_rms: bool, adds: bool) -> Normed:
    return Normed(x, addend if adds else None, scale, None if is_rms else shift, 1e-5, is_rms)


@pytest.mark.parametrize(("rows", "kinds"), [(33, ("Q6_K", "Q4_K")), (200, ("Q4_K", "Q6_K"))])
def test_a_gate_is_stored_in_the_orders_that_the_product_behind_it_takes(rows: int, kinds: tuple[str, str]) -> None:
    """The same numbers as an array of the gated product gives, to the bit, without a launch between the two."""
    rng = np.random.default_rng(rows)
    up, down = (QuantTensor.random(kind, outer, 256, rng, 1e-3) for kind, outer in zip(kinds, (512, 20), strict=True))
    x, scale = rng.standard_normal((rows, 256)).astype(np.float32), rng.standard_normal(256).astype(np.float32)
    results = []
    for split_k in ("never", "allowed"):
        device = device_of("TILE_MMA, groups")
        operand = Normed(device.asarray(x), None, device.asarray(scale), None, 1e-5, True)
        arguments = operand, up.on(device), None, None
        gated = device.launch(linear, arguments, {"glu": "silu", "split_k": split_k})
        assert (type(gated) is Ordered) == (split_k == "allowed")
        y = device.launch(linear, (gated, down.on(device), None, None), {"glu": "none", "split_k": "never"})
        results.append(device.to_numpy(y))
        assert ("reorder_x" in {variant.file for variant in device.variants}) == (split_k == "never")
    np.testing.assert_array_equal(*results)
    wide = norm.reference(Normed(x.astype(np.float64), None, scale, None, 1e-5, True), out="act")
    gated = linear.reference(wide, up, None, None, glu="silu", split_k="never")
    product = linear.reference(gated, down, None, None, glu="none", split_k="never")
    np.testing.assert_allclose(results[1], product, rtol=2e-3, atol=1e-2 * product.std())


@pytest.mark.parametrize(("rows", "expected"), [(256, Ordered), (300, Recorded)])
def test_a_gate_of_more_rows_is_stored_as_blas_takes_it(rows: int, expected: type) -> None:
    """For `forge tune` may find tiles faster for the gate, and BLAS for the product behind it."""
    device = Recorder("sm_90", has_wgmma=True)
    device.tuning = Choices("sm_90", {("product", KERNELS["product"].class_of(_GATE)): {"BLAS": 0}})
    rng = np.random.default_rng(0)
    up, down = (QuantTensor.random("Q4_K", *shape, rng).on(device) for shape in ((9216, 256), (256, 4608)))
    operand = Normed(device.empty((rows, 256), np.float32), None, device.empty((256,), np.float32), None, 1e-5, True)
    gated = device.launch(linear, (operand, up, None, None), {"glu": "silu", "split_k": "allowed"})
    assert type(gated) is expected
    device.launch(linear, (gated, down, None, None), {"glu": "none", "split_k": "never"})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("activation", ["silu", pytest.param("gelu", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("rows", "outer"), [(3, 70), (40, 64), (129, 300)])
def test_a_gate_is_in_the_product(rows: int, outer: int, activation: str, family: str) -> None:
    rng = np.random.default_rng(rows)
    device = device_of(family)
    x, weight = rng.standard_normal((rows, 96)), rng.standard_normal((outer, 96)) / 10
    bias = rng.standard_normal(outer).astype(np.float32)
    x, weight = x.astype(np.float16), weight.astype(np.float16)
    gated = device.empty((rows, outer // 2), np.float16)
    arrays = (device.asarray(array) for array in (x, weight, bias))
    matmul(device, *arrays, gated, glu=activation)
    product = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
    expected = REGISTRY["act_and_mul"].reference(product, activation=activation)
    np.testing.assert_allclose(np.asarray(gated, np.float64), expected, rtol=2e-3, atol=2e-3)


MANY_ROWS = [case for case in CASES["linear"] if case.name.startswith("split-K") and "M40" in case.name]


@pytest.mark.parametrize("case", MANY_ROWS, ids=[case.name for case in MANY_ROWS])
def test_mi200_may_take_subnormals_for_zeros(case: Case) -> None:
    """Among many numbers some are: x is kept small in these cases."""
    error, _ = run_case(linear, case, device_of("TILE_MFMA, MI200"))
    assert error.share < 0.75, error


TILE_OPS = ("linear", "decode_attention", "paged_attention")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["TILE_SCALAR", "TILE_SCALAR, GFX9", "TILE_MFMA, MI200"])
def test_all_cases_of_what_uses_tiles(family: str) -> None:
    """On families that neither test_harness.py nor the virtual GPUs play."""
    files = set()
    for name in TILE_OPS:
        for case in CASES[name]:
            device = device_of(family)
            error, _ = run_case(REGISTRY[name], case, device)
            assert error.passed, error
            files |= {variant.file for variant in device.variants}
    assert {"matmul", "attention_decode", "attention_prefill"} <= files


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 1.0])
@pytest.mark.parametrize("glu", ["none", "gelu"])
def test_slack_is_what_subnormals_make_up(glu: str, scale: float) -> None:
    """Of products in float64, once with zeros in their places; without any there is none."""

    def flushed(numbers: np.ndarray) -> np.ndarray:
        return np.where(np.abs(numbers) < np.finfo(np.float16).smallest_normal, 0.0, numbers)

    rng = np.random.default_rng(0)
    options = {"glu": glu, "split_k": "never"}
    x = np.abs(rng.standard_normal((50, 64)) * scale).astype(np.float16).astype(np.float64)
    weight = np.abs(rng.standard_normal((40, 64)) * 1e3).astype(np.float16).astype(np.float64)
    for given in ((x, weight), (weight, x)):
        exact, lossy = (linear.reference(*arrays, None, None, **options) for arrays in (given, map(flushed, given)))
        slack, error = linear.gpu_slack(*given, None, None, **options), np.abs(exact - lossy)
        assert (error <= slack * (1 + 1e-9)).all()
        if scale == 1e-5:
            assert error.max() > 0.2 * slack.max() > 0
    normal = np.full((2, 64), 0.5)
    assert not linear.gpu_slack(normal, normal, None, None, **options).any()
