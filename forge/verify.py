"""Every op's cases on a device, against the references in float64 on NumPy: the errors, case by case."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import forge.ops  # noqa: F401  (fills the registry)
from forge.backend import Backend
from forge.op import REGISTRY, Array, Case, Op


@dataclass(frozen=True, slots=True)
class CaseError:
    """How far one case is from its reference."""

    op: str
    case: str
    max_abs: float
    """Largest absolute difference of all results; inf where one has another shape or should be finite."""
    share: float
    """Largest difference as a share of what the op's tolerances allow, which for integers is nothing."""

    @property
    def passed(self) -> bool:
        return self.share <= 1.0


def verify(backend: Backend) -> Iterator[CaseError]:
    """Run all cases of all ops on a backend, in float32."""
    for op in REGISTRY.values():
        for case in op.cases:
            yield verify_case(op, case, backend)


def verify_case(op: Op, case: Case, backend: Backend) -> CaseError:
    """Run one case; inputs depend on the names of op and case alone."""
    given = case.make(np.random.default_rng(zlib.crc32(f"{op.name} {case.name}".encode())))
    exact = [_float64(copy.deepcopy(arg)) for arg in given]
    args = [backend.asarray(arg) if isinstance(arg, np.ndarray) else arg for arg in given]
    results = _tuple(op(*args, **case.options))
    wanted = _tuple(op.reference(*exact, **case.options))
    pairs = list(zip(results, wanted, strict=True))
    pairs += [(got, want) for arg, got, want in zip(op.args, args, exact, strict=True) if arg.inout and got is not None]
    errors = [_error(op, backend.to_numpy(got), np.asarray(want)) for got, want in pairs]
    return CaseError(op.name, case.name, max(e[0] for e in errors), max(e[1] for e in errors))


def _error(op: Op, got: Array, want: Array) -> tuple[float, float]:
    if got.shape != want.shape or (got.dtype.kind == "f") != (want.dtype.kind == "f"):
        return np.inf, np.inf
    if not want.size:
        return 0.0, 0.0
    same = (got == want) | (np.isnan(got) & np.isnan(want)) if want.dtype.kind == "f" else got == want
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(got.astype(np.float64) - want.astype(np.float64)))
    difference = np.where(np.isnan(difference), np.inf, difference)
    if want.dtype.kind != "f":
        return float(difference.max()), 0.0 if same.all() else np.inf
    allowed = np.where(same, 1.0, op.atol + op.rtol * np.abs(want))
    with np.errstate(invalid="ignore"):
        share = np.where(np.isinf(difference), np.inf, difference / allowed)
    return float(difference.max()), float(share.max())


def _float64(value: Any) -> Any:
    return value.astype(np.float64) if isinstance(value, np.ndarray) and value.dtype == np.float32 else value


def _tuple(value: Any) -> tuple[Any, ...]:
    return () if value is None else value if isinstance(value, tuple) else (value,)
