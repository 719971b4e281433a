"""Case: the inputs of an op at one set of sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from forge.ops.op import Array, Arrays


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs of an op at one set of sizes, with results where they are computed by hand."""

    name: str
    make: Callable[[np.random.Generator], Arrays]
    """The positional arguments, floats in float32."""
    options: dict[str, Any] = field(default_factory=dict)
    """The op's choices."""
    expected: tuple[Any, ...] | None = None
    """The results, computed by hand; None = the reference alone says what they are."""
    written: tuple[Any, ...] | None = None
    """What the op writes in place, computed by hand."""


def normal(rng: np.random.Generator, *shape: int) -> Array:
    """float32 random numbers near 1."""
    return rng.standard_normal(shape).astype(np.float32)
