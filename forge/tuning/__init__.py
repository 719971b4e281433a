"""Which block sizes, rows and splits kernels are launched with: the table, and what `forge tune` measured here."""

from __future__ import annotations

from collections.abc import Mapping

from forge.tuning.spec import Shape, ShapeClass, Values
from forge.tuning.table import KERNELS

Key = tuple[str, ShapeClass]
"""A kernel, and a class of its shapes."""


class Choices:
    """The choices of one device: the table's, but for the classes of shapes that are `tuned`."""

    def __init__(self, arch: str, tuned: Mapping[Key, Values] | None = None) -> None:
        self.arch, self.tuned = arch, tuned or {}
        self._found: dict[tuple[str, tuple[tuple[str, int | str], ...]], Values] = {}

    def of(self, kernel: str, shape: Shape) -> Values:
        """The values that a kernel is launched with for a shape: the same each time."""
        key = kernel, tuple(shape.items())
        if (found := self._found.get(key)) is None:
            spec = KERNELS[kernel]
            found = self.tuned.get((kernel, spec.class_of(shape))) or spec.row(self.arch, shape)
            self._found[key] = found
        return found

    @property
    def asked(self) -> list[tuple[str, dict[str, int | str]]]:
        """Kernels and shapes that were asked for, each once: what there is to tune for what was launched."""
        return [(kernel, dict(shape)) for kernel, shape in self._found]
