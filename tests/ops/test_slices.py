"""Ops that take what they read as the sum of slices, against the sum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from harness import COMPILER, Harness

from forge.devtools.cases import CASES
from forge.devtools.cases.decode_attention import decode_case
from forge.devtools.verify import compare
from forge.ops.decode_attention import decode_attention
from forge.ops.linear import linear_sliced
from forge.ops.matmul import Slices
from forge.ops.norm import add_layernorm, add_rmsnorm
from forge.ops.op import Op

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no clang++: scripts/install-toolchain installs it")

Arrays = tuple[Any, ...]


def sliced(rng: np.random.Generator, array: Any, count: int) -> Any:
    """float32 (count, *array.shape), of which the array is the sum but for rounding."""
    parts = rng.standard_normal((count - 1, *array.shape)).astype(np.float32)
    return np.concatenate([parts, (array - parts.sum(axis=0))[None]])


def computed(device: Harness, op: Op, args: Arrays, place: int, slices: int | None, **options: Any) -> list[Any]:
    """Results, and what is written in place; the argument at a place is given as so many slices."""
    rng = np.random.default_rng(5)
    on_device = [*op.map(lambda _, value: device.asarray(value) if isinstance(value, np.ndarray) else value, args)]
    if slices is not None:
        on_device[place] = Slices(device.asarray(sliced(rng, args[place], slices)))
    result = device.launch(op, tuple(on_device), options)
    return [np.asarray(device.to_numpy(value)) for value in (result, *op.written(on_device))]


@pytest.mark.parametrize("wave", [32, 64])
@pytest.mark.parametrize("slices", [1, 2, 8, 11])
@pytest.mark.parametrize("op", [add_rmsnorm, add_layernorm], ids=lambda op: op.name)
def test_norms_add_slices_to_the_residual_stream(op: Op, slices: int, wave: int) -> None:
    for number, case in enumerate(CASES[op.name][:6]):
        args = case.make(np.random.default_rng(number))
        exact = [np.array(a, np.float64) if isinstance(a, np.ndarray) else a for a in args]
        wanted = [op.reference(*exact), exact[0]]
        for got, want in zip(computed(Harness(wave), op, args, 1, slices), wanted, strict=True):
            assert compare(got, want, 2e-3, 2e-3)[1] <= 1, case.name


@pytest.mark.parametrize("wave", [32, 64])
@pytest.mark.parametrize("style", ["neox", "interleaved"])
@pytest.mark.parametrize("slices", [1, 5, 16])
def test_attention_adds_slices_of_its_product(slices: int, style: str, wave: int) -> None:
    case = decode_case("", [300, 1, 17], (4, 2), 64, style, extras=True)
    given = case.make(np.random.default_rng(1))
    args = decode_attention.map(lambda arg, value: value.astype(np.float16) if arg.dtype == "act" else value, given)
    device = Harness(wave)
    whole, parts = (computed(device, decode_attention, args, 0, count, style=style) for count in (None, slices))
    for got, want in zip(parts, whole, strict=True):
        np.testing.assert_allclose(got.astype(np.float64), want.astype(np.float64), rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize(("rows", "cores", "slices"), [(5, 1, 2), (5, 2, 4), (5, 64, 8), (40, 64, 16), (40, 1, 4)])
def test_a_product_is_cut_to_fill_the_device_and_no_further(rows: int, cores: int, slices: int) -> None:
    """Of 32 turns of the inner dimension, two at least for each slice."""
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal((count, 4096)).astype(np.float16) for count in (rows, 16))
    device = Harness(32, cores=cores)
    found = device.launch(linear_sliced, (device.asarray(x), device.asarray(weight), None), {})
    assert found.parts.shape == (slices, rows, 16)
    product = device.to_numpy(found.parts).sum(axis=0)
    np.testing.assert_allclose(product, x.astype(np.float64) @ weight.T.astype(np.float64), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", [5, 40])
def test_a_product_of_wave_groups_is_cut_too(rows: int) -> None:
    rng = np.random.default_rng(1)
    x, weight = (rng.standard_normal((count, 4096)).astype(np.float16) for count in (rows, 70))
    device = Harness(32, 1, cores=8, groups=True)
    found = device.launch(linear_sliced, (device.asarray(x), device.asarray(weight), None), {})
    assert {variant.file for variant in device.variants} == {"matmul_wgmma"}
    assert found.parts.shape[0] > 2
    product = device.to_numpy(found.parts).sum(axis=0)
    np.testing.assert_allclose(product, x.astype(np.float64) @ weight.T.astype(np.float64), rtol=1e-3, atol=1e-3)
