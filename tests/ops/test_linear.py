"""Which kernels compute a product: the dispatcher's choices, by rows, operand and matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from forge.backend import sources
from forge.devtools.recorder import Recorder
from forge.formats.ggml import GGMLType
from forge.ops.linear import linear
from forge.ops.matmul import Partials
from forge.ops.norm import Normed
from forge.ops.quant import Packed, Stack
from forge.tuning import Choices


class Launches(Recorder):
    """A GPU of one compute unit, on which no product is split unless it has many."""

    def __init__(self, num_cus: int = 1) -> None:
        super().__init__("gfx1100", num_cus)
        self.functions: list[str] = []

    def _run(self, entry: sources.Entry, grid: tuple[int, ...], args: list[Any]) -> None:
        self.functions.append(entry.function)

    def matmul(self, x: Any, weight: Any, out: Any, column: int, *, accumulate: bool) -> None:
        self.functions.append("BLAS")


def matrix(device: Launches, kind: str, inner: int) -> Any:
    """(64, inner)"""
    if kind == "stack":
        return Stack((matrix(device, "Q4_K", inner), matrix(device, "F16", inner)))
    if kind == "F16":
        return device.empty((64, inner), np.float16)
    return Packed.empty(GGMLType[kind], (64, inner), device)


def operand(device: Launches, kind: str, rows: int, inner: int) -> Any:
    if kind == "array":
        return device.empty((rows, inner), np.float16)
    x, weight = device.empty((rows, inner), np.float32), device.empty((inner,), np.float32)
    pending = x if kind.startswith("pending") else None
    return Normed(x, pending, weight, None, 1e-6, is_rms=kind.endswith("rms"))


@pytest.mark.parametrize(
    ("rows", "kind", "weight", "options", "functions"),
    [
        # one row: all in one launch, where the norm is an RMS norm and nothing is pending
        (1, "array", "F16", "", "matvec_f16"),
        (1, "rms", "F16", "", "matvec_f16"),
        (1, "rms", "F16", "glu", "matvec_f16"),
        (1, "rms", "Q4_K", "glu bias", "matvec_quant"),
        (1, "array", "Q4_K", "residual bias", "matvec_quant"),
        (1, "rms", "stack", "", "matvec_quant matvec_f16"),
        (1, "rms", "stack", "glu", "rmsnorm matvec_quant matvec_f16 act_and_mul"),
        (1, "array", "F16", "glu", "matvec_f16 act_and_mul"),
        (1, "pending rms", "F16", "", "add_rmsnorm matvec_f16"),
        (1, "layer", "F16", "split_k", "layernorm matvec_f16"),
        # a few rows: matrix cores, with the gate inside
        (2, "rms", "F16", "", "rmsnorm matmul"),
        (64, "pending layer", "Q4_K", "glu", "add_layernorm matmul"),
        (5, "array", "stack", "residual", "matmul matmul"),
        (5, "array", "stack", "glu", "matmul matmul act_and_mul"),
        (5, "array", "F16", "split_k", "matmul"),
        (65, "rms", "Q4_K", "glu bias", "rmsnorm matmul"),
        (256, "array", "stack", "split_k", "matmul matmul"),
        # many: BLAS
        (257, "rms", "F16", "", "rmsnorm BLAS"),
        (257, "rms", "Q4_K", "glu bias", "rmsnorm dequantize BLAS add_bias act_and_mul"),
        (257, "array", "stack", "split_k", "dequantize BLAS BLAS"),
        # rows whose sums do not depend on their number: the same kernel for any
        (1, "rms", "F16", "fixed", "rmsnorm matmul"),
        (1, "array", "Q4_K", "fixed residual bias", "matmul"),
        (64, "rms", "stack", "fixed glu", "rmsnorm matmul matmul act_and_mul"),
        (65, "pending rms", "F16", "fixed glu", "add_rmsnorm matmul"),
        (1, "array", "F16", "fixed_allowed", "matmul"),
        (65, "array", "F16", "fixed_allowed", "matmul"),
        (3, "array", "stack", "fixed_allowed", "matmul matmul"),
    ],
)
def test_a_product_is_launched_as_few_kernels_as_there_are_for_it(
    rows: int, kind: str, weight: str, options: str, functions: str
) -> None:
    device = Launches()
    glu = "silu" if "glu" in options else "none"
    words = options.split()
    split_k = "allowed" if "split_k" in words else next((word for word in words if "fixed" in word), "never")
    given = matrix(device, weight, 256)
    bias = device.empty((given.shape[0],), np.float32) if "bias" in options else None
    residual = device.empty((rows, given.shape[0]), np.float32) if "residual" in options else None
    args = operand(device, kind, rows, 256), given, bias, residual
    result = device.launch(linear, args, {"glu": glu, "split_k": split_k})
    assert " ".join(device.functions) == functions
    is_split = split_k == "allowed" and 1 < rows < 257
    assert isinstance(result, Partials) == (is_split or (split_k == "fixed_allowed" and weight != "stack"))
    assert (result is residual) == (residual is not None)
    linear.check(args, {"glu": glu, "split_k": split_k}, (result,))


@pytest.mark.parametrize(
    ("options", "functions"),
    [
        ({"glu": "none", "split_k": "never"}, "matmul split_k_reduce"),
        ({"glu": "gelu", "split_k": "never"}, "matmul split_k_reduce"),
        ({"glu": "none", "split_k": "allowed"}, "matmul"),
    ],
)
def test_a_product_that_leaves_a_large_gpu_idle_is_split(options: dict[str, str], functions: str) -> None:
    device = Launches(num_cus=512)
    device.launch(linear, (operand(device, "array", 5, 4096), matrix(device, "F16", 4096), None, None), options)
    assert " ".join(device.functions) == functions


def test_rows_that_are_not_whole_vectors_have_a_kernel_of_their_own() -> None:
    device = Launches()
    for rows in (1, 5):
        args = operand(device, "rms", rows, 31), device.empty((64, 31), np.float16), None, None
        device.launch(linear, args, {"glu": "silu", "split_k": "allowed"})
    assert " ".join(device.functions) == "rmsnorm linear act_and_mul rmsnorm linear act_and_mul"


def test_a_long_row_is_normalized_before_its_product() -> None:
    """Threads that hold so much of it have no registers for the norm's weights."""
    device = Launches()
    args = operand(device, "rms", 1, 8200), matrix(device, "F16", 8200), None, None
    device.launch(linear, args, {"glu": "none", "split_k": "never"})
    assert device.functions == ["rmsnorm", "matvec_f16"]


@pytest.mark.parametrize(("glu", "split_k"), [("none", "never"), ("silu", "never"), ("none", "allowed")])
def test_without_blas_many_rows_are_one_launch_with_what_is_fused(
    glu: str, split_k: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Launches, "has_blas", False)
    device = Launches()
    args = operand(device, "array", 600, 4096), matrix(device, "Q4_K", 4096), None, None
    device.launch(linear, args, {"glu": glu, "split_k": split_k})
    assert device.functions == ["matmul"]


def test_blocks_of_rows_fill_a_device_before_splits_do() -> None:
    device = Launches(num_cus=8)  # with two blocks on each
    parts = []
    for rows in (64, 256):
        args = operand(device, "array", rows, 4096), matrix(device, "Q4_K", 4096), None, None
        parts.append(len(device.launch(linear, args, {"glu": "none", "split_k": "allowed"}).parts))
    assert parts == [8, 4]


def test_many_rows_are_multiplied_as_the_table_says() -> None:
    device = Launches()
    device.tuning = Choices("", {("product", ("Q4_K", 4096, 512)): {"BLAS": 0}})
    for rows in (300, 600):
        args = operand(device, "array", rows, 256), matrix(device, "stack", 256), None, None
        device.launch(linear, args, {"glu": "none", "split_k": "never"})
    assert " ".join(device.functions) == "matmul BLAS dequantize BLAS BLAS"


def test_a_gated_product_has_no_residual() -> None:
    x, weight = np.ones((1, 8), np.float32), np.ones((8, 8), np.float32)
    for run in (linear, linear.reference):
        with pytest.raises(ValueError, match="a product with glu has no residual"):
            run(x, weight, None, x.copy(), glu="silu", split_k="never")
