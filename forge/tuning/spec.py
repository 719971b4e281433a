"""What the table is made of: a kernel's classes of shapes, the values chosen for them, and which may be tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

Shape = Mapping[str, Any]
"""Numbers and names that a launch depends on."""
Values = Mapping[str, int]
ShapeClass = tuple[int | str, ...]
"""One class of each of a kernel's `classes`, in their order."""

ANY = 2**31 - 1
"""The class of numbers above all others."""


class Row(NamedTuple):
    """Values for some shapes."""

    when: Mapping[str, int | tuple[str, ...]]
    """The largest numbers, and the names, that a shape may have."""
    values: tuple[int, ...]
    """In the order of the kernel's candidates."""
    arch: str | tuple[str, ...] = ""
    """How the names of the GPUs begin that the row is for."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """What is to be chosen for a kernel."""

    classes: Mapping[str, tuple[int, ...] | tuple[str, ...]]
    """The classes of each part of a shape: numbers up to a limit, in ascending order, or names."""
    candidates: Mapping[str, tuple[int, ...]]
    """What is chosen, and the values that `forge tune` tries for it."""
    allows: Callable[[Shape, Values], bool]
    """Whether the kernel takes the values together for the shapes of a class, and whether they are worth a trial."""
    measured: str
    """Where the rows come from."""
    rows: tuple[Row, ...]
    """The first row that holds is taken. One of them holds for any shape on any GPU."""

    def class_of(self, shape: Shape) -> ShapeClass:
        """The class of a shape. What else the shape names is for measurements. Raises LookupError for no class."""
        return tuple(
            [one for one in classes if _is_within(shape[name], one if isinstance(one, int) else (one,))][0]  # noqa: RUF015
            for name, classes in self.classes.items()
        )

    def named(self, shape_class: ShapeClass) -> dict[str, int | str]:
        """A class by the names of its parts: the largest shape of the class."""
        return dict(zip(self.classes, shape_class, strict=True))

    def rows_of(self, arch: str) -> list[tuple[Shape, Values]]:
        """The rows for a GPU: limits of shapes, and values."""
        return [(row.when, self._named(row.values)) for row in self.rows if arch.startswith(row.arch)]

    def row(self, arch: str, shape: Shape) -> Values:
        """The table's choice for a shape, or for the shapes of a class."""
        rows = self.rows_of(arch)
        return next(values for when, values in rows if all(_is_within(shape[name], when[name]) for name in when))

    def permitted(self, shape: Shape) -> list[Values]:
        """All values that may be tried for the class of a shape."""
        shape = self.named(self.class_of(shape))
        return [values for values in map(self._named, product(*self.candidates.values())) if self.allows(shape, values)]

    def _named(self, values: tuple[int, ...]) -> Values:
        return dict(zip(self.candidates, values, strict=True))


def _is_within(value: Any, limit: Any) -> bool:
    return isinstance(value, int) and value <= limit if isinstance(limit, int) else value in limit
