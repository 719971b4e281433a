"""The state of all layers on a device, and which kinds a model's layers have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from forge.backend import Backend
from forge.config import ModelConfig
from forge.state.kind import Kind
from forge.state.paged_kv import PagedKV
from forge.state.window_kv import WindowKV


class Cache(Protocol):
    """The arrays of one kind on a device."""

    @property
    def arrays(self) -> tuple[Any, ...]: ...

    def layer(self, place: int, table: int) -> Any:
        """What the kind's `place`-th layer takes; `table` is the kind's index in `Batch.tables`."""

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page in all layers of the kind."""

    def parts(self) -> dict[str, Any]:
        """The arrays that hold positions by name, (layers of the kind, num_pages + 1, P, ...) each."""

    def changing(self, rows: int) -> list[Any]:
        """Arrays that have another value when a decode step of so many rows runs twice.

        A step that is compared with its replay begins twice from the same values of these arrays.
        """


class StoredKind(Kind, Protocol):
    """A kind that makes the arrays of its layers."""

    def allocate(self, num_pages: int, backend: Backend) -> Cache:
        """The arrays of pages 0 to num_pages - 1, and of the spare page `num_pages`."""


def kinds_of(
    config: ModelConfig, *, context: int, page_size: int, step_tokens: int, itemsize: int
) -> tuple[PagedKV, ...]:
    """The kinds of a model's layers, those that grow with the context first. Layers with the same window and heads are
    of one kind. Layers that read the keys and values of others are of none.

    Args:
        config: The model.
        context: Most tokens of a sequence. A window that is not shorter is none.
        page_size: P, positions of a page.
        step_tokens: Most tokens of one sequence in one step.
        itemsize: Bytes of a number of keys and values.
    """
    layers: dict[tuple[int, int, int], list[int]] = {}
    for layer, window in enumerate(config.layer_windows):
        if config.layer_kv[layer] == layer:
            heads = config.layer_kv_heads[layer], config.layer_head_dims[layer]
            layers.setdefault((window if window < context else 0, *heads), []).append(layer)
    kinds: list[PagedKV] = []
    for (window, kv_heads, head_dim), own in sorted(layers.items()):
        shape = tuple(own), page_size, kv_heads, head_dim, itemsize
        kinds.append(WindowKV(*shape, window, step_tokens) if window else PagedKV(*shape))
    return tuple(kinds)


class ModelState:
    """What the layers keep of all sequences between steps. It has no policy: others decide who gets a page.

    `state[layer]` is what a layer takes, such as `LayerKV`. Kinds and caches have the order of `Batch.tables`.
    """

    def __init__(self, kinds: Sequence[StoredKind], num_pages: Sequence[int], page_size: int, backend: Backend) -> None:
        self.kinds = tuple(kinds)
        self.num_pages = tuple(num_pages)
        """Of each kind, without its spare page, which has this number."""
        self.page_size = page_size
        """P, of all kinds whose state grows."""
        self.caches: tuple[Cache, ...] = tuple(
            kind.allocate(count, backend) for kind, count in zip(kinds, num_pages, strict=True)
        )
        self._layers = {
            layer: cache.layer(place, table)
            for table, (kind, cache) in enumerate(zip(kinds, self.caches, strict=True))
            for place, layer in enumerate(kind.layers)
        }

    def __getitem__(self, layer: int) -> Any:
        return self._layers[layer]

    def changing(self, rows: int) -> list[Any]:
        """What the caches' `changing` give."""
        return [array for cache in self.caches for array in cache.changing(rows)]
