"""Every case of every kernel on the CPU harness, at both wave sizes, against the reference in float64."""

from __future__ import annotations

from typing import Any
from zlib import crc32

import numpy as np
import pytest
from harness import COMPILER, Harness

from forge.devtools.cases import CASES, all_cases
from forge.devtools.cases.attention import attention_case
from forge.devtools.cases.case import Case
from forge.devtools.cases.decode_attention import decode_case
from forge.devtools.cases.linear import quantized_case
from forge.devtools.verify import expect, run_case
from forge.errors import UnsupportedError
from forge.ops import linear as linear_op
from forge.ops.attention import paged_attention
from forge.ops.decode_attention import decode_attention
from forge.ops.op import REGISTRY, Op
from forge.tuning.lds import WITHOUT_LINES

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no clang++: scripts/install-toolchain installs it")

PARAMS = [pytest.param(op, case, id=f"{op.name}-{case.name}") for op, case in all_cases() if op.run_gpu]
_SLOW = tuple(f"{name} M" for name in WITHOUT_LINES if name not in ("IQ3_XXS", "IQ1_M"))
"""Products of formats whose codes the quick tests meet in tables alone."""
_QUICK = [param for param in PARAMS if not param.values[1].name.startswith(_SLOW) and param.id != "experts-T1 wide"]
QUICK = [param for param in _QUICK if "Q4_G32 " not in param.values[1].name]  # whose blocks are like Q4_G128's


def result(op: Op, case: Case, wave: int, seed: int, expected: Any) -> Any:
    """The seed orders the waves. Arrays lie behind a fence with seed 0, and in front of one with seed 1."""
    device = Harness(wave, seed)
    device.begins = seed == 0
    error, got = run_case(op, case, device, expected)
    assert error.passed, f"wave {wave}, seed {seed}: {error}"
    return got


@pytest.mark.parametrize(("op", "case"), QUICK)
def test_kernel_equals_its_reference(op: Op, case: Case) -> None:
    """Each case meets one wave size, one order of waves and one fence, by its name. The slow test below meets all."""
    wave, seed = divmod(crc32(f"{op.name}-{case.name}".encode()) % 4, 2)
    result(op, case, (32, 64)[wave], seed, expect(op, case, Harness(32)))


@pytest.mark.slow
@pytest.mark.parametrize(("op", "case"), PARAMS)
def test_results_do_not_depend_on_the_order_of_waves(op: Op, case: Case) -> None:
    expected = expect(op, case, Harness(32))
    for wave in (32, 64):
        first, second = (result(op, case, wave, seed, expected) for seed in (0, 1))
        for one, other in zip(first, second, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=f"wave {wave}: depends on the order of waves")


class WithoutBlas(Harness):
    has_blas = False

    def matmul(self, *args: object, **options: object) -> None:
        raise AssertionError("there is no BLAS")


MANY_ROWS = [case for case in CASES["linear"] if case.name.startswith(("M257", "Q4_K M257", "Q8_0 M257", "stack M257"))]


@pytest.mark.parametrize("case", MANY_ROWS, ids=[case.name for case in MANY_ROWS])
def test_products_of_many_rows_without_blas(case: Case) -> None:
    error, _ = run_case(REGISTRY["linear"], case, WithoutBlas(32))
    assert error.passed, error


@pytest.mark.parametrize("name", ["Q4_0", "Q2_K", "Q6_K"])
def test_products_of_many_rows_take_a_matrix_apart_some_rows_at_a_time(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_op, "_SCRATCH_WEIGHTS", 6 * 256)
    error, _ = run_case(REGISTRY["linear"], quantized_case(name, 257, 256, 17), Harness(32))
    assert error.passed, error


@pytest.mark.parametrize(
    ("op", "case"),
    [
        (paged_attention, attention_case("prefill", [2], [3], (1, 1), 520, 16)),
        (paged_attention, attention_case("deterministic", [2], [3], (1, 1), 264, 16, is_deterministic=True)),
        (decode_attention, decode_case("decode", [3], (1, 1), 264)),
    ],
    ids=lambda value: value.name,
)
def test_heads_that_a_kernel_cannot_hold_are_refused(op: Op, case: Case) -> None:
    dim, most = (520, 512) if case.name == "prefill" else (264, 256)
    with pytest.raises(UnsupportedError, match=f"heads of {dim} numbers have no kernel: {most} is the most"):
        run_case(op, case, Harness(32))


@pytest.mark.parametrize("wave", [pytest.param(32, marks=pytest.mark.slow), 64])
def test_a_long_context_in_most_parts_and_a_short_one_beside_it(wave: int) -> None:
    """As many parts as one block joins; then again, with the counters that the first launch left."""
    case = decode_case("long", [8000, 70, 5000], (4, 1), 64)
    device = Harness(wave, cores=400)
    for _ in range(2):
        error, _ = run_case(decode_attention, case, device)
        assert error.passed, error
        assert not np.asarray(device.counters(3)).any()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_decode_row_does_not_depend_on_the_rows_beside_it(seed: int) -> None:
    device = Harness(32, seed, cores=40)
    lengths = [300, 1, 130, 700]
    given = decode_case("rows", lengths, (4, 2), 64).make(np.random.default_rng(3))
    rows = {"qkv", "lengths", "slot_mapping", "page_table"}
    found = []
    for order in ([0, 1, 2, 3], [3, 0, 2, 1]):
        args = decode_attention.map(lambda arg, v: v[order] if arg.name in rows else v, given)  # noqa: B023
        args = decode_attention.map(lambda arg, v: v.astype(np.float16) if arg.dtype == "act" else v, args)
        args = decode_attention.map(lambda _, v: device.asarray(v) if isinstance(v, np.ndarray) else v, args)
        found.append(np.asarray(decode_attention(*args, style="neox"))[np.argsort(order)])
    np.testing.assert_array_equal(*found)
