"""Changing values: `LLM.patch` and `LLM.steer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from forge.backend import Backend
from forge.engine.hooked import PATTERN, Ints, Mask, Where
from forge.errors import ParameterError
from forge.hooks.cache import Cache, Captured
from forge.hooks.numbers import numbers
from forge.hooks.scope import Scope
from forge.hooks.selection import Prompt, Selection
from forge.keywords import refusal
from forge.models.hooks import HookPoint

Edit = Callable[[Any, Where], Any]
Heads = tuple[int, ...] | None
Vector = npt.NDArray[np.float32]
_WITH_HEADS = (".attn.q", ".attn.k", ".attn.v", ".attn.heads", PATTERN)


class Edits(Scope[None]):
    """A `with` block whose calls compute with other values."""

    def __init__(self, owner: object, points: list[HookPoint], selection: Selection) -> None:
        super().__init__(owner, None, selection)
        self.points = points
        self.names = frozenset(point.name for point in points)

    def bind(self, prompt: Prompt) -> EditHook | None:
        if not self.selection.concerns(prompt):
            return None
        edit, known = self.edit(prompt)
        return EditHook(self, prompt.request, edit, known)

    @property
    def vector(self) -> Vector | None:
        """What is added at each position, (E,), where that is all that is done."""
        return None

    def edit(self, prompt: Prompt) -> tuple[Edit, Ints | None]:
        """What is done to the rows of a point, and the positions that it has a value for; None = all."""
        raise NotImplementedError


class EditHook:
    """Changes values of one sequence."""

    def __init__(self, edits: Edits, request: int, edit: Edit, known: Ints | None) -> None:
        self.names, self.request, self.recorded = edits.names, request, edits.vector
        self._selection, self._edit, self._known = edits.selection, edit, known

    def selects(self, positions: Ints, num_prompt: int) -> Mask:
        found = self._selection.mask(positions, num_prompt)
        return found if self._known is None else found & np.isin(positions, self._known)

    def at(self, value: Any, where: Where) -> Any:
        return self._edit(value, where)

    def end(self) -> None: ...

    def finished(self, is_whole: bool) -> None: ...


class PatchByFunction(Edits):
    """A function makes the new rows of the old ones."""

    def __init__(
        self, owner: object, points: list[HookPoint], selection: Selection, function: Callable[..., Any], heads: Heads
    ) -> None:
        super().__init__(owner, points, selection)
        self._function, self._heads = function, heads

    def edit(self, prompt: Prompt) -> tuple[Edit, None]:
        return self._called, None

    def _called(self, value: Any, where: Where) -> Any:
        part = value.copy() if self._heads is None else _part(value, where.name, self._heads)
        before = part.copy()
        found = self._function(part, where)
        if found is None:
            if bool((part == before).all()):
                return None
            found = part  # it was changed in place
        if np.shape(found) != part.shape:
            message = f"{where.name}: the function gives the shape {np.shape(found)} for values of {part.shape}"
            raise ParameterError(message, parameter="value")
        return found if self._heads is None else _replaced(value, where.name, self._heads, found)


class PatchByArray(Edits):
    """Rows are replaced by those of an array."""

    def __init__(
        self, owner: object, points: list[HookPoint], selection: Selection, value: Any, heads: Heads, backend: Backend
    ) -> None:
        super().__init__(owner, points, selection)
        self._value, self._heads, self._backend = value, heads, backend
        self._is_pattern = points[0].name.endswith(PATTERN)
        self._has_rows = value.ndim == len(points[0].shape)
        listed = selection.positions
        for point in points:
            of_row = _of_row(point, heads)
            rows = len(listed) if isinstance(listed, tuple) else "N"
            shape = (of_row[0], rows, "S") if self._is_pattern else (rows, *of_row)
            shapes = [shape] if self._is_pattern else [shape, of_row]
            if not any(_fits(value.shape, one) for one in shapes):
                takes = " or ".join(f"({', '.join(map(str, one))}{',' * (len(one) == 1)})" for one in shapes)
                message = f"value has the shape {value.shape}, and {point.name} takes {takes}"
                raise ParameterError(message, parameter="value")

    def check_selected(self, prompt: Prompt) -> None:
        if not self._has_rows:
            return
        count = self.selection.of_prompt(len(prompt.ids))
        rows = self._value.shape[int(self._is_pattern)]
        if not isinstance(self.selection.positions, tuple) and rows < count:
            raise ParameterError(
                f"value has the shape {self._value.shape}, {rows} rows, and {count} positions of the prompt of "
                f"{len(prompt.ids)} tokens are selected",
                parameter="value",
            )

    def edit(self, prompt: Prompt) -> tuple[Edit, Ints | None]:
        if not self._has_rows:
            return lambda value, where: self._placed(value, where, self._value), None
        num_prompt = len(prompt.ids)
        rows = self._value.shape[int(self._is_pattern)]
        positions = np.arange(prompt.length)
        positions = positions[self.selection.mask(positions, num_prompt)]
        known = positions[self.selection.numbers(positions, num_prompt) < rows]

        def edit(value: Any, where: Where) -> Any:
            numbers = self.selection.numbers(where.positions, num_prompt)
            if self._is_pattern:
                own = self._value[:, numbers, : value.shape[2]]
                if own.shape[2] < value.shape[2]:
                    message = f"value has weights of {own.shape[2]} positions, and {where.name} has {value.shape[2]}"
                    raise ParameterError(message, parameter="value")
                return self._placed(value, where, own)
            return self._placed(value, where, self._value[numbers])

        return edit, known

    def _placed(self, value: Any, where: Where, rows: Any) -> Any:
        if self._heads is not None:
            return _replaced(value, where.name, self._heads, self._on_device(value, rows))
        return self._on_device(value, np.broadcast_to(rows, value.shape))

    def _on_device(self, value: Any, rows: Any) -> Any:
        return rows if isinstance(value, np.ndarray) else self._backend.asarray(np.ascontiguousarray(rows), value.dtype)


class PatchByCache(Edits):
    """Rows are replaced by those of the same points and positions of another run."""

    def __init__(
        self, owner: object, points: list[HookPoint], selection: Selection, cache: Cache, heads: Heads, backend: Backend
    ) -> None:
        super().__init__(owner, points, selection)
        self._cache, self._heads, self._backend = cache, heads, backend

    def check_selected(self, prompt: Prompt) -> None:
        number, held = self._number(prompt), len(self._cache.requests)
        if not 0 <= number < held:
            raise ParameterError(f"the cache holds {held} requests, and no number {number}", parameter="value")
        if held not in (1, prompt.requests) and self.selection.request is None:
            raise ParameterError(
                f"the cache holds {held} requests, and the call has {prompt.requests}",
                parameter="value",
                hint="patch with one of them, as cache.requests[0]",
            )
        captured = self._cache.requests[number]
        for point in self.points:
            positions, rows = captured.positions(point.name), captured[point.name]
            if point.name.endswith(PATTERN):
                raise ParameterError(f"{point.name}: give an array, not a cache", parameter="value")
            if rows.shape[1:] != _of_row(point, None):
                raise ParameterError(
                    f"the cache has the shape {rows.shape} at {point.name}, which takes "
                    f"{('N', *_of_row(point, None))}: it holds something else than the values",
                    parameter="value",
                )
            num_prompt = len(prompt.ids)
            of_prompt = np.arange(num_prompt)[self.selection.mask(np.arange(num_prompt), num_prompt)]
            missing = np.setdiff1d(of_prompt, positions)
            if self.selection.positions is not None and missing.size:
                message = f"the cache has no position {missing[0]} of {point.name}"
                raise ParameterError(message, parameter="value", hint="capture it, or patch others")

    def _number(self, prompt: Prompt) -> int:
        return 0 if len(self._cache.requests) == 1 else prompt.request

    def edit(self, prompt: Prompt) -> tuple[Edit, Ints]:
        captured = self._cache.requests[self._number(prompt)]
        known = captured.positions(self.points[0].name)
        for point in self.points:
            known = np.intersect1d(known, captured.positions(point.name))

        def edit(value: Any, where: Where) -> Any:
            rows = captured[where.name][np.searchsorted(captured.positions(where.name), where.positions)]
            if not isinstance(value, np.ndarray):
                rows = self._backend.asarray(rows, value.dtype)
            if self._heads is None:
                return rows
            return _replaced(value, where.name, self._heads, _part(rows, where.name, self._heads))

        return edit, known


class Steer(Edits):
    """A vector is added to rows.

    vector: float32 of the shape of a point's row, times its scale.
    """

    def __init__(
        self, owner: object, points: list[HookPoint], selection: Selection, vector: Vector, backend: Backend
    ) -> None:
        super().__init__(owner, points, selection)
        self._vector, self._backend = vector, backend
        self._on_device: Any = None
        for point in points:
            if point.name.endswith(PATTERN) or point.dtype == "int32":
                raise ParameterError(f"{point.name} cannot be steered: patch it", parameter="points")
            if vector.shape != _of_row(point, None):
                message = f"vector has the shape {vector.shape}, and {point.name} takes {_of_row(point, None)}"
                raise ParameterError(message, parameter="vector")

    def edit(self, prompt: Prompt) -> tuple[Edit, None]:
        return self._added, None

    def _added(self, value: Any, where: Where) -> Any:
        if self._on_device is None:  # once, in the engine's thread
            self._on_device = self._backend.asarray(self._vector)
        return value + self._on_device

    @property
    def vector(self) -> Vector:
        return self._vector


def patch(
    owner: object, points: list[HookPoint], selection: Selection, value: Any, heads: Any, backend: Backend
) -> Edits:
    """The block of `LLM.patch`. Raises ParameterError for a value or heads that the points cannot have."""
    own = _heads(heads, points)
    if isinstance(value, Captured):
        value = Cache.of(value)
    if isinstance(value, Cache):
        return PatchByCache(owner, points, selection, value, own, backend)
    if callable(value):
        return PatchByFunction(owner, points, selection, value, own)
    return PatchByArray(owner, points, selection, numbers("value", value), own, backend)


def _heads(value: Any, points: list[HookPoint]) -> Heads:
    if value is None:
        return None
    for point in points:
        if not point.name.endswith(_WITH_HEADS):
            raise ParameterError(f"{point.name} has no heads to choose", parameter="heads")
    try:
        found = (value,) if isinstance(value, int | np.integer) else tuple(value)
    except TypeError:
        found = ()
    least = min(int(_of_row(point, None)[0]) for point in points)
    is_right = found and all(isinstance(one, int | np.integer) and not isinstance(one, bool) for one in found)
    if not is_right or len(set(found)) < len(found) or min(found) < 0 or max(found) >= least:
        raise refusal("heads", f"different numbers from 0 to {least - 1}", value)
    return tuple(map(int, found))


def _of_row(point: HookPoint, heads: Heads) -> tuple[Any, ...]:
    """The shape of one position's value; of attention weights (H, "S")."""
    shape = [size for size in point.shape if size not in ("T", "R")]
    if heads is not None:
        shape[0] = len(heads)
    return tuple(shape)


def _fits(shape: tuple[int, ...], wanted: tuple[Any, ...]) -> bool:
    pairs = zip(shape, wanted, strict=False)
    return len(shape) == len(wanted) and all(isinstance(there, str) or size == there for size, there in pairs)


def _part(value: Any, name: str, heads: tuple[int, ...]) -> Any:
    return value[list(heads)] if name.endswith(PATTERN) else value[:, list(heads)]


def _replaced(value: Any, name: str, heads: tuple[int, ...], part: Any) -> Any:
    found = value.copy()
    if name.endswith(PATTERN):
        found[list(heads)] = part
    else:
        found[:, list(heads)] = part
    return found
