"""The methods of `LLM` that look inside the model, and change what it computes."""

from __future__ import annotations

import json
import os
import re
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from forge.hooks.cache import Cache
from forge.hooks.capture import Capture
from forge.hooks.edits import Steer, patch
from forge.hooks.numbers import numbers
from forge.hooks.reduction import reduction_of, settings_of
from forge.hooks.selection import Positions, Steps, matching, selected
from forge.keywords import check_bool, keywords, path_of, real, refusal
from forge.models.hooks import HookPoint
from forge.runtime import unembedding
from forge.runtime.state_front import StateFront

_DTYPES = {"f32": "float32", "f16": "float16"}
_LAYER = re.compile(r"blk\.(\d+)\.")


class HookPoints(list[HookPoint]):
    """A list of points, shown as a table: one row for those that layers have alike, with the layers' numbers."""

    def __repr__(self) -> str:
        rows: dict[HookPoint, list[int]] = {}
        for point in self:
            layer = _LAYER.match(point.name)
            name = point.name if layer is None else f"blk.N.{point.name[layer.end() :]}"
            rows.setdefault(replace(point, name=name), []).extend([] if layer is None else [int(layer[1])])
        return "\n".join(f"{row}  N = {_ranges(layers)}" if layers else str(row) for row, layers in rows.items())


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers: "0 to 3, 5"."""
    starts = [one for one in numbers if one - 1 not in numbers]
    ends = [one for one in numbers if one + 1 not in numbers]
    return ", ".join(
        f"{first}" if first == last else f"{first} to {last}" for first, last in zip(starts, ends, strict=True)
    )


class HooksFront(StateFront):
    """Base of `LLM`: hooks. The calls that a thread, or a task, makes in a `with` block have them.

    Hooked requests run in batches, beside others: those keep their steps, and their bits. Blocks nest, and hooks run in
    the order in which their blocks were entered.
    """

    def hook_points(self) -> HookPoints:
        """The model's points, in the order in which a pass comes to them: names, shapes and dtypes.

        docs/research.md says what each is.
        """
        return HookPoints(self.engine.runner.hook_points)

    @keywords()
    def capture(
        self,
        points: str | list[str],
        *,
        positions: Positions = None,
        steps: Steps = None,
        request: int | None = None,
        dtype: Literal["f32", "f16"] = "f32",
        device: bool = False,
        reduce: Any = None,
        to: str | os.PathLike[str] | None = None,
    ) -> AbstractContextManager[Cache]:
        """Keep values of the calls in a `with` block: ``with llm.capture("blk.*.resid_post", positions=-1) as cache``.

        Args:
            points: A name, a glob, or a list of these.
            positions: An integer, a slice or a list of integers. Negative ones count from the prompt's end; a slice
                without an end has none, and has what is generated too. None = all. The last id of a completion is not
                computed, unless more ids follow.
            steps: "prompt" or "generated" positions alone. None = both.
            request: Number of the prompt within its call; its choices, or continuations of `score`, have the same
                one. None = all.
            dtype: Of what is kept. Integers, as of experts, stay int32.
            device: Whether arrays stay on the model's device. Else they are NumPy's.
            reduce: What is kept instead of a position's value: "norm", its L2 norm; ("project", vectors (M, E)), its
                products with them; ("top_k", encoder (E, M), bias (M,) or None, k), the k greatest of
                relu(x @ encoder + bias), with which they are under the point's name and ``.indices``; a function of
                (rows (N, ...), `Where`) that gives an array (N, ...). "mean" keeps the mean of all positions, (1, ...).
            to: A directory, for runs that are larger than memory: a request that has ended is moved to a file of
                safetensors there, and read when the cache is asked for it. A block with the same directory and settings
                goes on behind the requests that it holds: ``prompts[len(cache):]`` are left.

        Returns:
            A context manager, which gives a `Cache`.

        Raises:
            ParameterError: There is no such point, with the nearest names, or a value cannot be used.
        """
        found = matching(self.engine.runner.hook_points, points)
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise refusal("dtype", "'f32' or 'f16'", dtype)
        check_bool("device", device)
        if device and reduce is not None:
            raise refusal("reduce", "None with device=True: it is computed on the host", reduce)
        if device and to is not None:
            raise refusal("to", "None with device=True: files are the host's", to)
        reduction = reduction_of(reduce, found)
        names = tuple(point.name for point in found)
        where = selected(positions, steps, request)
        directory = None if to is None else path_of("to", to)
        model = self._fingerprints.get(None, self._name)
        settings = [model, names, repr(where), dtype, settings_of(reduce)]
        return Capture(
            self._loop,
            names,
            where,
            dtype=_DTYPES[dtype],
            is_on_device=device,
            reduction=reduction,
            runs_code=callable(reduce),
            directory=directory,
            settings=json.dumps(settings),
        )

    @keywords()
    def patch(
        self,
        points: str | list[str],
        value: Any,
        *,
        positions: Positions = None,
        heads: int | list[int] | None = None,
        steps: Steps = None,
        request: int | None = None,
    ) -> AbstractContextManager[None]:
        """Replace values of the calls in a `with` block.

        Args:
            points: As in `capture`.
            value: An array (...) for all positions, or (N, ...) with a row for each: row i is the i-th one of
                `positions`, and positions beyond the rows stay. Or the `Cache` of another run, of whose points and
                positions the same ones are replaced; of several requests, those of a call with as many prompts. Or one
                of its requests, a `Captured`. Or a function of (value, `Where`) that gets an array (N, ...) on the
                model's device, changes it or returns another, and may return None. Attention weights are (H, N, S), on
                the host.
            positions: As in `capture`.
            heads: Those that are replaced; an array has these alone. None = all.
            steps: As in `capture`.
            request: As in `capture`.

        Returns:
            A context manager.

        Raises:
            ParameterError: There is no such point, a value cannot be used, or an array has another shape.
        """
        found = matching(self.engine.runner.hook_points, points)
        where = selected(positions, steps, request)
        return patch(self._loop, found, where, value, heads, self.engine.runner.backend)

    @keywords()
    def steer(
        self,
        points: str | list[str],
        vector: Any,
        *,
        scale: float = 1.0,
        positions: Positions = None,
        steps: Steps = None,
        request: int | None = None,
    ) -> AbstractContextManager[None]:
        """Add a vector to values of the calls in a `with` block.

        Args:
            points: As in `capture`.
            vector: An array of the shape of one position's value, such as (E,).
            scale: Its factor.
            positions: As in `capture`.
            steps: As in `capture`.
            request: As in `capture`.

        Returns:
            A context manager.

        Raises:
            ParameterError: There is no such point, a value cannot be used, or the vector has another shape.
        """
        found = matching(self.engine.runner.hook_points, points)
        scaled = numbers("vector", vector) * numbers("scale", [real("scale", scale)])[0]
        return Steer(self._loop, found, selected(positions, steps, request), scaled, self.engine.runner.backend)

    @keywords()
    def unembed(self, residuals: Any) -> npt.NDArray[np.float32]:
        """Logits of rows of the residual stream, as if the last layer had left them: by the output's norm and product.

        Args:
            residuals: (..., E) numbers, such as a point ``blk.N.resid_post`` that was captured.

        Returns:
            (..., V) float32 on the host: with the last layer's rows what `logits` gives.

        Raises:
            ParameterError: They have another width, or are no numbers.
            OutOfMemoryError: The array is larger than the free memory; the message has the numbers.
        """
        return unembedding.unembed(self._loop, self.engine, residuals)
