"""Kinds of layer state: what they say of pages and bytes, against counting positions and measuring arrays."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import ARCH

from forge import models
from forge.backend import NUMPY
from forge.config import ModelConfig
from forge.formats import gguf
from forge.state.model_state import ModelState, kinds_of
from forge.state.paged_kv import PagedKV
from forge.state.window_kv import WindowKV


def window_kind(page_size: int, window: int, step_tokens: int) -> WindowKV:
    return WindowKV((0,), page_size, 1, 1, 4, window, step_tokens)


def config_of(name: str) -> ModelConfig:
    with gguf.read(ARCH / name / "model.gguf") as file:
        return models.read_config(file)


def kinds(name: str, context: int, **changes: Any) -> tuple[PagedKV, ...]:
    sizes = {"page_size": 8, "step_tokens": 16, "itemsize": 4} | changes
    return kinds_of(config_of(name), context=context, **sizes)


@given(st.integers(1, 9), st.integers(1, 30), st.integers(0, 100))
def test_a_window_releases_the_pages_that_no_later_query_sees(page_size: int, window: int, position: int) -> None:
    read = max(window, 2)  # decoding reads the position before a window of one
    seen = {p // page_size for query in range(position, position + 200) for p in range(query + 1 - read, query + 1)}
    released = window_kind(page_size, window, 1).num_released(position)
    assert released == min(page for page in seen if page >= 0)


@given(st.integers(1, 9), st.integers(1, 30), st.integers(1, 20))
def test_a_window_holds_the_pages_that_the_tokens_of_any_step_see(
    page_size: int, window: int, step_tokens: int
) -> None:
    kind = window_kind(page_size, window, step_tokens)
    counts = [
        len({p // page_size for p in range(start + 1 - max(window, 2), start + step_tokens)})
        for start in range(200, 200 + page_size)
    ]
    assert kind.num_pages(10_000) == max(counts)
    for length in range(60):
        assert kind.num_pages(length) == min(-(-length // page_size), max(counts))


@given(st.integers(1, 9), st.integers(0, 100))
def test_all_positions_are_held_by_layers_without_a_window(page_size: int, length: int) -> None:
    kind = PagedKV((0,), page_size, 1, 1, 4)
    assert kind.num_pages(length) == kind.num_entries(length) == len({p // page_size for p in range(length)})
    assert kind.num_released(length) == 0


@given(st.integers(1, 9), st.integers(1, 30), st.integers(0, 100))
def test_a_fork_shares_the_pages_that_nobody_writes_to_any_more(page_size: int, window: int, length: int) -> None:
    for kind in (PagedKV((0,), page_size, 1, 1, 4), window_kind(page_size, window, 1)):
        written = {p // page_size for p in range(length, length + 50)}
        assert kind.num_shared(length) == min(written)


@pytest.mark.parametrize(
    ("name", "context", "layers"),
    [
        ("llama", 96, {"all positions": (0, 1, 2)}),
        ("gemma3", 96, {"all positions": (5,), "window of 16": (0, 1, 2, 3, 4, 6)}),
        ("gemma3", 17, {"all positions": (5,), "window of 16": (0, 1, 2, 3, 4, 6)}),
        ("gemma3", 16, {"all positions": tuple(range(7))}),  # the window is not shorter than the context
        ("gemma2", 96, {"all positions": (1, 3), "window of 32": (0, 2)}),
        ("phi3_window", 96, {"window of 16": (0, 1)}),
    ],
)
def test_layers_with_the_same_window_are_of_one_kind(
    name: str, context: int, layers: dict[str, tuple[int, ...]]
) -> None:
    assert {kind.name: kind.layers for kind in kinds(name, context)} == layers


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3_window"])
def test_bytes_are_those_of_the_arrays(name: str) -> None:
    config, found = config_of(name), kinds(name, 96)
    state = ModelState(found, [3 + number for number in range(len(found))], 8, NUMPY)
    for number, (kind, cache) in enumerate(zip(found, state.caches, strict=True)):
        assert kind.page_bytes * (4 + number) == sum(array.nbytes for array in cache.arrays)
        of_a_token = 2 * 4 * len(kind.layers) * config.num_kv_heads * config.head_dim
        assert kind.page_bytes == 8 * of_a_token
        assert kind.token_bytes == (0 if kind.name.startswith("window") else of_a_token)


def test_each_layer_has_pages_of_its_own_and_the_table_of_its_kind() -> None:
    found = kinds("gemma3", 96)
    state = ModelState(found, [3, 2], 8, NUMPY)
    for layer in range(7):
        pages, table = state[layer]
        assert layer in found[table].layers
        pages.k[...], pages.v[...] = layer, -layer
    for layer in range(7):
        pages, _ = state[layer]
        assert set(pages.k.flat) == {layer}
        assert set(pages.v.flat) == {-layer}


def test_a_page_is_copied_in_all_layers_of_its_kind_alone() -> None:
    state = ModelState(kinds("gemma3", 96), [3, 3], 8, NUMPY)
    for cache in state.caches:
        for array in cache.arrays:
            array[...] = 0
            array[:, 1] = 5
    state.caches[1].copy_page(1, 2)
    (k, v), (window_k, window_v) = (cache.arrays for cache in state.caches)
    assert not k[:, 2].any()
    assert not v[:, 2].any()
    assert (window_k[:, 2] == 5).all()
    assert (window_v[:, 2] == 5).all()
    assert not window_k[:, 0].any()
