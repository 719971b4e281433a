"""Which points, positions, steps and requests a hook is for."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any, Literal

import numpy as np

from forge.engine.hooked import Ints, Mask
from forge.errors import ParameterError
from forge.keywords import check_integer, refusal, shown
from forge.models.hooks import HookPoint

Positions = int | slice | Items[int] | None
Steps = Literal["prompt", "generated"] | None
_MAX_LISTED = 5


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a hook is bound to: a prompt of a call, and what is computed behind it.

    request: Number of the prompt within its call, which has so many `requests`. length: Positions that are computed at
    most.
    """

    request: int
    requests: int
    ids: list[int]
    length: int


def matching(points: Items[HookPoint], wanted: Any) -> list[HookPoint]:
    """The points that a name, a glob, or a list of these names, in the model's order.

    Raises ParameterError for one that names none, with the nearest names.
    """
    patterns = [wanted] if isinstance(wanted, str) else list(wanted) if isinstance(wanted, Items) else []
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise refusal("points", "a name, a glob such as 'blk.*.resid_post', or a list of these", wanted)
    for pattern in patterns:
        if not any(fnmatchcase(point.name, pattern) for point in points):
            names = [point.name for point in points]
            near = get_close_matches(pattern.replace("*", "0"), names, _MAX_LISTED, cutoff=0.5)
            ask = f"the nearest are {', '.join(near)}" if near else "LLM.hook_points() lists them"
            raise ParameterError(f"points: the model has no {shown(pattern)}; {ask}", parameter="points")
    return [point for point in points if any(fnmatchcase(point.name, pattern) for pattern in patterns)]


@dataclass(frozen=True, slots=True)
class Selection:
    """Positions of requests. Negative ones count from the prompt's end, in slices too; a slice without an end has none:
    it reaches over what is generated.

    positions: None = all. steps: "prompt" or "generated" positions alone. request: As of `Prompt`; None = all.
    """

    positions: tuple[int, ...] | slice | None
    steps: Steps
    request: int | None

    def concerns(self, prompt: Prompt) -> bool:
        return self.request in (None, prompt.request)

    def mask(self, positions: Ints, num_prompt: int) -> Mask:
        """Which of some positions these are."""
        found = np.ones(len(positions), bool)
        if self.steps is not None:
            found &= (positions < num_prompt) == (self.steps == "prompt")
        if isinstance(self.positions, slice):
            start, stop, step = self._bounds(num_prompt)
            found &= (positions >= start) & ((positions - start) % step == 0)
            if stop is not None:
                found &= positions < stop
        elif self.positions is not None:
            found &= np.isin(positions, self.listed(num_prompt))
        return found

    def listed(self, num_prompt: int) -> list[int]:
        """Listed positions, counted from the prompt's start, in the order in which they were given."""
        assert isinstance(self.positions, tuple)
        return [one + num_prompt if one < 0 else one for one in self.positions]

    def numbers(self, positions: Ints, num_prompt: int) -> Ints:
        """The number of each of some of its positions: the first one's is 0."""
        if isinstance(self.positions, tuple):
            listed = self.listed(num_prompt)
            order = np.argsort(listed, kind="stable")
            return np.asarray(order[np.searchsorted(listed, positions, sorter=order)])
        first, step = (0, 1) if self.positions is None else self._bounds(num_prompt)[::2]
        if self.steps == "generated":
            first += max(-(-(num_prompt - first) // step), 0) * step
        return (positions - first) // step

    def of_prompt(self, num_prompt: int) -> int:
        """How many of the prompt's positions these are."""
        return int(self.mask(np.arange(num_prompt), num_prompt).sum())

    def _bounds(self, num_prompt: int) -> tuple[int, int | None, int]:
        assert isinstance(self.positions, slice)
        start, stop, step = self.positions.start or 0, self.positions.stop, self.positions.step or 1
        start = max(start + num_prompt, 0) if start < 0 else start
        return start, stop + num_prompt if stop is not None and stop < 0 else stop, step

    def check(self, prompt: Prompt) -> None:
        """Raises ParameterError for listed positions that never come."""
        num_prompt = len(prompt.ids)
        for one in self.positions if isinstance(self.positions, tuple) else ():
            most = num_prompt if self.steps == "prompt" else prompt.length
            if not -num_prompt <= one < most:
                more = f" with {most - num_prompt} more" if most > num_prompt else ""
                message = f"positions holds {one}, which a prompt of {num_prompt} tokens{more} does not have"
                raise ParameterError(message, parameter="positions")


def selected(positions: Any, steps: Any, request: Any) -> Selection:
    """A selection of what a user gives. Raises ParameterError for what it cannot be."""
    if steps not in (None, "prompt", "generated"):
        raise refusal("steps", "'prompt', 'generated' or None", steps)
    check_integer("request", request, 0, optional=True)
    return Selection(_positions(positions), steps, None if request is None else int(request))


def _positions(value: Any) -> tuple[int, ...] | slice | None:
    if value is None:
        return None
    allowed = "an integer, a slice with a step above 0, a list of different integers, or None"
    if isinstance(value, slice):
        parts = [value.start, value.stop, value.step]
        if not all(part is None or _is_integer(part) for part in parts) or (value.step is not None and value.step < 1):
            raise refusal("positions", allowed, value)
        return slice(*(None if part is None else int(part) for part in parts))
    if _is_integer(value):
        return (int(value),)
    try:
        found = tuple(value)
    except TypeError:
        raise refusal("positions", allowed, value) from None
    if not found or isinstance(value, str) or not all(map(_is_integer, found)) or len(set(found)) < len(found):
        raise refusal("positions", allowed, value)
    return tuple(map(int, found))


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
