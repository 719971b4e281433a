"""Points of a forward pass, by name, at which hooks read and change what is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from forge.ops.norm import Normed, norm

Shape = tuple[str | int, ...]
F32, ACT = "f32", "act"
"""Types of points: float32, and that of operands: float16 on a GPU, float32 on NumPy."""


@dataclass(frozen=True, slots=True)
class HookPoint:
    """A place in the model's forward pass whose value hooks read and change.

    Attributes:
        name: Such as ``blk.3.attn.q``.
        shape: Sizes of one sequence's value. Letters stand for what differs from step to step: T tokens of the step, S
            positions that they attend to, R tokens whose logits are computed.
        dtype: Of the value on the model's device.
    """

    name: str
    shape: Shape
    dtype: str

    def __str__(self) -> str:
        return f"{self.name:24} ({', '.join(map(str, self.shape))}) {self.dtype}"


class Hook(Protocol):
    """What reads and changes the values of one step. What no hook names is computed as ever, in the same launches."""

    names: frozenset[str]
    """Of the points that it wants."""

    def at(self, name: str, value: Any) -> Any:
        """A point's value, of all tokens of the step, is known.

        value: An array (T, ...), or (R, V) of logits, on the model's device. Later ops may change it in place: who
        keeps it copies it. At `pattern` a list of float32 arrays (H, T, S) on the host, one for each sequence.

        Returns what is computed with: the same object, or another one of the same form.
        """
        ...


class Points:
    """What a hook wants of some points whose names begin alike: those of a sublayer."""

    __slots__ = ("_hook", "_names", "_prefix")

    def __init__(self, hook: Hook, prefix: str, names: frozenset[str]) -> None:
        self._hook, self._prefix, self._names = hook, prefix, names

    def wants(self, *names: str) -> bool:
        """Whether any of these is wanted."""
        return any(name in self._names for name in names)

    def at(self, name: str, value: Any, unit: float = 1.0) -> Any:
        """What is computed with instead of a value, which is the point's divided by the unit."""
        if name not in self._names:
            return value
        seen = value if unit == 1.0 else value * unit
        found = self._hook.at(self._prefix + name, seen)
        if found is seen:
            return value
        return found if unit == 1.0 else found / unit

    def operand(self, name: str, operand: Any, unit: float = 1.0) -> Any:
        """As `at`, for an operand of products. Where it is wanted its norm is computed now."""
        if name not in self._names:
            return operand
        return self.at(name, norm(operand, out="act") if isinstance(operand, Normed) else operand, unit)


def points_in(hook: Hook | None, prefix: str = "") -> Points | None:
    """What a hook wants of the points whose names begin so; None where it wants none of them."""
    if hook is None:
        return None
    names = frozenset(name[len(prefix) :] for name in hook.names if name.startswith(prefix))
    return Points(hook, prefix, names) if names else None
