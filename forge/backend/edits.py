"""Kernels whose source is replaced while the process runs: which they are, and the texts that stand for theirs.

The text of an edit is a kernel file of its own: what is compiled, loaded, planned or recorded of one is never taken for
the other's. Whatever keeps launches drops them when `replaced()` is another object.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Edit:
    """The text of a kernel file with some lines of a person's in it, the cell."""

    file: str
    """Which kernel file it is an edit of."""
    text: str
    start: int
    """Lines before the cell."""
    lines: int
    """Lines of the cell."""
    instead: int
    """Lines of the file that the cell stands for."""
    first: int
    """The number of the cell's first line for its author."""

    @property
    def name(self) -> str:
        """What entries and variants call the file: no file of raw_kernels/ is called so."""
        return f"{self.file}@{hashlib.sha256(f'{self.first} {self.start} {self.text}'.encode()).hexdigest()[:12]}"

    def place(self, line: int) -> str:
        """The place that a line of the text, counted from 1, comes from."""
        if line <= self.start:
            return f"{self.file}.hip:{line}"
        if line <= self.start + self.lines:
            return f"cell:{line - self.start - 1 + self.first}"
        return f"{self.file}.hip:{line - self.lines + self.instead}"


_edits: dict[str, Edit] = {}
_replaced: Mapping[tuple[str, str], str] = MappingProxyType({})


def of(name: str) -> Edit | None:
    """The edit that a kernel file's name means; None for a file of raw_kernels/."""
    return _edits.get(name)


def add(edit: Edit) -> str:
    """Make an edit known; its name. No launch uses it before `replace`."""
    _edits[edit.name] = edit
    return edit.name


def replaced() -> Mapping[tuple[str, str], str]:
    """The edits in use: from kernel file and kernel to an edit's name. The same object until they are others."""
    return _replaced


def replace(changed: Mapping[tuple[str, str], str | None]) -> None:
    """Use edits from the next launch on; None is the kernel of raw_kernels/ again."""
    global _replaced
    merged = {**_replaced, **changed}
    _replaced = MappingProxyType({kernel: name for kernel, name in merged.items() if name is not None})


def current(file: str, kernel: str) -> str:
    """The file that a kernel is compiled from now."""
    return _replaced.get((file, kernel), file)
