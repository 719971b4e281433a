"""What a sequence's pages hold, on the host: read from a model's state and written to it, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from forge.backend import Backend
from forge.state.model_state import ModelState


class StoredPart(NamedTuple):
    """One array of one layer, such as its keys."""

    name: str
    """As "blk.3.k"."""
    kind: int
    """Number of the kind of layer state."""
    array: Any
    """On the device, (num_pages + 1, P, ...)."""

    @property
    def page_size(self) -> int:
        """P, the positions of a page."""
        return int(self.array.shape[1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what it has of one position."""
        return tuple(self.array.shape[2:])


def stored_parts(state: ModelState) -> list[StoredPart]:
    """All arrays that hold what sequences have computed."""
    return [
        StoredPart(f"blk.{layer}.{name}", number, array[place])
        for number, (kind, cache) in enumerate(zip(state.kinds, state.caches, strict=True))
        for place, layer in enumerate(kind.layers)
        for name, array in cache.parts().items()
    ]


def read_part(part: StoredPart, pages: list[int], num_positions: int, backend: Backend) -> npt.NDArray[Any]:
    """The first positions (S, ...) that pages hold."""
    out = np.empty((len(pages), part.page_size, *part.shape), part.array.dtype)
    with backend.active():
        for at, run in _runs(pages):
            out[at : at + len(run)] = backend.to_numpy(part.array[run.start : run.stop])
    return out.reshape(-1, *part.shape)[:num_positions]


def write_part(part: StoredPart, pages: list[int], values: npt.NDArray[Any], backend: Backend) -> None:
    """Write positions (S, ...) to pages, and zeros behind them to the end of the last page."""
    padded = np.zeros((len(pages) * part.page_size, *part.shape), part.array.dtype)
    padded[: len(values)] = values
    padded = padded.reshape(len(pages), part.page_size, *part.shape)
    for at, run in _runs(pages):
        backend.upload(part.array[run.start : run.stop], padded[at : at + len(run)])


def _runs(pages: list[int]) -> Iterator[tuple[int, range]]:
    """Neighbouring pages that follow each other: the place of the first one, and their numbers."""
    start = 0
    for end in range(1, len(pages) + 1):
        if end == len(pages) or pages[end] != pages[end - 1] + 1:
            yield start, range(pages[start], pages[end - 1] + 1)
            start = end
