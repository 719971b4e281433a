"""Arrays that users give."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from forge.backend import backend_of
from forge.errors import ForgeError, ParameterError
from forge.keywords import refusal


def numbers(name: str, value: Any) -> npt.NDArray[np.float32]:
    """An array of a user, of whatever device, as float32 on the host. Raises ParameterError for what is none, and for
    numbers that are complex or beyond float32."""
    try:
        host = np.asarray(value if isinstance(value, np.ndarray | list | tuple) else _on_host(value))
        if not host.ndim or host.dtype.kind in "cSUMm":
            raise TypeError
        with np.errstate(over="ignore"):
            found = np.array(host, np.float32)
    except (TypeError, ValueError, OverflowError):
        raise refusal(name, "an array of numbers", value) from None
    if np.isinf(found).any() and not np.isinf(host.astype(np.float64)).any():
        raise ParameterError(f"{name} holds numbers beyond float32", parameter=name)
    return found


def _on_host(value: Any) -> Any:
    try:
        return backend_of(value).to_numpy(value)
    except (ForgeError, TypeError, KeyError, LookupError):
        return np.asarray(value)
