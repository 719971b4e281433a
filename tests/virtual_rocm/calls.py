"""What all functions of the virtual libraries share: error codes, failures on demand, one call at a time."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from threading import RLock, local
from typing import Any

LOCK = RLock()
UNKNOWN = 999  # hipErrorUnknown


class Failure(Exception):
    """A call that gives an error code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass
class Fault:
    """From the call number `first` on, `count` calls of a function fail."""

    function: str
    code: int
    first: int
    count: float
    runs: bool
    """The call does its work all the same."""
    when: Callable[[], bool] | None = None
    """Which calls count; None: all."""
    calls: int = 0
    met: int = 0

    def is_met(self) -> bool:
        """Count a call; whether it is to fail."""
        if self.when is not None and not self.when():
            return False
        self.calls += 1
        is_met = self.first <= self.calls < self.first + self.count
        self.met += is_met
        return is_met


_FOREVER = float("inf")
THREAD = local()
"""Of each host thread: `last_error`, the code of its last call of HIP's that failed."""
_faults: list[Fault] = []
_calls: dict[str, int] = {}


@contextmanager
def failing(
    function: str,
    code: int,
    *,
    first: int = 1,
    count: float = _FOREVER,
    runs: bool = False,
    when: Callable[[], bool] | None = None,
) -> Iterator[Fault]:
    """Within it calls of a function of ROCm's fail with a code: `count` from the call number `first` on."""
    fault = Fault(function, code, first, count, runs, when)
    _faults.append(fault)
    try:
        yield fault
    finally:
        _faults.remove(fault)


def number_of_calls(function: str) -> int:
    """Since the process started."""
    return _calls.get(function, 0)


def provided(functions: list[Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The functions as C is to call them: None is success, a Failure its code."""
    return {function.__name__: _callable(function) for function in functions}


def _callable(function: Callable[..., Any]) -> Callable[..., Any]:
    name = function.__name__

    @wraps(function)
    def call(*args: Any) -> Any:
        try:
            with LOCK:
                _calls[name] = _calls.get(name, 0) + 1
                met = [fault for fault in _faults if fault.function == name and fault.is_met()]
            if met and not met[0].runs:
                raise Failure(met[0].code)
            with nullcontext() if getattr(function, "in_parallel", False) else LOCK:
                result = function(*args)
            if met:
                raise Failure(met[0].code)
            return 0 if result is None else result
        except Failure as failure:
            if name.startswith("hip") and not name.startswith(("hipblas", "hiprtc")):
                THREAD.last_error = failure.code
            if os.environ.get("VIRTUAL_ROCM_TRACE"):
                print(f"virtual ROCm: {name} gives {failure.code}", file=sys.stderr, flush=True)
            return failure.code
        except BaseException:
            traceback.print_exc()
            return UNKNOWN

    return call
