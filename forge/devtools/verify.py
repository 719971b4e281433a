"""Run every op's cases on a device and measure the errors against the references, in float64 on NumPy."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from forge.backend import Backend
from forge.backend.gpu import GPU
from forge.config import Progress
from forge.devtools.cases import all_cases
from forge.devtools.cases.case import Case
from forge.ops.matmul import Partials
from forge.ops.op import Arg, Array, Arrays, Op
from forge.ops.quant import Packed, QuantTensor, Stack


@dataclass(frozen=True, slots=True)
class CaseError:
    """How far one case is from its reference."""

    op: str
    case: str
    max_abs: float
    """Largest absolute difference of all results; inf where a result has another shape or should be finite."""
    share: float
    """Largest difference as a share of what the op's tolerances allow. They allow integers no difference."""
    fault: str = ""
    """A fault that numbers do not show, such as a write outside an array; empty where there is none."""

    @property
    def passed(self) -> bool:
        return self.share <= 1.0 and not self.fault


def verify(backend: Backend, progress: Progress | None = None) -> Iterator[CaseError]:
    """Run all cases of all ops on a backend. Their kernels are compiled first, together."""
    cases = all_cases()
    backend.prepare(lambda: launch(cases, backend), progress)
    for op, case in cases:
        yield verify_case(op, case, backend)


def launch(cases: Iterable[tuple[Op, Case]], backend: Backend) -> None:
    """Run cases without a look at what they compute."""
    for op, case in cases:
        backend.launch(op, on(op, inputs(op, case, backend), backend), case.options)


def verify_case(op: Op, case: Case, backend: Backend) -> CaseError:
    """Run one case. Its inputs depend on the names of op and case alone.

    On a GPU the case runs twice, between guard bands, with results that hold NaN until they are written.
    """
    if not isinstance(backend, GPU):
        return run_case(op, case, backend)[0]
    with backend.guarded() as whole:
        expected = expect(op, case, backend)
        error, results = run_case(op, case, backend, expected)
        again = computed(op, case, expected.inputs, backend)
        if not whole():
            return replace(error, fault="wrote outside an array")
    if any(first.tobytes() != second.tobytes() for first, second in zip(results, again, strict=True)):
        return replace(error, fault="two runs differ")
    return error


def run_case(op: Op, case: Case, backend: Backend, expected: Expected | None = None) -> tuple[CaseError, list[Array]]:
    """The error of one case, and what was computed: results, then arrays written in place.

    expected: what `expect` gave for this case on a backend of the same dtype that copies what it is given.
    """
    given, wanted, rtol, atol = expected or expect(op, case, backend)
    got = computed(op, case, given, backend)
    errors = [compare(value, want, rtol, most) for value, want, most in zip(got, wanted, atol, strict=True)]
    return CaseError(op.name, case.name, max(e[0] for e in errors), max(e[1] for e in errors)), got


class Expected(NamedTuple):
    """What a device gets and should compute."""

    inputs: Arrays
    wanted: list[Array]
    """Results, then arrays written in place."""
    rtol: float
    atol: list[Any]
    """For each of them one number, or one for each element."""


def expect(op: Op, case: Case, backend: Backend) -> Expected:
    """The reference gets the same inputs as the device: rounded to the device's precision, then as float64."""
    given = inputs(op, case, backend)
    exact = op.map(lambda _, value: _float64(copy.deepcopy(value)), given)
    is_half = backend.dtype == np.float16
    slack = op.gpu_slack(*exact, **case.options) if op.gpu_slack and is_half else np.zeros(())
    wanted = [np.asarray(value) for value in (*_tuple(op.reference(*exact, **case.options)), *op.written(exact))]
    rtol, atol = (op.gpu_rtol, op.gpu_atol) if is_half else (op.rtol, op.atol)
    return Expected(given, wanted, rtol, [atol + (slack if slack.shape == want.shape else 0.0) for want in wanted])


def inputs(op: Op, case: Case, backend: Backend) -> Arrays:
    """The arguments in the backend's precision, on the host."""
    given = case.make(np.random.default_rng(zlib.crc32(f"{op.name} {case.name}".encode())))
    return op.map(lambda arg, value: _rounded(arg.dtype, value, backend), given)


def computed(op: Op, case: Case, given: Arrays, backend: Backend) -> list[Array]:
    """Run an op on the backend: its results, then the arrays written in place."""
    args = on(op, given, backend)
    results = _tuple(backend.launch(op, args, case.options))
    op.check(args, case.options, results)
    return [_on_host(backend, value) for value in (*results, *op.written(args))]


def _on_host(backend: Backend, value: Any) -> Array:
    if isinstance(value, Partials):
        return np.asarray(backend.to_numpy(value.parts).sum(axis=0))
    return backend.to_numpy(value)


def _rounded(dtype: str, value: Any, backend: Backend) -> Any:
    """A value in the precision of the backend, where it is a matrix input or a weight."""
    if dtype in ("act", "weight") and isinstance(value, np.ndarray):
        return value.astype(backend.dtype, copy=False)
    return value


def on(op: Op, args: Arrays, backend: Backend) -> Arrays:
    """The arguments on the backend's device."""

    def upload(_: Arg, value: Any) -> Any:
        if isinstance(value, QuantTensor | Packed | Stack):
            return value.on(backend)
        return backend.asarray(value) if isinstance(value, np.ndarray) else value

    return op.map(upload, args)


def compare(got: Array, want: Array, rtol: float, atol: Any) -> tuple[float, float]:
    """The largest difference, absolute and as a share of what is allowed; inf where shape or kind of numbers differ."""
    if got.shape != want.shape or (got.dtype.kind == "f") != (want.dtype.kind == "f"):
        return np.inf, np.inf
    same = (got == want) | (np.isnan(got) & np.isnan(want)) if want.dtype.kind == "f" else got == want
    if same.all():
        return 0.0, 0.0
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(got.astype(np.float64) - want.astype(np.float64)))
    difference = np.where(np.isnan(difference), np.inf, difference)
    if want.dtype.kind != "f":
        return float(difference.max()), np.inf
    with np.errstate(invalid="ignore"):
        allowed = np.where(same, 1.0, atol + rtol * np.abs(want))
        share = np.where(np.isinf(difference), np.inf, difference / allowed)
    return float(difference.max()), float(share.max())


def _float64(value: Any) -> Any:
    return value.astype(np.float64) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value


def _tuple(value: Any) -> tuple[Any, ...]:
    return () if value is None else value if isinstance(value, tuple) else (value,)
