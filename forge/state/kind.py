"""What the planner and the scheduler ask every kind of layer state. Integers only."""

from __future__ import annotations

from typing import Protocol


class Kind(Protocol):
    """How some layers of a model keep what they need of a sequence.

    State lies in pages. A sequence has one list of them for each kind. Entries that the sequence does not need any more
    are released, and hold the number of the kind's spare page. A kind whose state does not grow has one page per
    sequence, which a fork copies.

    No position is computed twice in the same pages. A failed step ends its sequences. Of their pages it leaves those as
    they were that a fork behind the computed tokens would share (`num_shared`), and nothing else is relied on. A
    sequence that loses its pages begins at position 0 with others, and a kind takes over nothing of what these hold.
    """

    @property
    def name(self) -> str:
        """What people read of it, such as "window of 512"."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers, from 0."""

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all these layers."""

    @property
    def token_bytes(self) -> int:
        """Bytes that each further token of a long context takes; 0 where the state does not grow with it."""

    def num_entries(self, length: int) -> int:
        """Entries in the page list of a sequence of `length` tokens, released ones included."""

    def num_pages(self, length: int) -> int:
        """The most pages that a sequence holds at one time on its way to `length` tokens."""

    def num_released(self, position: int) -> int:
        """Leading entries that no token from `position` on reads or writes."""

    def num_shared(self, length: int) -> int:
        """Leading entries that a fork behind `length` tokens shares with its parent. The fork copies the others."""
