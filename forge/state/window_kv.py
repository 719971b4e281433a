"""Keys and values of the latest positions alone, for layers with a sliding window."""

from __future__ import annotations

from dataclasses import dataclass

from forge.state.paged_kv import PagedKV


@dataclass(frozen=True, slots=True)
class WindowKV(PagedKV):
    """Layers whose queries see the `window` latest positions, their own included.

    Pages have the same places in a sequence's list as those of `PagedKV`. A page that lies wholly before the window of
    the next query is released: attention reads its entry and not what the page holds.
    """

    window: int
    step_tokens: int
    """Most tokens of one sequence in one step."""

    @property
    def name(self) -> str:
        return f"window of {self.window}"

    @property
    def token_bytes(self) -> int:
        return 0

    def num_pages(self, length: int) -> int:
        """Pages of the positions that the tokens of one step see: the window of the first one, and themselves."""
        reach = self._reach - 1 + self.step_tokens
        return min(self.num_entries(length), self.num_entries(reach - 1) + 1)  # not aligned with a page's start

    def num_released(self, position: int) -> int:
        return max(position + 1 - self._reach, 0) // self.page_size

    @property
    def _reach(self) -> int:
        """Positions that attention reads for one query. Decoding reads one before a window of one, with no weight."""
        return max(self.window, 2)
