"""What charts share. matplotlib is imported when the first one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from forge.display import visible
from forge.errors import UnsupportedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INCHES = 0.45
"""Of a column of a chart, and less of a row."""


def axes_of(ax: Axes | None, columns: int, rows: int) -> Axes:
    """The axes to draw in: those that were given, or those of a new figure for so many cells.

    Raises UnsupportedError without matplotlib, here and below.
    """
    pyplot = _pyplot()
    if ax is not None:
        return ax
    size = min(3 + _INCHES * columns, 24.0), min(2 + 0.6 * _INCHES * rows, 18.0)
    made: Axes = pyplot.subplots(figsize=size, layout="constrained")[1]
    return made


def figure_of(count: int) -> list[Axes]:
    """The axes of a new figure with so many square charts."""
    columns = min(count, 4)
    rows = -(-count // columns)
    _, axes = _pyplot().subplots(rows, columns, figsize=(3 * columns, 3 * rows), squeeze=False, layout="constrained")
    for own in axes.flat[count:]:
        own.remove()
    return list(axes.flat[:count])


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        message = f"plot needs matplotlib ({error})"
        raise UnsupportedError(message, hint="pip install 'forge-llm[viz]'") from None
    return pyplot


def heatmap(
    ax: Axes,
    values: npt.NDArray[Any],
    columns: Sequence[str],
    rows: Sequence[str],
    label: str,
    *,
    norm: Any = None,
    vmin: float | None = None,
    vmax: float | None = None,
) -> None:
    """Draw values (R, C) with the names of rows and columns. norm, vmin, vmax: As of `Axes.imshow`."""
    image = ax.imshow(values, aspect="auto", interpolation="nearest", norm=norm, vmin=vmin, vmax=vmax)
    ax.set_xticks(np.arange(len(columns)), [plain(name) for name in columns], rotation=90)
    ax.set_yticks(np.arange(len(rows)), [plain(name) for name in rows])
    assert ax.figure is not None
    ax.figure.colorbar(image, ax=ax, label=label)


def plain(text: str) -> str:
    """A token for a chart, where $ begins a formula."""
    return visible(text).replace("$", r"\$")
