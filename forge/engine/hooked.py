"""The hooks of a step's sequences: each sees the rows of its own sequence, and fails alone."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from forge.backend import Backend
from forge.engine.scheduler import Scheduled
from forge.engine.sequence import Sequence
from forge.errors import ParameterError, of_user

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
PATTERN = ".attn.pattern"
"""What names of attention weights end in: their rows are the second axis, (H, T, S)."""
LOGITS = "logits"


@dataclass(frozen=True, slots=True)
class Where:
    """What a value belongs to, for functions that read or change it.

    Attributes:
        name: The point.
        layer: Its layer; None outside of layers.
        positions: int64 (N,), of the value's rows.
        num_prompt: Tokens of the prompt: positions from there on are generated.
        step: 0 while the prompt is computed; k where the k-th generated token is.
        request: Number of the prompt within its call.
    """

    name: str
    layer: int | None
    positions: Ints
    num_prompt: int
    step: int
    request: int


class SequenceHook(Protocol):
    """What reads or changes values of one sequence."""

    names: frozenset[str]
    """Of the points that it wants."""
    request: int
    """As of `Where`."""

    def selects(self, positions: Ints, num_prompt: int) -> Mask:
        """Which of some positions it wants."""
        ...

    def at(self, value: Any, where: Where) -> Any:
        """The rows of a point's value that it wants: (N, ...), and (H, N, S) of attention weights.

        value: On the model's device, attention weights on the host. Later ops may change it in place.

        Returns what is computed with, of the same shape, or None for the value as it is.
        """
        ...

    def end(self) -> None:
        """The step has been launched."""
        ...

    def finished(self, is_whole: bool) -> None:
        """The sequence has ended: by itself, or else by an error or its caller. Raises nothing."""
        ...

    @property
    def recorded(self) -> Literal["read"] | npt.NDArray[np.float32] | None:
        """What it does at each position that it wants, where that is data and steps that do so may be captured: it only
        reads its points, or adds a vector (E,) to them. None: It runs code of the user's, which sees each step."""
        ...


class _Seen(NamedTuple):
    """What a hook sees of a step."""

    sequence: Sequence
    hook: SequenceHook
    number: int
    """Of the sequence within the step."""
    rows: Ints
    """Of the step's tokens."""
    positions: Ints
    first_row: int
    """Of the sequence."""


class StepHook:
    """All hooks of a step, as `models.hooks.Hook`. What none of them wants of this step is computed as ever.

    What a hook raises ends its own sequence: the value stays, and `Sequence.error` is set.
    """

    def __init__(self, step: list[Scheduled], backend: Backend) -> None:
        self._backend = backend
        self._seen: list[_Seen] = []
        self._logit_rows: Ints = np.zeros(0, np.int64)
        self._indices: dict[tuple[int, ...], Any] = {}
        row = 0
        for number, (sequence, start, count) in enumerate(step):
            positions = np.arange(start, start + count)
            for hook in sequence.hooks:
                chosen = np.flatnonzero(self._chosen(sequence, hook, positions))
                if len(chosen):
                    self._seen.append(_Seen(sequence, hook, number, row + chosen, positions[chosen], row))
            row += count
        self.names = frozenset[str]().union(*(seen.hook.names for seen in self._seen))

    @staticmethod
    def _chosen(sequence: Sequence, hook: SequenceHook, positions: Ints) -> Mask:
        try:
            return hook.selects(positions, sequence.num_prompt)
        except Exception as error:
            sequence.error = sequence.error or error
            return np.zeros(len(positions), bool)

    def logit_rows(self, asked: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
        """The step's tokens whose logits are to be computed: those that are asked for, and those that hooks want."""
        wanted = [seen.rows for seen in self._seen if LOGITS in seen.hook.names]
        self._logit_rows = np.unique(np.concatenate([asked, *wanted])).astype(np.int64)
        return self._logit_rows.astype(np.int32)

    def at(self, name: str, value: Any) -> Any:
        found, is_own = value, False
        for seen in self._seen:
            if name not in seen.hook.names or seen.sequence.error:
                continue
            try:
                changed = self._changed(name, found, seen)
                if changed is None:
                    continue
                if not is_own:
                    found, is_own = found.copy(), True
                self._write(name, found, seen, changed)
            except Exception as error:
                seen.sequence.error = of_user(error, __file__)
        return found

    def _changed(self, name: str, value: Any, seen: _Seen) -> Any:
        """What a hook makes of its rows, on the device; None where they stay."""
        rows = self._rows(name, value, seen)
        found = seen.hook.at(rows, _where(name, seen.hook, seen.sequence, seen.positions))
        if found is None or found is rows:
            return None
        if isinstance(rows, np.ndarray):
            found = np.asarray(found, rows.dtype)
        else:
            found = self._backend.asarray(found, rows.dtype)
        if found.shape != rows.shape:
            raise ParameterError(
                f"{name}: what a hook gives has the shape {found.shape}, and the value has {rows.shape}",
                parameter="value",
            )
        return found

    def _rows(self, name: str, value: Any, seen: _Seen) -> Any:
        if name.endswith(PATTERN):
            return value[seen.number][:, self._index(seen.rows - seen.first_row, is_on_host=True)]
        return value[self._index(self._places(name, seen))]

    def _write(self, name: str, value: Any, seen: _Seen, changed: Any) -> None:
        if name.endswith(PATTERN):
            value[seen.number] = value[seen.number].copy()
            value[seen.number][:, self._index(seen.rows - seen.first_row, is_on_host=True)] = changed
        else:
            value[self._index(self._places(name, seen))] = changed

    def _places(self, name: str, seen: _Seen) -> Ints:
        """The rows of a value: those of tokens, but logits are computed of some tokens alone."""
        return np.searchsorted(self._logit_rows, seen.rows) if name == LOGITS else seen.rows

    def _index(self, rows: Ints, *, is_on_host: bool = False) -> Any:
        """Rows in a row are a slice: a view. Others are an index on the device, uploaded once."""
        first, last = int(rows[0]), int(rows[-1])
        if last - first + 1 == len(rows):
            return slice(first, last + 1)
        if is_on_host:
            return rows
        key = tuple(rows.tolist())
        if key not in self._indices:
            self._indices[key] = self._backend.asarray(rows)
        return self._indices[key]

    def end(self) -> None:
        """The step has been launched: hooks take what they wait for."""
        for seen in self._seen:
            if not seen.sequence.error:
                try:
                    seen.hook.end()
                except Exception as error:
                    seen.sequence.error = of_user(error, __file__)


def _where(name: str, hook: SequenceHook, sequence: Sequence, positions: Ints) -> Where:
    layer = int(name.split(".")[1]) if name.startswith("blk.") else None
    step = max(int(positions[-1]) - sequence.num_prompt + 1, 0)
    return Where(name, layer, positions, sequence.num_prompt, step, hook.request)


def deliver(sequence: Sequence, positions: Ints, found: Items[tuple[SequenceHook, str, Any]]) -> None:
    """Hooks get what recorded steps have read of a sequence's positions: the points' values, (N, E) each."""
    try:
        for hook, name, value in found:
            hook.at(value, _where(name, hook, sequence, positions))
        for hook in dict.fromkeys(hook for hook, _, _ in found):
            hook.end()
    except Exception as error:
        sequence.error = sequence.error or of_user(error, __file__)


class Watch:
    """A hook of all positions that changes nothing: what is launched for hooks is launched."""

    request = 0
    recorded = None

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names

    def selects(self, positions: Ints, num_prompt: int) -> Mask:
        return np.ones(len(positions), bool)

    def at(self, value: Any, where: Where) -> None:
        return None

    def end(self) -> None: ...

    def finished(self, is_whole: bool) -> None: ...
