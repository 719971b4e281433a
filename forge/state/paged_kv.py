"""Keys and values of all positions, in pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from forge.backend import Backend
from forge.ops.kv_cache import KVPages, copy_page


@dataclass(frozen=True, slots=True)
class PagedKV:
    """Layers that may attend to every earlier position. Source: PagedAttention, arXiv:2309.06180."""

    layers: tuple[int, ...]
    page_size: int
    """P: positions of a page."""
    num_kv_heads: int
    head_dim: int
    itemsize: int
    """Bytes of one number."""

    @property
    def name(self) -> str:
        return "all positions"

    @property
    def page_bytes(self) -> int:
        return 2 * len(self.layers) * self.page_size * self.num_kv_heads * self.head_dim * self.itemsize

    @property
    def token_bytes(self) -> int:
        return self.page_bytes // self.page_size

    def num_entries(self, length: int) -> int:
        return -(-length // self.page_size)

    def num_pages(self, length: int) -> int:
        return self.num_entries(length)

    def num_released(self, position: int) -> int:
        return 0

    def num_shared(self, length: int) -> int:
        """Full pages: no token behind `length` writes to them."""
        return length // self.page_size

    def allocate(self, num_pages: int, backend: Backend) -> KVCache:
        shape = (len(self.layers), num_pages + 1, self.page_size, self.num_kv_heads, self.head_dim)
        return KVCache(backend.empty(shape, backend.dtype), backend.empty(shape, backend.dtype))


class LayerKV(NamedTuple):
    """What an attention layer takes of the state."""

    pages: KVPages
    """k and v of the layer, (num_pages + 1, P, G, D) each."""
    table: int
    """Index of the layer's page table in `Batch.tables`."""


class KVCache:
    """k and v: (layers of the kind, num_pages + 1, P, G, D) in the backend's activation precision.

    The last page is the spare one: rows of a step that have no sequence write to it. The memory is not initialized: ops
    read only positions that were written.
    """

    def __init__(self, k: Any, v: Any) -> None:
        self.k, self.v = k, v

    @property
    def arrays(self) -> tuple[Any, ...]:
        return self.k, self.v

    def layer(self, place: int, table: int) -> LayerKV:
        return LayerKV(KVPages(self.k[place], self.v[place]), table)

    def copy_page(self, source: int, target: int) -> None:
        copy_page(self.k, self.v, source, target)

    def parts(self) -> dict[str, Any]:
        return {"k": self.k, "v": self.v}

    def changing(self, rows: int) -> list[Any]:
        """None: a step that runs twice writes the same keys and values to the same places."""
        return []
