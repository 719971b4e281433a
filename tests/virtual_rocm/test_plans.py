"""Launches that are prepared once for each signature of an op: checked then, and right with other arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from forge.errors import UnsupportedError
from forge.ops.activation import add, gelu
from forge.ops.attention import AttentionSpec, paged_attention
from forge.ops.kv_cache import KVPages
from forge.ops.linear import linear
from forge.ops.norm import Normed, norm
from forge.ops.op import Op
from forge.tuning import Choices

pytestmark = [pytest.mark.virtual_rocm, pytest.mark.slow]
ON = ("gfx1100",)

Randoms = Callable[..., np.ndarray[Any, Any]]


@pytest.fixture
def randoms() -> Randoms:
    rng = np.random.default_rng(3)
    return lambda *shape, dtype=np.float32: (rng.standard_normal(shape) / 4).astype(dtype)


def test_an_op_is_checked_again_where_shapes_or_dtypes_differ(device: Any) -> None:
    ones = device.asarray(np.ones((2, 8), np.float32))
    for _ in range(2):
        assert (device.to_numpy(add(ones, ones)) == 2).all()
        with pytest.raises(ValueError, match=r"addend has shape \(2, 4\), not \(2, 8\)"):
            add(ones, device.asarray(np.ones((2, 4), np.float32)))
        with pytest.raises(TypeError, match="x must be f32, not float16"):
            gelu(device.asarray(np.ones((2, 8), np.float16)))
        with pytest.raises(ValueError, match="glu must be one of"):
            device.launch(linear, (ones, ones, None, None), {"glu": "relu", "split_k": "never"})


def test_an_array_with_gaps_is_refused_and_one_of_its_shape_without_gaps_is_not(device: Any) -> None:
    x = device.asarray(np.ones((2, 16), np.float32))
    for _ in range(2):
        gelu(device.asarray(np.ones((2, 8), np.float32)))
        with pytest.raises(TypeError, match="C-contiguous"):
            gelu(x[:, ::2])


def test_a_refusal_is_not_kept(device: Any) -> None:
    """Heads that are too long are refused each time, and shorter ones are not."""
    ints = [device.asarray(np.array(values, np.int32)) for values in ([0, 1], [1], [[0]])]
    spec = AttentionSpec(1.0, 0, 0.0)
    for dim, is_allowed in ((1024, False), (64, True), (1024, False)):
        q, pages = (device.asarray(np.ones(shape, np.float16)) for shape in ((1, 1, dim), (1, 16, 1, dim)))
        if is_allowed:
            assert (device.to_numpy(paged_attention(q, KVPages(pages, pages), *ints, spec)) == 1).all()
        else:
            with pytest.raises(UnsupportedError, match="heads of 1024"):
                paged_attention(q, KVPages(pages, pages), *ints, spec)


def _agrees(device: Any, op: Op, args: tuple[Any, ...], **options: str) -> None:
    """What an op does twice in a row, with new arrays each time, is what its reference does, in place too."""
    for _ in range(2):
        args = op.map(lambda _, v: (v * 0.5).astype(v.dtype) if isinstance(v, np.ndarray) else v, args)
        uploaded = op.map(lambda _, v: device.asarray(v) if isinstance(v, np.ndarray) else v, args)
        found = [device.launch(op, uploaded, options), *op.written(uploaded)]
        wide = op.map(lambda _, v: v.astype(np.float64) if isinstance(v, np.ndarray) else v, args)
        expected = [op.reference(*wide, **options), *op.written(wide)]
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(device.to_numpy(one), other, rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("glu", ["none", "silu"])
def test_a_product_behind_a_norm_is_right_with_other_arrays(device: Any, randoms: Randoms, rows: int, glu: str) -> None:
    """Memory that only the launches see, results in new memory and in place, products of BLAS."""
    pending = None if rows == 1 else randoms(rows, 64)
    operand = Normed(randoms(rows, 64), pending, randoms(64), None, 1e-5, True)
    weight, bias = randoms(32, 64, dtype=np.float16), randoms(32)
    residual = None if glu != "none" else randoms(rows, 32)
    _agrees(device, linear, (operand, weight, bias, residual), glu=glu, split_k="never")


class _Maps:
    """Stands for pages whose first numbers a kernel reads by way of their map."""

    name = "maps"
    run_gpu: Any

    def check(self, args: Any, options: Any) -> None:
        pass


def test_a_tensor_map_is_that_of_the_array_at_hand(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its words are an argument of a launch as any other array. No AMD GPU reads them so: `embed` copies them here."""
    made: dict[Any, Any] = {}
    asked: list[int] = []

    def map_of(self: Any, address: int, shape: tuple[int, ...], slots: int) -> Any:
        assert (shape, slots) == ((2, 16, 1, 64), 8)
        asked.append(address)
        return made.setdefault(address, device.asarray(np.full((1, 64), len(made), np.float16)))

    def run(on: Any, pages: Any, ids: Any) -> Any:
        outs = []
        for each in (on.empty((3, 2, 16, 1, 64), np.float16)[1], pages):  # of what the op makes, and of an argument
            outs.append(on.empty((1, 64), np.float32))
            table = on.tensor_map(each, 8).view(np.float16).reshape(1, 64)
            on.run("embed", "embed", 1, ids, table, outs[-1], 64, 1.0, VECTOR=1)
        return tuple(outs)

    monkeypatch.setattr(type(device), "map_of", map_of)
    op = _Maps()
    op.run_gpu = run
    ids = device.asarray(np.zeros(1, np.int32))
    arrays = [device.asarray(np.zeros((2, 16, 1, 64), np.float16)) for _ in range(3)]
    for number in (0, 1, 2, 1):
        asked.clear()
        results = device.launch(op, (arrays[number], ids), {})
        for address, result in zip(asked, results, strict=True):
            assert (device.to_numpy(result) == list(made).index(address)).all()
        assert asked[1] == arrays[number].data.ptr
        others = [each.data.ptr for each in (*arrays, ids, *results)]
        assert all(abs(asked[0] - other) >= 512 and asked[0] - 4096 != other for other in others)


def test_split_products_whose_sum_a_norm_adds_are_right_with_other_arrays(device: Any, randoms: Randoms) -> None:
    rows, width = 4, 256
    for _ in range(2):
        h, weight = randoms(rows, 512, dtype=np.float16), randoms(width, 512, dtype=np.float16)
        x, scale = randoms(rows, width), randoms(width)
        arrays = [device.asarray(array) for array in (h, weight, x, scale)]
        pending = linear(arrays[0], arrays[1], None, None, glu="none", split_k="allowed")
        found = norm(Normed(arrays[2], pending, arrays[3], None, 1e-5, True), out="f32")
        product = h.astype(np.float64) @ weight.astype(np.float64).T
        expected = norm.reference(replace(_WIDE, x=x + product, weight=scale), out="f32")
        np.testing.assert_allclose(device.to_numpy(found), expected, rtol=3e-3, atol=3e-3)


_WIDE = Normed(None, None, None, None, 1e-5, True)


def test_one_array_may_be_several_arguments(device: Any, randoms: Randoms) -> None:
    one, other = randoms(3, 8), randoms(3, 8)
    x, y = device.asarray(one), device.asarray(other)
    for first, second, expected in ((x, x, one + one), (x, y, one + other), (y, y, other + other)):
        np.testing.assert_array_equal(device.to_numpy(add(first, second)), expected)


def test_other_tuned_choices_are_taken_at_once(device: Any, randoms: Randoms, monkeypatch: pytest.MonkeyPatch) -> None:
    from virtual_rocm.runtime import DEVICE

    x, weight = device.asarray(randoms(2, 2048)), device.asarray(randoms(2048))
    operand = Normed(x, None, weight, None, 1e-5, True)
    launched = []
    for threads in (512, 256):
        tuned = {("norm", (2048,)): {"MAX_THREADS": threads}}
        monkeypatch.setattr(device, "tuning", Choices(device.arch, tuned))
        norm(operand, out="act")
        launched.append(DEVICE.launches[-1][0])
    assert ["BLOCK=512" in launched[0], "BLOCK=256" in launched[1]] == [True, True]
