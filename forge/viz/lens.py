"""The logit lens: what each layer's residual stream would predict if it were the last one's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from forge.display import html_cells
from forge.errors import ParameterError
from forge.keywords import check_integer, items, keywords
from forge.llm import LLM
from forge.runtime.encoder import Prompt
from forge.runtime.prompts import prompts_of
from forge.runtime.scoring import Positions, places_of
from forge.runtime.unembedding import predicted
from forge.viz.figures import axes_of, heatmap, plain
from forge.viz.tokens import ids_of, texts_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RESIDUAL_BYTES = 256 << 20
"""Of the residuals of prompts that are computed together."""
_MAX_CELLS = 4000
"""Cells of a chart that have their token written in them."""


@dataclass(frozen=True, slots=True)
class LogitLens:
    """What the residual stream predicts at L places of the model and N positions of a text: the K most probable tokens.

    Attributes:
        points: Names of the L places, such as ``blk.3.resid_post``.
        positions: int64 (N,), of the text's tokens.
        tokens: The text's N tokens at these positions.
        ids: int32 (L, N, K), the most probable one first.
        predictions: Their texts, lists of L, N and K.
        logprobs: float32 (L, N, K), their natural log probabilities.
        next_logprobs: float32 (L, N), that of the token that the text has next. NaN behind the last token.
    """

    points: list[str]
    positions: npt.NDArray[np.int64]
    tokens: list[str]
    ids: npt.NDArray[np.int32]
    predictions: list[list[list[str]]]
    logprobs: npt.NDArray[np.float32]
    next_logprobs: npt.NDArray[np.float32]

    def _repr_html_(self) -> str:
        """What a notebook shows: the top token of each layer and position, the last layer first."""
        rows = [(_label(self.points[at]), self._cells(at)) for at in reversed(range(len(self.points)))]
        return html_cells("logit lens", self.tokens, rows, "top token, shaded by its probability")

    def _cells(self, at: int) -> list[tuple[str, float, str]]:
        probabilities = np.exp(self.logprobs[at])  # (N, K)
        return [
            (texts[0], float(own[0]), ", ".join(f"{text!r} {p:.3f}" for text, p in zip(texts, own, strict=True)))
            for texts, own in zip(self.predictions[at], probabilities, strict=True)
        ]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the top tokens, shaded by their probabilities, the last layer on top.

        Args:
            ax: The axes to draw in. None = those of a new figure.

        Raises:
            UnsupportedError: matplotlib is not installed.
        """
        ax = axes_of(ax, len(self.tokens), len(self.points))
        values = np.exp(self.logprobs[:, :, 0])
        labels = [_label(point) for point in self.points]
        heatmap(ax, values, self.tokens, labels, "probability of the top token", vmin=0, vmax=1)
        ax.invert_yaxis()
        if values.size <= _MAX_CELLS:
            for row, texts in enumerate(self.predictions):
                for column, (text, *_) in enumerate(texts):
                    colour = "black" if values[row, column] > 0.5 else "white"
                    ax.text(column, row, plain(text), ha="center", va="center", fontsize=7, color=colour)
        ax.set_ylabel("layer")
        return ax


def _label(point: str) -> str:
    """Of a row: the layer's number. What comes before the first layer is "in"."""
    return point.split(".")[1] if point.endswith("resid_post") else "in"


@overload
def logit_lens(  # type: ignore[overload-overlap]  # a string is a sequence of strings, too
    llm: LLM,
    text: Prompt,
    *,
    layers: Sequence[int] | None = None,
    positions: Positions = None,
    top_k: int = 1,
) -> LogitLens: ...
@overload
def logit_lens(
    llm: LLM,
    text: Sequence[Prompt],
    *,
    layers: Sequence[int] | None = None,
    positions: Positions = None,
    top_k: int = 1,
) -> list[LogitLens]: ...
@keywords()
def logit_lens(
    llm: LLM, text: Any, *, layers: Sequence[int] | None = None, positions: Positions = None, top_k: int = 1
) -> LogitLens | list[LogitLens]:
    """What the residual stream predicts behind each layer, by the output's norm and product.

    The method is nostalgebraist's (2020, "interpreting GPT: the logit lens"). Prompts are computed together, without
    their own logits, and the lens' logits are not kept. Hooks of `with` blocks are seen.

    Args:
        llm: The model.
        text: As the prompt of `LLM.generate`, with one BOS. A list of texts is a batch.
        layers: Behind which layers, ascending. None = behind all, and before the first one.
        positions: Which of the text's tokens, as of `LLM.logits`. None = all.
        top_k: How many tokens are kept at each place.

    Returns:
        A `LogitLens`, or a list of them for a list of texts.

    Raises:
        ForgeError: As `LLM.logits`. ParameterError for a layer that there is not.
    """
    texts, single = prompts_of(text, "text")
    prompts = [ids_of(llm, one) for one in texts]
    check_integer("top_k", top_k, 1, llm.config.vocab_size)
    places = [np.unique(places_of(positions, len(ids))) for ids in prompts]
    if not all(map(len, places)):
        raise ParameterError("positions takes none of a text's tokens", parameter="positions")
    wanted = positions if positions is None or isinstance(positions, slice) else np.ravel(positions).tolist()
    points = _points(llm, layers)
    found: list[LogitLens] = []
    for group in _groups(places, 4 * len(points) * llm.config.width):
        found += _lenses(llm, prompts[group], places[group], wanted, points, top_k)
    return found[0] if single else found


def _points(llm: LLM, layers: Sequence[int] | None) -> list[str]:
    last = llm.config.num_layers - 1
    if layers is None:
        return ["blk.0.resid_pre", *(f"blk.{layer}.resid_post" for layer in range(last + 1))]
    wanted = items("layers", layers, last + 1)
    for layer in wanted:
        check_integer("layers", layer, 0, last)
    if not wanted:
        raise ParameterError("layers is empty", parameter="layers", hint="give at least one, or None for all")
    return [f"blk.{layer}.resid_post" for layer in sorted({int(layer) for layer in wanted})]


def _groups(places: list[npt.NDArray[np.int64]], row_bytes: int) -> Iterator[slice]:
    """Prompts whose residuals fit together; one alone may be larger."""
    start, size = 0, 0
    for at, own in enumerate(places):
        needed = len(own) * row_bytes
        if size and size + needed > _RESIDUAL_BYTES:
            yield slice(start, at)
            start, size = at, 0
        size += needed
    if places:
        yield slice(start, len(places))


def _lenses(
    llm: LLM,
    prompts: list[list[int]],
    places: list[npt.NDArray[np.int64]],
    positions: Positions,
    points: list[str],
    top_k: int,
) -> Iterator[LogitLens]:
    with llm.capture(points, positions=positions) as cache:
        llm.logits(prompts, positions=[])
    rows = np.concatenate([request[point] for request in cache for point in points])  # (prompts * L * N, E)
    behind = [np.array([*ids, -1], np.int32)[own + 1] for ids, own in zip(prompts, places, strict=True)]
    given = np.concatenate([np.tile(one, len(points)) for one in behind])
    whole = predicted(llm._loop, llm.engine, rows, given, top_k)
    of_given = np.where(given < 0, np.float32(np.nan), whole.of_given)
    names = {token: llm.tokenizer.token_text(token) for token in np.unique(whole.ids).tolist()}
    start = 0
    for ids, own in zip(prompts, places, strict=True):
        part = slice(start, start := start + len(points) * len(own))
        shape = len(points), len(own)
        top = whole.ids[part].reshape(*shape, -1)
        yield LogitLens(
            points=list(points),
            positions=own,
            tokens=texts_of(llm, [ids[at] for at in own]),
            ids=top,
            predictions=[[[names[token] for token in tokens] for tokens in layer] for layer in top.tolist()],
            logprobs=whole.logprobs[part].reshape(top.shape),
            next_logprobs=of_given[part].reshape(shape),
        )
