"""How much each token of a text surprises the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from forge.display import html_shaded
from forge.errors import ParameterError
from forge.keywords import keywords
from forge.llm import LLM
from forge.runtime.encoder import Prompt
from forge.viz.figures import axes_of, plain
from forge.viz.tokens import ids_of, texts_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FULL_BITS = 16.0
"""Surprise of the darkest shade."""


@dataclass(frozen=True, slots=True)
class TokenSurprise:
    """The surprise of each token of a text behind the ones before it.

    Attributes:
        ids: The text's T token ids.
        tokens: Their texts.
        bits: float64 (T,): -log2 of each token's probability. NaN for the first one, which nothing comes before.
        mean_bits: Their mean.
    """

    ids: list[int]
    tokens: list[str]
    bits: npt.NDArray[np.float64]
    mean_bits: float

    def _repr_html_(self) -> str:
        """What a notebook shows: the text, shaded by surprise."""
        pieces = [
            (text, bits / _FULL_BITS, "the first token" if math.isnan(bits) else f"{bits:.2f} bits")
            for text, bits in zip(self.tokens, self.bits.tolist(), strict=True)
        ]
        return html_shaded(pieces, f"{self.mean_bits:.2f} bits per token of {len(self.tokens) - 1}")

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw a bar for each token.

        Args:
            ax: The axes to draw in. None = those of a new figure.

        Raises:
            UnsupportedError: matplotlib is not installed.
        """
        ax = axes_of(ax, len(self.tokens), 8)
        places = np.arange(len(self.tokens))
        ax.bar(places[1:], self.bits[1:])
        ax.set_xticks(places, [plain(token) for token in self.tokens], rotation=90)
        ax.set_ylabel("surprise (bits)")
        return ax


@keywords()
def token_surprise(llm: LLM, text: Prompt) -> TokenSurprise:
    """The surprise of each token, in bits, from one pass whose logits are not kept. Hooks of `with` blocks are seen.

    Args:
        llm: The model.
        text: As the prompt of `LLM.generate`, with one BOS; no batch.

    Raises:
        ForgeError: As `LLM.score`. ParameterError for a text of one token.
    """
    ids = ids_of(llm, text)
    if len(ids) < 2:
        raise ParameterError("the text has fewer than two tokens: there is nothing to predict", parameter="text")
    bits = np.array([math.nan, *llm.score(ids[:1], ids[1:]).logprobs]) / -math.log(2)
    return TokenSurprise(ids, texts_of(llm, ids), bits, float(bits[1:].mean()))
