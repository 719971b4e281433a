"""What one forward step takes beside the weights and the layers' state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class PageTable(NamedTuple):
    """Where one kind of layers finds its state of the batch's tokens; int32 arrays on the model's device."""

    slot_mapping: Any
    """(T,) page * P + offset: where a token's key and value go"""
    pages: Any
    """(B, most pages of a sequence, or more) the sequences' pages, in order; released and unused entries are numbers
    of some page, which is not read"""


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of B sequences, flattened; int32 arrays on the model's device.

    Sequence b has the tokens starts[b] to starts[b + 1], the last of its lengths[b] positions.
    """

    ids: Any  # (T,)
    positions: Any  # (T,)
    starts: Any  # (B + 1,)
    lengths: Any  # (B,)
    tables: tuple[PageTable, ...]
    """One for each kind of layer state"""
    logit_rows: Any | None
    """(R,) tokens whose logits are wanted; None = all T"""
    adapters: Any | None = None
    """(T,) the slot of each token's adapter, -1 = it has none; None = no token has one"""

    def arrays(self) -> list[Any]:
        """All of them, in an order of their own."""
        tables = [array for table in self.tables for array in table]
        adapters = [] if self.adapters is None else [self.adapters]
        return [self.ids, self.positions, self.starts, self.lengths, self.logit_rows, *tables, *adapters]

    @property
    def is_decode(self) -> bool:
        """Whether each sequence has one token."""
        return len(self.ids) == len(self.lengths)
