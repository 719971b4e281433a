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


def by_hand(name: str, *args: Any, options: dict[str, Any] | None = None, **computed: tuple[Any, ...]) -> Case:
    """A case whose arrays are lists: int32 of whole numbers, else float32. `computed`: what is expected and written."""

    def array(value: Any) -> Any:
        made = np.array(value)
        return made.astype(np.int32 if made.dtype.kind == "i" else np.float32) if isinstance(value, list) else value

    return Case(name, lambda _: tuple(map(array, args)), options or {}, **computed)
