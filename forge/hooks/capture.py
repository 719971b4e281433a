"""Keeping values: `LLM.capture`."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from forge.backend import Backend
from forge.engine.hooked import Ints, Mask, Where
from forge.hooks.cache import Cache, Captured
from forge.hooks.reduction import Reduction
from forge.hooks.scope import Scope
from forge.hooks.selection import Prompt, Selection


class Capture(Scope[Cache]):
    """A `with` block whose calls leave values in a cache."""

    def __init__(
        self,
        owner: object,
        names: tuple[str, ...],
        selection: Selection,
        backend: Backend,
        *,
        dtype: Any,
        is_on_device: bool,
        reduction: Reduction | None,
    ) -> None:
        """dtype: Of floating point numbers that are kept. reduction: What is kept of values; None = they."""
        super().__init__(owner, Cache(names))
        self.names, self.selection, self._backend = frozenset(names), selection, backend
        self.dtype, self.is_on_device, self.reduction = dtype, is_on_device, reduction

    def check(self, prompt: Prompt) -> None:
        if self.selection.concerns(prompt):
            self.selection.check(prompt)

    def bind(self, prompt: Prompt) -> CaptureHook | None:
        if not self.selection.concerns(prompt):
            return None
        captured = Captured(prompt.ids)
        self._result.requests.append(captured)
        return CaptureHook(self, prompt.request, captured, self._backend)


class CaptureHook:
    """Keeps values of one sequence."""

    def __init__(self, capture: Capture, request: int, captured: Captured, backend: Backend) -> None:
        self.names, self.request = capture.names, request
        self._capture, self._captured, self._backend = capture, captured, backend
        self._waiting: list[tuple[Where, Any]] = []
        """Of the step under way, on the device: it is not waited for before all of it is launched."""
        self._state: dict[str, Any] = {}
        """Of reductions over positions, by point."""

    @property
    def recorded(self) -> Literal["read"] | None:
        return None if self._capture.is_on_device else "read"

    def selects(self, positions: Ints, num_prompt: int) -> Mask:
        return self._capture.selection.mask(positions, num_prompt)

    def at(self, value: Any, where: Where) -> None:
        self._waiting.append((where, value.copy()))

    def end(self) -> None:
        waiting, self._waiting = self._waiting, []
        for where, value in waiting:
            self._keep(where, value)

    def _keep(self, where: Where, value: Any) -> None:
        is_float = value.dtype.kind == "f"
        if self._capture.is_on_device:
            kept = value.astype(self._capture.dtype) if is_float else value
            self._captured.add(where.name, where.positions, kept)
            return
        host = value if isinstance(value, np.ndarray) else self._backend.to_numpy(value)
        if self._capture.reduction is None:
            self._captured.add(where.name, where.positions, host.astype(self._capture.dtype) if is_float else host)
            return
        found = self._capture.reduction(host.astype(np.float32), where, self._state)
        for suffix, (positions, kept) in found.items():
            kept = kept.astype(self._capture.dtype) if kept.dtype.kind == "f" else kept
            self._captured.add(where.name + suffix, positions, kept)
