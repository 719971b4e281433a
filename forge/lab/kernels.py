"""Kernels by their names: their texts, and edits of these."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from forge.backend import edits, sources
from forge.errors import ParameterError


@dataclass(frozen=True, slots=True)
class Place:
    """What a name means: a kernel, or a file with all of its kernels."""

    name: str
    file: str
    kernels: tuple[tuple[str, str], ...]
    """File and name of each kernel."""

    @property
    def is_file(self) -> bool:
        return self.name.endswith(".hip")


def find(name: str) -> Place:
    """The place of a name: "rmsnorm", or "norm.hip". Raises ParameterError for another."""
    every = {kernel: file for file in sources.files() for kernel in sources.signatures(file)}
    if isinstance(name, str) and name in every:
        return Place(name, every[name], ((every[name], name),))
    file = name.removesuffix(".hip") if isinstance(name, str) and name.endswith(".hip") else ""
    if file in every.values():
        return Place(name, file, tuple((file, kernel) for kernel in sources.signatures(file)))
    known = [*every, *(f"{each}.hip" for each in sources.files())]
    near = [f"{name}.hip"] if name in every.values() else difflib.get_close_matches(str(name), known, 3)
    hint = f"did you mean {', '.join(near)}" if near else "the files are in forge/raw_kernels, as norm.hip"
    raise ParameterError(f"name: no kernel and no kernel file is called {name!r:.60}", parameter="name", hint=hint)


def text(place: Place) -> str:
    """The text that stands for a kernel or a file now: of an edit its cell."""
    name = edits.current(*place.kernels[0])
    used = edits.of(name)
    is_whole = used is not None and used.start == 0
    if place.is_file:
        return sources.text(name if is_whole else place.file)
    lines = sources.text(name).split("\n")
    start, end = (used.start, used.start + used.lines) if used and not is_whole else sources.span(name, place.name)
    return "\n".join(lines[start:end]) + "\n"


def edited(place: Place, cell: str, first_line: int) -> edits.Edit:
    """The edit that puts a text in the place of a kernel or a file.

    Raises ParameterError where the text does not declare each kernel with the parameters that its launches give.
    """
    if not isinstance(cell, str):
        raise ParameterError(f"source must be a text, not a {type(cell).__name__}", parameter="source")
    for number, line in enumerate(cell.split("\n"), first_line):
        if "\0" in line or line != line.encode(errors="ignore").decode():
            raise ParameterError(f"source: cell:{number}: a character that no text file holds", parameter="source")
    whole, own = sources.text(place.file).split("\n"), cell.rstrip().split("\n")
    start, end = (0, len(whole)) if place.is_file else sources.span(*place.kernels[0])
    joined = "\n".join([*whole[:start], *own, *(whole[end:] or [""])])
    edit = edits.Edit(place.file, joined, start, len(own), end - start, first_line)
    name = edits.add(edit)
    try:
        found = sources.signatures(name)
    except ValueError as error:
        raise ParameterError(f"source: {str(error).removeprefix(f'{name}.hip: ')}", parameter="source") from None
    for file, kernel in place.kernels:
        wanted = sources.signatures(file)[kernel][1]
        if kernel not in found:
            message = f"source: it declares no kernel {kernel}: a line begins with KERNEL(threads) {kernel}("
            raise ParameterError(message, parameter="source")
        given = [(each.type, each.is_pointer) for each in found[kernel][1]]
        if given != [(each.type, each.is_pointer) for each in wanted]:
            listed = ", ".join(f"{each.type} {'*' * each.is_pointer}{each.name}" for each in wanted)
            raise ParameterError(f"source: {kernel} is launched with ({listed}): declare these", parameter="source")
    return edit
