"""Every case of every op: what runs on NumPy arrays in float32, against the reference in float64."""

from __future__ import annotations

import copy
import zlib

import numpy as np
import pytest

from forge.devtools.cases import CASES, all_cases
from forge.ops.op import REGISTRY, Case, Op
from forge.ops.quant import QuantTensor

PARAMS = [pytest.param(op, case, id=f"{op.name}-{case.name}") for op, case in all_cases()]


def inputs(op: Op, case: Case) -> tuple:
    return case.make(np.random.default_rng(zlib.crc32(f"{op.name} {case.name}".encode())))


def as_float64(value: object) -> object:
    return value.astype(np.float64) if isinstance(value, np.ndarray) and value.dtype == np.float32 else value


def results_of(value: object) -> tuple:
    return () if value is None else value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize(("op", "case"), PARAMS)
def test_op_equals_its_reference_in_float64(op: Op, case: Case) -> None:
    args = inputs(op, case)
    exact = op.map(lambda _, value: as_float64(copy.deepcopy(value)), args)
    before = copy.deepcopy(args)

    results = results_of(op(*args, **case.options))
    expected = results_of(op.reference(*exact, **case.options))

    op.check(args, case.options, results)
    assert len(results) == len(op.returns) == len(expected)
    for arg, result, want in zip(op.returns, results, expected, strict=True):
        compare(op, arg.name, result, want)
    for (arg, value), (_, want), (_, old) in zip(op.flat(args), op.flat(exact), op.flat(before), strict=True):
        if isinstance(value, np.ndarray):
            if arg.inout:
                compare(op, arg.name, value, want)
            else:
                np.testing.assert_array_equal(value, old, err_msg=f"{op.name} wrote {arg.name}")


def compare(op: Op, name: str, got: np.ndarray, want: np.ndarray) -> None:
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    if want.dtype.kind == "f":
        np.testing.assert_allclose(got, want, rtol=op.rtol, atol=op.atol, err_msg=f"{op.name}: {name}")
    else:
        np.testing.assert_array_equal(got, want, err_msg=f"{op.name}: {name}")


@pytest.mark.parametrize(("op", "case"), [p for p in PARAMS if p.values[1].expected is not None])
def test_reference_equals_results_computed_by_hand(op: Op, case: Case) -> None:
    results = results_of(op.reference(*inputs(op, case), **case.options))
    assert len(results) == len(case.expected)
    for result, want in zip(results, case.expected, strict=True):
        np.testing.assert_allclose(result, want, rtol=2e-7, atol=0)


@pytest.mark.parametrize(("op", "case"), [p for p in PARAMS if p.values[1].written is not None])
def test_reference_writes_what_was_computed_by_hand(op: Op, case: Case) -> None:
    args = inputs(op, case)
    op.reference(*args, **case.options)
    for value, want in zip(op.written(args), case.written, strict=True):
        np.testing.assert_allclose(value, want, rtol=2e-7, atol=0)


def test_every_op_has_a_case_and_a_docstring() -> None:
    assert CASES.keys() == REGISTRY.keys()
    for name, op in REGISTRY.items():
        assert CASES[name], name
        assert op.reference.__doc__, name
        assert len({case.name for case in CASES[name]}) == len(CASES[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, eps: (x, w[:-1], eps), "weight has shape"),
        (lambda x, w, eps: (x.astype(np.int32), w, eps), "x must be f32"),
        (lambda x, w, eps: (x[0], w, eps), "x must have dims"),
        (lambda x, w, eps: (None, w, eps), "x is required"),
        (lambda x, w, eps: (x, w, "tiny"), "eps must be a number"),
        (lambda x, w, eps: (x, w), "takes 3 arguments"),
    ],
)
def test_check_refuses_what_does_not_fit_the_declaration(change, message: str) -> None:
    op = REGISTRY["rmsnorm"]
    with pytest.raises((TypeError, ValueError), match=message):
        op.check(change(np.ones((2, 8), np.float32), np.ones(8, np.float32), 1e-5), {"out": "act"})


def test_quantized_linear_reads_each_row_of_blocks() -> None:
    weight = QuantTensor.random("Q4_K", 5, 256, np.random.default_rng(0))
    one_hot = np.eye(256, dtype=np.float32)
    y = REGISTRY["linear"](one_hot, weight, None, None)  # (256, 5)
    np.testing.assert_array_equal(y.T, weight.dequantize())
