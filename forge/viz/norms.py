"""How large activations are, by layer and position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from forge.display import html_cells
from forge.keywords import keywords
from forge.llm import LLM
from forge.runtime.encoder import Prompt
from forge.viz.figures import axes_of, heatmap
from forge.viz.tokens import ids_of, texts_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True)
class ActivationNorms:
    """L2 norms of activations at L points and the N tokens of a text.

    Attributes:
        points: Names of the L points, in the order of a pass.
        tokens: The text's N tokens.
        norms: float32 (L, N).
    """

    points: list[str]
    tokens: list[str]
    norms: npt.NDArray[np.float32]

    def _repr_html_(self) -> str:
        """What a notebook shows: the norms, shaded by their logarithms, the last point first."""
        shares = self._shares()
        rows = [
            (point, [(f"{value:.4g}", float(share), "") for value, share in zip(own, of_own, strict=True)])
            for point, own, of_own in zip(self.points, self.norms, shares, strict=True)
        ]
        return html_cells("activation norms", self.tokens, reversed(rows), "L2 norms, shaded by their logarithms")

    def _shares(self) -> npt.NDArray[np.float32]:
        """From 0 for the least positive norm to 1 for the greatest."""
        is_number = np.isfinite(self.norms) & (self.norms > 0)
        logs = np.log(self.norms, where=is_number, out=np.full_like(self.norms, np.nan))
        if not is_number.any():
            return np.zeros_like(self.norms)
        least, greatest = np.nanmin(logs), np.nanmax(logs)
        return np.nan_to_num((logs - least) / (greatest - least)) if greatest > least else np.zeros_like(self.norms)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the norms by colours of a logarithmic scale, the last point on top.

        Args:
            ax: The axes to draw in. None = those of a new figure.

        Raises:
            UnsupportedError: matplotlib is not installed.
        """
        ax = axes_of(ax, len(self.tokens), len(self.points))
        is_number = np.isfinite(self.norms) & (self.norms > 0)
        heatmap(ax, self.norms, self.tokens, self.points, "L2 norm", norm="log" if is_number.any() else None)
        ax.invert_yaxis()
        return ax


@keywords()
def activation_norms(llm: LLM, text: Prompt, points: str | list[str] = "blk.*.resid_post") -> ActivationNorms:
    """L2 norms of activations at each token, from one pass without logits. Hooks of `with` blocks are seen.

    Args:
        llm: The model.
        text: As the prompt of `LLM.generate`, with one BOS; no batch.
        points: Names or globs, as of `LLM.capture`. Of values with heads, (H, D) of a token, the norm is of all.

    Raises:
        ForgeError: As `LLM.capture` and `LLM.logits`. ParameterError for attention weights, which have no norms.
    """
    ids = ids_of(llm, text)
    with llm.capture(points, reduce="norm") as cache:
        llm.logits(ids, positions=[])
    names = list(cache.names)
    return ActivationNorms(names, texts_of(llm, ids), np.stack([cache[name] for name in names]))
