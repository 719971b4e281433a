"""What the table is made of: a kernel's classes of shapes, the values chosen for them, and which may be tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

Shape = Mapping[str, int | str]
Values = Mapping[str, int]
ShapeClass = tuple[int | str, ...]
"""One class of each of a kernel's `classes`, in their order."""

ANY = 2**31 - 1
"""The class of numbers above all others."""
DEFAULT = "default"
"""The rows of GPUs whose architecture has none of its own."""


@dataclass(frozen=True, slots=True)
class Row:
    """Values for some shapes. `when` limits a shape's numbers from above, and lists the names that it may have."""

    when: Mapping[str, int | tuple[str, ...]]
    values: Values

    def holds(self, shape: Shape) -> bool:
        """Whether the row is for a shape, or for the shapes of a class."""
        return all(_is_within(shape[name], limit) for name, limit in self.when.items())


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of an architecture, of which the first that holds is taken, and where they come from."""

    measured: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Kernel:
    """What is to be chosen for a kernel."""

    classes: Mapping[str, tuple[int, ...] | tuple[str, ...]]
    """The classes of each part of a shape: numbers up to a limit, in ascending order, or names."""
    candidates: Mapping[str, tuple[int, ...]]
    """What is chosen, and the values that `forge tune` tries for it."""
    allows: Callable[[Shape, Values], bool]
    """Whether the kernel takes the values together for the shapes of a class, and whether they are worth a trial."""
    rows: Mapping[str, Rows]
    """Rows by architecture. The rows of `DEFAULT` hold for any shape."""

    def class_of(self, shape: Shape) -> ShapeClass:
        """The class of a shape. What else the shape names is for measurements."""
        return tuple(
            next(one for one in classes if _is_within(shape[name], one if isinstance(one, int) else (one,)))
            for name, classes in self.classes.items()
        )

    def named(self, shape_class: ShapeClass) -> dict[str, int | str]:
        """A class by the names of its parts: the largest shape of the class."""
        return dict(zip(self.classes, shape_class, strict=True))

    def rows_of(self, architecture: str) -> Rows:
        """The rows of an architecture, its own or the default."""
        return self.rows.get(architecture, self.rows[DEFAULT])

    def row(self, architecture: str, shape: Shape) -> Values:
        """The table's choice for a shape."""
        return next(row.values for row in self.rows_of(architecture).rows if row.holds(shape))

    def permitted(self, shape_class: ShapeClass) -> list[dict[str, int]]:
        """All values that may be tried for a class of shapes."""
        shape = self.named(shape_class)
        every = (dict(zip(self.candidates, chosen, strict=True)) for chosen in product(*self.candidates.values()))
        return [values for values in every if self.allows(shape, values)]


def _is_within(value: int | str, limit: int | tuple[str, ...]) -> bool:
    if isinstance(limit, int):
        return isinstance(value, int) and value <= limit
    return value in limit
