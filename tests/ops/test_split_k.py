"""Split-K partials: ops that read a product as a sum, against the sum, and how a product is split."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from harness import COMPILER, Harness

from forge.devtools.cases import CASES
from forge.devtools.cases.decode_attention import decode_case
from forge.devtools.verify import compare
from forge.ops.activation import add
from forge.ops.decode_attention import decode_attention
from forge.ops.linear import linear
from forge.ops.matmul import Partials
from forge.ops.norm import Normed, norm

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no clang++: scripts/install-toolchain installs it")

ALLOWED = {"glu": "none", "split_k": "allowed"}


def split(device: Harness, array: np.ndarray, count: int) -> Partials:
    """As many partials, of which the array is the sum but for rounding."""
    parts = np.random.default_rng(5).standard_normal((count - 1, *array.shape)).astype(np.float32)
    return Partials(device.asarray(np.concatenate([parts, (array - parts.sum(axis=0))[None]])))


def uploaded(device: Harness, value: Any) -> Any:
    return device.asarray(value) if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("wave", [32, 64])
@pytest.mark.parametrize("splits", [1, 2, 8, 11])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_add_partials_to_the_residual_stream(kind: str, splits: int, wave: int) -> None:
    device = Harness(wave)
    cases = [case for case in CASES["norm"] if case.name.startswith(f"pending {kind}")][:6]
    assert len(cases) == 6
    for number, case in enumerate(cases):
        (given,) = case.make(np.random.default_rng(number))
        (exact,) = norm.map(lambda _, value: np.array(value, np.float64) if np.ndim(value) else value, (given,))
        expected = norm.reference(exact, out="act"), exact.x
        (normed,) = norm.map(lambda _, value: uploaded(device, value), (given,))
        y = device.launch(norm, (replace(normed, pending=split(device, given.pending, splits)),), {"out": "act"})
        for got, want in zip((y, normed.x), expected, strict=True):
            assert compare(device.to_numpy(got), want, 2e-3, 2e-3)[1] <= 1, case.name


@pytest.mark.parametrize("splits", [1, 2, 9])
def test_the_stream_that_a_hook_sees_has_partials_in_the_order_of_norms(splits: int) -> None:
    device, rng = Harness(32), np.random.default_rng(0)
    x, pending = (rng.standard_normal((3, 1500)).astype(np.float32) for _ in range(2))
    partials, stream = split(device, pending, splits), device.asarray(x.copy())
    seen = device.to_numpy(device.launch(add, (stream, partials), {}))
    np.testing.assert_array_equal(device.to_numpy(stream), x)
    normed = Normed(stream, partials, device.asarray(np.ones(1500, np.float32)), None, 1e-5, True)
    device.launch(norm, (normed,), {"out": "act"})
    np.testing.assert_array_equal(seen, device.to_numpy(stream))  # which the norm has added them to
    np.testing.assert_allclose(seen, x + pending, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wave", [32, 64])
@pytest.mark.parametrize("style", ["neox", "interleaved"])
@pytest.mark.parametrize("splits", [1, 5, 16])
def test_attention_adds_partials_of_its_product(splits: int, style: str, wave: int) -> None:
    case = decode_case("", [300, 1, 17], (4, 2), 64, style, extras=True)
    given = case.make(np.random.default_rng(1))
    args = decode_attention.map(lambda arg, value: value.astype(np.float16) if arg.dtype == "act" else value, given)
    device, found = Harness(wave), []
    for count in (None, splits):
        qkv, *rest = decode_attention.map(lambda _, value: uploaded(device, value), args)
        qkv = qkv if count is None else split(device, args[0], count)
        result = device.launch(decode_attention, (qkv, *rest), {"style": style})
        found.append(
            [device.to_numpy(value).astype(np.float64) for value in (result, *decode_attention.written((qkv, *rest)))]
        )
    for got, want in zip(*found, strict=True):
        np.testing.assert_allclose(got, want, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize(("rows", "cores", "splits"), [(5, 1, 2), (5, 2, 4), (5, 64, 8), (40, 64, 16), (40, 1, 4)])
def test_a_product_is_split_to_fill_the_device_and_no_further(rows: int, cores: int, splits: int) -> None:
    """Of 32 steps of the inner dimension, two at least for each split."""
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal((count, 4096)).astype(np.float16) for count in (rows, 16))
    device = Harness(32, cores=cores)
    found = device.launch(linear, (device.asarray(x), device.asarray(weight), None, None), ALLOWED)
    assert found.parts.shape == (splits, rows, 16)
    product = device.to_numpy(found.parts).sum(axis=0)
    np.testing.assert_allclose(product, x.astype(np.float64) @ weight.T.astype(np.float64), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", [5, 40])
def test_a_product_by_wgmma_is_split_too(rows: int) -> None:
    rng = np.random.default_rng(1)
    x, weight = (rng.standard_normal((count, 4096)).astype(np.float16) for count in (rows, 70))
    device = Harness(32, 1, cores=8, groups=True)
    found = device.launch(linear, (device.asarray(x), device.asarray(weight), None, None), ALLOWED)
    assert {variant.file for variant in device.variants} == {"matmul_wgmma"}
    assert found.parts.shape[0] > 2
    product = device.to_numpy(found.parts).sum(axis=0)
    np.testing.assert_allclose(product, x.astype(np.float64) @ weight.T.astype(np.float64), rtol=1e-3, atol=1e-3)
