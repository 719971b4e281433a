"""Every case of every op: what runs on NumPy arrays in float32, against the reference in float64."""

from __future__ import annotations

import contextlib
import copy
import zlib
from dataclasses import replace

import numpy as np
import pytest
from table_rows import row

from forge.devtools.cases import CASES, all_cases
from forge.devtools.cases.case import Case
from forge.ops.kv_cache import KVPages
from forge.ops.linear import linear
from forge.ops.norm import Normed, norm
from forge.ops.op import REGISTRY, Op, op, record
from forge.ops.quant import QuantTensor
from forge.ops.rope import RopeArgs, rope_append_kv

PARAMS = [pytest.param(op, case, id=f"{op.name}-{case.name}") for op, case in all_cases()]


def inputs(op: Op, case: Case) -> tuple:
    return case.make(np.random.default_rng(zlib.crc32(f"{op.name} {case.name}".encode())))


def as_float64(value: object) -> object:
    return value.astype(np.float64) if isinstance(value, np.ndarray) and value.dtype == np.float32 else value


def results_of(value: object) -> tuple:
    return () if value is None else value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("op", dict.fromkeys(op for op, _ in all_cases()), ids=lambda op: op.name)
def test_op_equals_its_reference_in_float64(op: Op) -> None:
    for case in CASES[op.name]:
        with row(case.name):
            equals_its_reference(op, case)


def equals_its_reference(op: Op, case: Case) -> None:
    args = inputs(op, case)
    exact = op.map(lambda _, value: as_float64(copy.deepcopy(value)), args)
    before = copy.deepcopy(args)

    results = results_of(op(*args, **case.options))
    expected = results_of(op.reference(*exact, **case.options))

    op.check(args, case.options, results)
    returned = op.results(case.options)
    assert len(results) == len(returned) == len(expected)
    for arg, result, want in zip(returned, results, expected, strict=True):
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
    for name in REGISTRY:
        assert CASES[name], name
        assert REGISTRY[name].reference.__doc__, name
        assert len({case.name for case in CASES[name]}) == len(CASES[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: (replace(n, weight=n.weight[:-1]),), "weight has shape"),
        (lambda n: (replace(n, x=n.x.astype(np.int32)),), "x must be f32"),
        (lambda n: (replace(n, x=n.x[0]),), "x must have dims"),
        (lambda n: (replace(n, x=None),), "x is required"),
        (lambda n: (replace(n, eps="tiny"),), "eps must be a number"),
        (lambda n: (n.x,), "normed must be Normed, not ndarray"),
        (lambda n: (n, n), "takes 1 arguments"),
    ],
)
def test_check_refuses_what_does_not_fit_the_declaration(change, message: str) -> None:
    normed = Normed(np.ones((2, 8), np.float32), None, np.ones(8, np.float32), None, 1e-5, True)
    with pytest.raises((TypeError, ValueError), match=message):
        norm.check(change(normed), {"out": "act"})


@pytest.mark.parametrize(
    ("outer", "glu", "y", "message"),
    [
        (4, "none", np.ones((2, 4), np.float32), ""),
        (4, "silu", np.ones((2, 2), np.float32), ""),
        (4, "none", np.ones((2, 2), np.float32), r"y has shape \(2, 2\), not \(2, 4\)"),
        (4, "silu", np.ones((2, 4), np.float32), r"y has shape \(2, 4\), not \(2, 2\)"),
        (4, "none", np.ones((2, 4), np.float16), "y must be f32"),
        (3, "silu", np.ones((2, 1), np.float32), "N/2 is not a whole number for N = 3"),
    ],
)
def test_check_knows_the_result_that_a_choice_gives(outer: int, glu: str, y: np.ndarray, message: str) -> None:
    x, weight = np.ones((2, 8), np.float32), np.ones((outer, 8), np.float32)
    fits = contextlib.nullcontext() if not message else pytest.raises((TypeError, ValueError), match=message)
    with fits:
        linear.check((x, weight, None, None), {"glu": glu, "split_k": "never"}, (y,))


def test_quantized_linear_reads_each_row_of_blocks() -> None:
    weight = QuantTensor.random("Q4_K", 5, 256, np.random.default_rng(0))
    one_hot = np.eye(256, dtype=np.float32)
    y = linear(one_hot, weight, None, None, glu="none", split_k="never")  # (256, 5)
    np.testing.assert_array_equal(y.T, weight.dequantize())


def test_functions_attach_below_the_declaration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forge.ops.op.REGISTRY", {})

    @op("x:f32[N] -> y:f32[N]")
    def double(x):
        return x * 2

    assert double.run_cpu is double.reference
    assert double.run_gpu is None

    @double.cpu
    def fast(x):
        return x + x

    @double.gpu
    def launch(device, x):
        return x

    assert (double.run_cpu, double.run_gpu) == (fast, launch)
    np.testing.assert_array_equal(double(np.ones(2, np.float32)), [2, 2])
    with pytest.raises(ValueError, match="op double has two implementations for the CPU"):
        double.cpu(fast)
    with pytest.raises(ValueError, match="op double has two implementations for GPUs"):
        double.gpu(launch)
    with pytest.raises(ValueError, match="op double is declared twice"):
        op("x:f32[N] -> y:f32[N]")(double.reference)


def kv_pages(**changes: object) -> KVPages:
    return replace(KVPages(*np.zeros((2, 3, 4, 1, 8), np.float32)), **changes)


def append_arguments(**changes: object) -> tuple:
    """Arguments of rope_append_kv for two tokens with one q head and one KV head of 8 numbers."""
    rope = RopeArgs(None, None, None, np.zeros((5, 4, 2), np.float32), None, 1e-6)
    numbers = np.zeros(2, np.int32)
    given = {"qkv": np.zeros((2, 24), np.float32), "rope": rope, "positions": numbers, "slot_mapping": numbers}
    return tuple((given | {"kv": kv_pages()} | changes).values())


def test_fields_of_records_are_arguments_of_their_own() -> None:
    args = append_arguments()
    rope_append_kv.check(args, {"style": "neox"})
    of_rope = ["bias", "q_norm", "k_norm", "cos_sin", "query_scale", "eps", "v_norm", "values_are_keys", "rest"]
    names = ["qkv", *of_rope, "positions", "slot_mapping", "k", "v"]
    assert [arg.name for arg, _ in rope_append_kv.flat(args)] == names
    assert [arg.name for arg, _ in rope_append_kv.flat(args) if arg.inout] == ["k", "v"]
    assert [id(array) for array in rope_append_kv.written(args)] == [id(args[-1].k), id(args[-1].v)]
    doubled = rope_append_kv.map(lambda arg, value: value * 2 if arg.name == "eps" else value, args)
    assert (doubled[1].eps, args[1].eps) == (2e-6, 1e-6)
    assert doubled[-1].k is args[-1].k


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv": np.zeros(3, np.float32)}, "kv must be KVPages, not ndarray"),
        ({"kv": kv_pages(v=np.zeros((3, 4, 2, 8), np.float32))}, r"v has shape \(3, 4, 2, 8\), not \(3, 4, 1, 8\)"),
        ({"kv": kv_pages(k=np.zeros((3, 4, 1, 8), np.int32))}, "k must be act, not int32"),
        ({"kv": kv_pages(k=None)}, "k is required"),
        ({"rope": replace(append_arguments()[1], eps=None)}, "eps is required"),
        (
            {"rope": replace(append_arguments()[1], q_norm=np.zeros(9, np.float32))},
            r"k has shape \(3, 4, 1, 8\), not \(3, 4, 1, 9\)",
        ),
    ],
)
def test_check_refuses_records_whose_fields_do_not_fit(change: dict[str, object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^rope_append_kv: {message}$"):
        rope_append_kv.check(append_arguments(**change), {"style": "neox"})


def test_a_record_is_declared_as_its_class_is() -> None:
    with pytest.raises(ValueError, match=r"record KVPages has the fields \['k', 'v'\], and others are declared"):
        record("k:act[N] w:act[N]")(KVPages)
