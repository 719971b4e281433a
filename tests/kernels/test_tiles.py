"""Products on the matrix cores of each family, which the harness plays after the vendors' manuals, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from harness import COMPILER, Harness

import forge.ops  # noqa: F401  (fills the registry)
from forge.op import REGISTRY, Case
from forge.ops.tiles import tile_product
from forge.quant import QuantTensor
from forge.verify import run_case

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no clang++: scripts/install-toolchain installs it")

FAMILIES = {
    "TILE_MMA": 32,
    "TILE_MMA, groups": 32,
    "TILE_MFMA": 64,
    "TILE_WMMA_11": 32,
    "TILE_WMMA_12": 32,
    "TILE_SCALAR": 32,
}
NAMES = ("M2 K96", "M16 K96", "M33 K96", "Q4_K M5", "Q6_K M2", "Q8_0 M2 K576", "Q2_K M2", "stack M5")


def device_of(family: str) -> Harness:
    tile, _, groups = family.partition(", ")
    return Harness(FAMILIES[family], 1, tile=tile, groups=bool(groups))


CASES = [case for case in REGISTRY["linear"].cases if case.name.startswith(NAMES)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_each_family_computes_the_product(case: Case, family: str) -> None:
    error, _ = run_case(REGISTRY["linear"], case, device_of(family))
    assert error.passed, error


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["Q4_K", "F16"])
@pytest.mark.parametrize("rows", [2, 40])
def test_rows_do_not_see_each_other(rows: int, kind: str, family: str) -> None:
    rng = np.random.default_rng(0)
    device = device_of(family)
    blocks = QuantTensor.random("Q4_K", 40, 512, rng)
    weight = blocks.on(device) if kind == "Q4_K" else device.asarray(blocks.dequantize(), np.float16)
    x = rng.standard_normal((rows, 512)).astype(np.float16)
    results = []
    for others in (x, np.full_like(x, np.nan)):
        y = device.empty((rows, 40), np.float32)
        tile_product(device, device.asarray(np.concatenate([x[:1], others[1:]])), weight, None, y)
        results.append(np.asarray(y[0]))
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize(("rows", "outer"), [(3, 70), (40, 64)])
def test_a_gate_is_in_the_product(rows: int, outer: int, activation: str, family: str) -> None:
    rng = np.random.default_rng(rows)
    device = device_of(family)
    x, weight = rng.standard_normal((rows, 96)), rng.standard_normal((outer, 96)) / 10
    bias = rng.standard_normal(outer).astype(np.float32)
    x, weight = x.astype(np.float16), weight.astype(np.float16)
    gated = device.empty((rows, outer // 2), np.float16)
    arrays = (device.asarray(array) for array in (x, weight, bias))
    tile_product(device, *arrays, gated=gated, activation=activation)
    product = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
    expected = REGISTRY[f"{activation}_mul"].reference(product)
    np.testing.assert_allclose(np.asarray(gated, np.float64), expected, rtol=2e-3, atol=2e-3)
