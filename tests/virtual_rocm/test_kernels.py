"""Every case of every kernel, launched by the real CuPy for ROCm and checked against the reference in float64."""

from __future__ import annotations

import pytest

from forge.backend import Backend
from forge.devtools.cases import all_cases
from forge.devtools.cases.case import Case
from forge.devtools.verify import verify_case
from forge.ops.op import Op

pytestmark = [pytest.mark.virtual_rocm, pytest.mark.slow]

CASES = [pytest.param(op, case, id=f"{op.name}-{case.name}") for op, case in all_cases()]


@pytest.mark.parametrize(("op", "case"), CASES)
def test_kernel_equals_its_reference(op: Op, case: Case, device: Backend) -> None:
    error = verify_case(op, case, device)
    assert error.passed, error
