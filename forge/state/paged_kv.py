"""The KV cache on its device: pages of keys and values for every layer, without any policy."""

from __future__ import annotations

from forge.backend import Backend
from forge.config import ModelConfig
from forge.ops.kv_cache import copy_page


def page_bytes(config: ModelConfig, page_size: int, itemsize: int) -> int:
    """Bytes of one page in all layers, keys and values."""
    return 2 * config.num_layers * page_size * config.num_kv_heads * config.head_dim * itemsize


class KVCache:
    """k and v: (layers, num_pages + 1, P, G, D) in the backend's activation precision.

    Pages 0 to num_pages - 1 are for sequences. Rows of a step that have no sequence write to the one behind them. The
    memory is not initialized: ops read only slots that were written.
    """

    def __init__(self, config: ModelConfig, num_pages: int, page_size: int, backend: Backend) -> None:
        self.num_pages = self.spare_page = num_pages
        self.page_size = page_size
        shape = (config.num_layers, num_pages + 1, page_size, config.num_kv_heads, config.head_dim)
        self.k = backend.empty(shape, backend.dtype)
        self.v = backend.empty(shape, backend.dtype)

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page in all layers: a forked sequence gets its own last page."""
        copy_page(self.k, self.v, source, target)
