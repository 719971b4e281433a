"""Keeping values: `LLM.capture`."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from forge.backend import backend_of
from forge.engine.hooked import Ints, Mask, Where
from forge.errors import ForgeError, ParameterError
from forge.formats.safetensors import read_file
from forge.hooks.cache import Cache, Captured
from forge.hooks.reduction import Reduction
from forge.hooks.scope import Scope
from forge.hooks.selection import Prompt, Selection

_NAME = "{:06}.safetensors"
_KEY = "forge_capture"


class Capture(Scope[Cache]):
    """A `with` block whose calls leave values in a cache."""

    def __init__(
        self,
        owner: object,
        names: tuple[str, ...],
        selection: Selection,
        *,
        dtype: Any,
        is_on_device: bool,
        reduction: Reduction | None,
        runs_code: bool = False,
        directory: Path | None = None,
        settings: str = "",
    ) -> None:
        """dtype: Of floating point numbers that are kept. reduction: What is kept of values; None = they. runs_code:
        Whether it is a function of the user's. directory: Where requests go when they have ended. settings: What its
        files must have in common."""
        super().__init__(owner, Cache(names), selection)
        self.directory, self._metadata = directory, {_KEY: settings}
        self._failure: ForgeError | None = None
        if directory is not None:
            self._result.requests += _stored(directory, settings)
        self.names = frozenset(names)
        self.dtype, self.is_on_device, self.reduction, self.runs_code = dtype, is_on_device, reduction, runs_code

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if error is None and self._failure:
            raise self._failure

    def write(self, number: int, captured: Captured) -> None:
        """A request has ended. What fails is raised by the next call, or at the end of the block."""
        assert self.directory
        path = self.directory / _NAME.format(number)
        try:
            captured.write(path, self._metadata)
        except OSError as error:
            self._failure = ForgeError(f"{path}: cannot be written: {error.strerror or error}")

    def check(self, prompt: Prompt) -> None:
        if self._failure:
            raise self._failure
        super().check(prompt)

    def bind(self, prompt: Prompt) -> CaptureHook | None:
        if not self.selection.concerns(prompt):
            return None
        captured, number = Captured(prompt.ids), len(self._result.requests)
        self._result.requests.append(captured)
        return CaptureHook(self, prompt.request, number, captured)


def _stored(directory: Path, settings: str) -> list[Captured]:
    """The requests that a directory holds, up to the first one that is missing."""
    found: list[Captured] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ParameterError(f"to: {directory} is no directory: {error.strerror}", parameter="to") from None
    while (path := directory / _NAME.format(len(found))).exists():
        with read_file(path) as file:
            if file.metadata.get(_KEY) != settings:
                raise ParameterError(
                    f"to: {path} was captured with other settings, or of another model", parameter="to"
                )
        found.append(Captured.of_file(path))
    return found


class CaptureHook:
    """Keeps values of one sequence."""

    def __init__(self, capture: Capture, request: int, number: int, captured: Captured) -> None:
        """number: Of the request in the cache."""
        self.names, self.request, self._number = capture.names, request, number
        self._capture, self._captured = capture, captured
        self._waiting: list[tuple[Where, Any]] = []
        """Of the step under way, on the device: it is not waited for before all of it is launched."""
        self._state: dict[str, Any] = {}
        """Of reductions over positions, by point."""

    @property
    def recorded(self) -> Literal["read"] | None:
        return "read" if not (self._capture.is_on_device or self._capture.runs_code) else None

    def selects(self, positions: Ints, num_prompt: int) -> Mask:
        return self._capture.selection.mask(positions, num_prompt)

    def at(self, value: Any, where: Where) -> None:
        # CuPy's copy compiles a kernel of its own. Slices need one.
        is_whole = value.flags.c_contiguous
        self._waiting.append((where, backend_of(value).snapshot(value) if is_whole else value.copy()))

    def end(self) -> None:
        waiting, self._waiting = self._waiting, []
        for where, value in waiting:
            self._keep(where, value)

    def finished(self, is_whole: bool) -> None:
        if is_whole and self._capture.directory:
            self._capture.write(self._number, self._captured)

    def _keep(self, where: Where, value: Any) -> None:
        is_float = value.dtype.kind == "f"
        if self._capture.is_on_device:
            kept = value.astype(self._capture.dtype) if is_float else value
            self._captured.add(where.name, where.positions, kept)
            return
        host = backend_of(value).to_numpy(value)
        if self._capture.reduction is None:
            self._captured.add(where.name, where.positions, host.astype(self._capture.dtype) if is_float else host)
            return
        found = self._capture.reduction(host.astype(np.float32), where, self._state)
        for suffix, (positions, kept) in found.items():
            kept = kept.astype(self._capture.dtype) if kept.dtype.kind == "f" else kept
            self._captured.add(where.name + suffix, positions, kept)
