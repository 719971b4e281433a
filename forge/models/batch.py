"""What one forward step takes beside weights and cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of B sequences, flattened; int32 arrays on the model's device.

    Sequence b has the tokens starts[b] to starts[b + 1], the last of its lengths[b] positions. A slot is
    page * P + offset: where a token's key and value go.
    """

    ids: Any
    """(T,)"""
    positions: Any
    """(T,)"""
    slots: Any
    """(T,)"""
    starts: Any
    """(B + 1,)"""
    lengths: Any
    """(B,)"""
    page_table: Any
    """(B, most pages of a sequence, or more); beside a row's own pages stand numbers of some"""
    logit_rows: Any | None
    """(R,) tokens whose logits are wanted; None = all T"""

    @property
    def is_decode(self) -> bool:
        """Whether each sequence has one token."""
        return len(self.ids) == len(self.lengths)
