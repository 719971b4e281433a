"""What is done to a family's tensors on their way to GGUF's names: an edit takes a stored tensor, or the stacked
experts of a layer, and gives those that it becomes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from forge.checkpoints.settings import Settings
from forge.checkpoints.views import Indices, Pick, Picked, Stored, Transposed, View, Whole, picked
from forge.errors import FormatError

Edit = Callable[[View, Settings], tuple[View, ...]]


def _paired(view: View, heads: int, settings: Settings) -> tuple[View, ...]:
    dim = view.shape[0] // heads
    if len(view.shape) > 2 or view.shape[0] % heads or dim % 2:
        raise FormatError(f"{settings.path}: a tensor {view.shape} cannot be that of {heads} heads")

    def pick(rows: Indices) -> Indices:
        head, place = rows // dim, rows % dim
        source: Indices = head * dim + place % 2 * (dim // 2) + place // 2
        return source

    return (picked(view, pick),)


def pair_queries(view: View, settings: Settings) -> tuple[View, ...]:
    """Queries whose heads rotate numbers i and i + D/2: those become neighbours. For weights and biases."""
    return _paired(view, settings.heads, settings)


def pair_keys(view: View, settings: Settings) -> tuple[View, ...]:
    """Keys, as `pair_queries`."""
    return _paired(view, settings.kv_heads, settings)


def _half(view: View, axis: int, settings: Settings) -> int:
    """Half of a side of a tensor that holds gates and ups. Raises FormatError for vectors, and for odd sides."""
    if len(view.shape) < 2 or view.shape[axis] % 2:
        raise FormatError(f"{settings.path}: a tensor {view.shape} cannot be gates and ups")
    return view.shape[axis] // 2


def halves(view: View, settings: Settings) -> tuple[View, ...]:
    """Gate over up, (2 * F, E) or for each expert (X, 2 * F, E): two tensors."""
    size = _half(view, -2, settings)
    *more, rows, cols = view.shape

    def part(offset: int) -> View:
        pick: Pick = lambda out: out // size * rows + out % size + offset  # noqa: E731
        return Picked(view, pick, (*more, size, cols))

    return part(0), part(size)


def alternate(view: View, settings: Settings) -> tuple[View, ...]:
    """Rows of gate and up in turn, for each expert (X, 2 * F, E): two tensors."""
    shape = (*view.shape[:-2], _half(view, -2, settings), view.shape[-1])
    return Picked(view, lambda out: 2 * out, shape), Picked(view, lambda out: 2 * out + 1, shape)


def alternate_numbers(view: View, settings: Settings) -> tuple[View, ...]:
    """Biases of gate and up in turn, (X, 2 * F): two tensors."""
    shape = (*view.shape[:-1], _half(view, -1, settings))
    return Whole(view, lambda all: all[..., ::2], shape), Whole(view, lambda all: all[..., 1::2], shape)


def transposed(view: View, settings: Settings) -> tuple[View, ...]:
    """Matrices stored with their inputs as rows. Vectors stay as they are."""
    return (Transposed(_stored(view, settings)),) if len(view.shape) > 1 else (view,)


def transposed_halves(view: View, settings: Settings) -> tuple[View, ...]:
    """Gate beside up, (X, E, 2 * F): two tensors (X, F, E)."""
    size = _half(view, -1, settings)
    stored = _stored(view, settings)
    return Transposed(stored, 0, 1, size), Transposed(stored, size, 1, size)


def transposed_alternate(view: View, settings: Settings) -> tuple[View, ...]:
    """Columns of gate and up in turn, (X, E, 2 * F): two tensors (X, F, E)."""
    size = _half(view, -1, settings)
    stored = _stored(view, settings)
    return Transposed(stored, 0, 2, size), Transposed(stored, 1, 2, size)


def _stored(view: View, settings: Settings) -> Stored:
    if not isinstance(view, Stored):
        raise FormatError(f"{settings.path}: experts that are stored transposed should be F32, F16 or BF16")
    return view


def qkv_rows(view: View, settings: Settings) -> tuple[View, ...]:
    """Queries over keys over values: three tensors."""
    dim = settings.head_dim
    sizes = [settings.heads * dim, settings.kv_heads * dim, settings.kv_heads * dim]
    _check_rows(view, sum(sizes), settings)
    starts = (0, sizes[0], sizes[0] + sizes[1])
    return tuple(picked(view, partial(np.add, start), size) for start, size in zip(starts, sizes, strict=True))


def falcon_groups(settings: Settings) -> int:
    """Key heads of a Falcon."""
    if settings.flag("new_decoder_architecture", False):
        return settings.integer("num_kv_heads n_head_kv", settings.heads, min=1, max=settings.heads)
    return 1 if settings.flag("multi_query", True) else settings.heads


def falcon_qkv(view: View, settings: Settings) -> tuple[View, ...]:
    """For each key head its queries, its key and its value: all queries, all keys, all values."""
    return _grouped_qkv(view, falcon_groups(settings), settings)


def neox_qkv(view: View, settings: Settings) -> tuple[View, ...]:
    """For each head its query, its key and its value: all queries, all keys, all values."""
    return _grouped_qkv(view, settings.heads, settings)


def _grouped_qkv(view: View, groups: int, settings: Settings) -> tuple[View, ...]:
    dim = settings.integer("hidden_size", min=1) // settings.heads
    shared = settings.heads // groups
    _check_rows(view, groups * (shared + 2) * dim, settings)
    queries = groups * shared * dim

    def pick(rows: Indices) -> Indices:
        head = rows // dim  # of all queries, then of all keys, then of all values
        of_keys = head - queries // dim
        of_values = of_keys - groups
        group = np.where(of_keys < 0, head // shared, np.where(of_values < 0, of_keys, of_values))
        place = np.where(of_keys < 0, head % shared, np.where(of_values < 0, shared, shared + 1))
        source: Indices = (group * (shared + 2) + place) * dim + rows % dim
        return source

    return (picked(view, pick),)


def _check_rows(view: View, expected: int, settings: Settings) -> None:
    if view.shape[0] != expected:
        raise FormatError(
            f"{settings.path}: a tensor of queries, keys and values has {view.shape[0]} rows and not {expected}"
        )
