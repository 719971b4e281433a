"""What `LLM.capture` keeps: the values of points, by request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from forge.engine.hooked import PATTERN, Ints
from forge.errors import FormatError, ParameterError
from forge.formats.safetensors import SafeTensors, read_file
from forge.formats.safetensors_writer import write_file
from forge.keywords import refusal, shown

PROMPT = "prompt_ids"
_POSITIONS = ".positions"
_TYPES = {"F32": np.float32, "F16": np.float16, "I32": np.int32}


class Captured(Mapping[str, Any]):
    """The values of one request, by the names of points.

    ``captured["blk.3.resid_post"]`` is an array (N, ...) of N positions, in order: `positions` has their numbers. Of
    attention weights it is (H, N, S), where S is the longest context; weights of positions that a query does not see
    are 0.

    Attributes:
        prompt_ids: The prompt's token ids.
    """

    def __init__(self, prompt_ids: list[int]) -> None:
        self.prompt_ids = prompt_ids
        self._parts: dict[str, list[tuple[Ints, Any]]] = {}
        self._path: Path | None = None

    @classmethod
    def of_file(cls, path: Path) -> Captured:
        """What a file holds that `write` has made. Values are read when they are asked for."""
        with read_file(path) as file:
            found = cls(_numbers(file, PROMPT).tolist())
            names = [name for name in file.tensors if f"{name}{_POSITIONS}" in file.tensors]
        found._parts, found._path = {name: [] for name in names}, path
        return found

    def write(self, path: Path, metadata: dict[str, str]) -> None:
        """Move the values to a file. Raises OSError if it cannot be written."""
        tensors = {PROMPT: np.array(self.prompt_ids, np.int32)}
        for name in self._parts:
            positions, value = self._whole(name)
            tensors |= {name: value, f"{name}{_POSITIONS}": positions.astype(np.int32)}
        write_file(path, tensors, metadata)
        self._parts, self._path = {name: [] for name in self._parts}, path

    def add(self, name: str, positions: Ints, value: Any) -> None:
        """Positions of a point have been computed; (H, N, S) of attention weights, else (N, ...). A position that is
        computed again, as happens where memory was short, is replaced."""
        self._parts.setdefault(name, []).append((positions, value))

    def positions(self, name: str) -> Ints:
        """int64 (N,) positions of a point's rows, counted from the prompt's first token."""
        return self._whole(name)[0]

    def __getitem__(self, name: str) -> Any:
        return self._whole(name)[1]

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def get(self, name: str, default: Any = None) -> Any:
        """A point's values, or the default where nothing was captured of it."""
        return self._whole(name)[1] if name in self._parts else default

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __repr__(self) -> str:
        return f"<forge.Captured of {len(self.prompt_ids)} prompt tokens: {_named(list(self))}>"

    def _whole(self, name: str) -> tuple[Ints, Any]:
        if name not in self._parts:
            near = get_close_matches(str(name), self._parts, 3)
            there = f"the nearest are {', '.join(near)}" if near else f"it holds {_named(list(self))}"
            raise ParameterError(f"nothing was captured of {shown(name)}; {there}", parameter="name")
        if self._path:
            with read_file(self._path) as file:
                positions, value = _numbers(file, f"{name}{_POSITIONS}").astype(np.int64), _read(file, name)
            axis = int(name.endswith(PATTERN))
            if value.ndim <= axis or value.shape[axis] != len(positions) or (np.diff(positions) < 1).any():
                raise FormatError(f"{self._path}: {name} and its positions do not belong together: the file is forged")
            return positions, value
        parts = self._parts[name]
        if len(parts) > 1:
            self._parts[name] = parts = [_joined(parts, axis=1 if name.endswith(PATTERN) else 0)]
        return parts[0]


def _numbers(file: SafeTensors, name: str) -> npt.NDArray[Any]:
    """A list of integers."""
    found = _read(file, name)
    if found.dtype != np.int32 or found.ndim != 1 or (found < 0).any():
        raise FormatError(f"{file.path}: tensor {shown(name)} is no list of numbers as `LLM.capture` writes it")
    return found


def _read(file: SafeTensors, name: str) -> npt.NDArray[Any]:
    info = file.tensors.get(name)
    if info is None or info.dtype not in _TYPES:
        raise FormatError(f"{file.path}: has no tensor {shown(name)} as `LLM.capture` writes it")
    out = np.empty(info.shape, _TYPES[info.dtype])
    if out.size:
        file.read(name, 0, out)
    return out


def _joined(parts: list[tuple[Ints, Any]], axis: int) -> tuple[Ints, Any]:
    """Parts in the order of their positions; of one that was computed twice, the last."""
    positions = np.concatenate([own for own, _ in parts])
    last = len(positions) - 1 - np.unique(positions[::-1], return_index=True)[1]  # in the order of positions
    values = [value for _, value in parts]
    if axis:
        longest = max(value.shape[2] for value in values)
        values = [np.pad(value, ((0, 0), (0, 0), (0, longest - value.shape[2]))) for value in values]
    whole = np.concatenate(values, axis)
    if not np.array_equal(last, np.arange(len(positions))):
        whole = whole[:, last] if axis else whole[last]
    return positions[last], whole


class Cache:
    """The values that `LLM.capture` has kept, by request: each prompt of a call is one, and each choice of it.

    ``cache[name]`` is an array of the only request, ``cache[1, name]`` of the second one. Requests are in the order of
    their calls.

    Attributes:
        requests: What was kept of each, a `Captured`. With `to`, those that the directory held come first.
        names: Names of the points.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.requests: list[Captured] = []

    @classmethod
    def of(cls, request: Captured) -> Cache:
        """A cache of one request."""
        found = cls(tuple(request))
        found.requests.append(request)
        return found

    def __getitem__(self, key: str | tuple[int, str]) -> Any:
        if isinstance(key, str):
            return self._only(key)[key]
        types: Any = tuple(map(type, key)) if isinstance(key, tuple) else ()
        if len(types) != 2 or not (issubclass(types[0], Integral) and issubclass(types[1], str)):
            allowed = "a point's name, such as 'blk.3.resid_post', or a request's number and such a name"
            raise refusal("key", f"{allowed}; cache.requests holds the requests", key)
        number, name = int(key[0]), key[1]
        if not -len(self.requests) <= number < len(self.requests):
            message = f"the cache holds {len(self.requests)} requests, and no number {number}"
            raise ParameterError(message, parameter="request")
        return self.requests[number][name]

    def _only(self, name: str) -> Captured:
        if len(self.requests) != 1:
            how = (
                f": say which, cache[0, {name!r}]"
                if self.requests
                else ": call the model in the block, and in its thread"
            )
            raise ParameterError(f"the cache holds {len(self.requests)} requests{how}", parameter="request")
        return self.requests[0]

    def positions(self, name: str) -> Ints:
        """int64 (N,) positions of the only request's rows."""
        return self._only(name).positions(name)

    def stack(self, name: str) -> Any:
        """The arrays of all requests in one, (requests, N, ...). Raises ParameterError where their shapes differ."""
        arrays = [request[name] for request in self.requests]
        shapes = sorted({array.shape for array in arrays})
        if len(shapes) != 1:
            found = f"the shapes {shapes[0]} and {shapes[-1]}" if shapes else "no request"
            raise ParameterError(f"{name}: {found} cannot be stacked", parameter="name")
        return np.stack(arrays)

    def __len__(self) -> int:
        return len(self.requests)

    def __contains__(self, name: object) -> bool:
        """Whether it is one of `names`: the point of a capture."""
        return name in self.names

    def __iter__(self) -> Iterator[Captured]:
        return iter(self.requests)

    def __repr__(self) -> str:
        return f"<forge.Cache of {len(self.requests)} requests: {_named(list(self.names))}>"


def _named(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:2])}, ... {names[-1]} ({len(names)} points)"
