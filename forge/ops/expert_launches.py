"""Launches of the kernels of mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class How:
    activation: str
    weighs_input: bool
    accumulate: bool


def route(*a: Any, **k: Any) -> Any: ...
def supports_row(*a: Any) -> bool: ...
def row(*a: Any) -> None: ...
def tiles(*a: Any) -> None: ...
