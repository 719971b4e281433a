"""Attention weights of a text, a map for each head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from forge.display import html_cells
from forge.errors import ParameterError
from forge.keywords import check_integer, items, keywords
from forge.llm import LLM
from forge.runtime.encoder import Prompt
from forge.viz.figures import axes_of, figure_of, plain
from forge.viz.tokens import ids_of, texts_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_NAMES = 60
"""Tokens of a map that has their names at its sides."""


@dataclass(frozen=True, slots=True)
class AttentionMaps:
    """Attention weights of some heads of a layer over the T tokens of a text.

    Attributes:
        layer: Its number.
        heads: Numbers of the H heads.
        tokens: The text's T tokens.
        weights: float32 (H, T, T): row t of a head says how much token t attends to each token. Rows add up to 1, less
            the share of a sink where the model has these.
    """

    layer: int
    heads: list[int]
    tokens: list[str]
    weights: npt.NDArray[np.float32]

    def _repr_html_(self) -> str:
        """What a notebook shows: of each head and token, the token that it attends to most."""
        best = self.weights.argmax(axis=2)  # (H, T)
        rows = []
        for head, own, weights in zip(self.heads, best, self.weights, strict=True):
            cells = [
                (self.tokens[at], float(row[at]), f"{row[at]:.3f} at position {at}")
                for at, row in zip(own, weights, strict=True)
            ]
            rows.append((f"head {head}", cells))
        caption = "the token that each one attends to most, shaded by its weight; plot() draws all weights"
        return html_cells(f"attention of layer {self.layer}", self.tokens, rows, caption)

    def plot(self, ax: Axes | Sequence[Axes] | None = None) -> list[Axes]:
        """Draw a map for each head: rows are the tokens that attend, columns those attended to.

        Args:
            ax: The axes to draw in, as many as heads. None = those of a new figure.

        Returns:
            The axes, in the order of the heads.

        Raises:
            ParameterError: There are not as many axes as heads.
            UnsupportedError: matplotlib is not installed.
        """
        if ax is None:
            axes = figure_of(len(self.heads))
        else:
            axes = list(np.ravel(np.asarray(ax, object)))
            if len(axes) != len(self.heads):
                message = f"ax holds {len(axes)} axes, and there are {len(self.heads)} heads"
                raise ParameterError(message, parameter="ax")
            axes_of(axes[0], 0, 0)
        names = [plain(token) for token in self.tokens] if len(self.tokens) <= _MAX_NAMES else []
        for own, head, weights in zip(axes, self.heads, self.weights, strict=True):
            own.imshow(weights, vmin=0, vmax=1, interpolation="nearest")
            own.set_title(f"head {head}", fontsize="small")
            own.set_xticks(np.arange(len(names)), names, rotation=90, fontsize="x-small")
            own.set_yticks(np.arange(len(names)), names, fontsize="x-small")
        return axes


@keywords()
def attention(llm: LLM, text: Prompt, layer: int, heads: int | Sequence[int] | None = None) -> AttentionMaps:
    """Attention weights of a layer, from one pass without logits.

    Args:
        llm: The model.
        text: As the prompt of `LLM.generate`, with one BOS; no batch.
        layer: From 0.
        heads: Their numbers, in the order in which they are shown. None = all.

    Raises:
        ForgeError: As `LLM.attention`. ParameterError for a head that there is not.
    """
    ids = ids_of(llm, text)
    check_integer("layer", layer, 0, llm.config.num_layers - 1)
    weights = llm.attention(ids, int(layer))
    most = len(weights)
    given: Any = [heads] if isinstance(heads, Integral | str) else heads
    wanted = range(most) if given is None else items("heads", given, most)
    for head in wanted:
        check_integer("heads", head, 0, most - 1)
    chosen = [int(head) for head in wanted]
    if not chosen:
        raise ParameterError("heads is empty", parameter="heads", hint="give at least one, or None for all")
    return AttentionMaps(int(layer), chosen, texts_of(llm, ids), weights[chosen])
