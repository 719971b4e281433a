"""EngineConfig.deterministic on NumPy: what a request gives has the same bits whatever runs beside it."""

from __future__ import annotations

import numpy as np
import pytest
from threadpoolctl import threadpool_limits
from tiny_models import count_preemptions, random_prompts, tiny_llm

from forge import LLM, Completion, SamplingParams
from forge.backend.threads import Threads
from forge.ops import fixed
from forge.ops.attention import AttentionSpec, paged_attention
from forge.ops.kv_cache import KVPages
from forge.ops.linear import linear

FAMILIES = ["llama", "gemma3", "qwen2moe"]
MANY = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=3)
SEEDED = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=3, temperature=1.5, seed=11)


def assert_same(found: list[Completion], wanted: list[Completion]) -> None:
    """The same ids, and the same bits of all log probabilities."""
    for one, other in zip(found, wanted, strict=True):
        assert one.ids == other.ids
        assert one.logprobs == other.logprobs


def one_by_one(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[Completion]:
    return [llm.generate(prompt, params) for prompt in prompts]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_prompt_do_not_depend_on_how_it_is_cut(family: str) -> None:
    [prompt] = random_prompts(1, 1, seed=3)
    prompt = [*prompt, *np.random.default_rng(0).integers(0, 250, 75).tolist()]
    found = [
        tiny_llm(family, max_step_tokens=most, max_sequences=1, deterministic=True).logits(prompt)
        for most in (512, 1, 7, 32, 33)
    ]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)
    default = tiny_llm(family).logits(prompt)
    np.testing.assert_allclose(found[0], default, rtol=1e-4, atol=1e-4 * np.abs(default).max())


@pytest.mark.parametrize("params", [MANY, pytest.param(SEEDED, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=() if family == "llama" else pytest.mark.slow) for family in FAMILIES]
)
def test_a_request_gives_the_same_alone_in_a_batch_in_chunks_and_preempted(family: str, params: SamplingParams) -> None:
    prompts = random_prompts(9, 40, seed=5)
    wanted = one_by_one(tiny_llm(family, deterministic=True), prompts, params)
    assert_same(tiny_llm(family, deterministic=True).generate(prompts, params), wanted)
    crowded = tiny_llm(family, num_pages=14, max_step_tokens=16, deterministic=True)
    preempted = count_preemptions(crowded)
    assert_same(crowded.generate(prompts, params), wanted)
    assert preempted


@pytest.mark.parametrize("caches", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoded_token_has_the_bits_of_a_prompts(family: str, caches: bool) -> None:
    """Computed anew, or behind pages that an earlier answer left, where their kinds of state can be shared."""
    llm = tiny_llm(family, deterministic=True, prefix_caching=caches)
    prompt = list(range(20, 40))
    whole = llm.generate(prompt, MANY)
    assert whole.logprobs
    for count in (1, 4, 11):
        again = llm.generate([*prompt, *whole.ids[:count]], MANY, max_tokens=1)
        assert again.logprobs == whole.logprobs[count : count + 1]
    hits = llm.engine.stats().prefix_hit_tokens
    assert hits > 0 if caches else hits == 0


def test_pages_may_lie_anywhere() -> None:
    llm = tiny_llm("gemma3", deterministic=True)
    prompts = random_prompts(3, 60, seed=8)
    wanted = one_by_one(llm, prompts, MANY)
    held = llm.stream(random_prompts(1, 30, seed=9)[0], MANY)  # its pages part those of the others
    next(held)
    assert_same(llm.generate(prompts, MANY), wanted)
    held.close()


SHAPES = [
    (64, 192),
    (576, 960),
    (37, 101),
    (130, 7),
    (2048, 257),
    (64, 9000),
    (3, 1),
    pytest.param(70000, 33, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("is_tiled", [True, False])
@pytest.mark.parametrize(("inner", "outer"), SHAPES)
def test_a_row_of_a_product_has_the_same_bits_among_any_number(
    inner: int, outer: int, is_tiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each place of a tile, on 1, 2 and 4 threads; in tiles, and row by row as where BLAS has no kernel for them."""
    monkeypatch.setattr(Threads, "has_small_matrix_kernels", is_tiled)
    rng = np.random.default_rng(0)
    weight, x = (rng.standard_normal((count, inner), np.float32) for count in (outer, 39))
    with threadpool_limits(1, user_api="blas"):
        rows = np.concatenate([product(row[None], weight) for row in x])
    exact = x.astype(float) @ weight.T.astype(float)
    np.testing.assert_allclose(rows, exact, rtol=1e-4, atol=1e-5 * inner)
    for threads in (1, 2, 4):
        with threadpool_limits(threads, user_api="blas"):
            for start, count in [(0, 39), (1, 1), (2, 2), (3, 7), (4, 33), (5, 34)]:
                found = product(x[start : start + count], weight)
                np.testing.assert_array_equal(found, rows[start : start + count])


def test_rows_are_multiplied_one_by_one_where_their_place_in_a_tile_decides_their_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    multiply, tiles = fixed._multiply, []

    def unequal(matrix: np.ndarray, rows: np.ndarray, y: np.ndarray, step: int) -> None:
        multiply(matrix, rows, y, step)
        y[:, 2:] = np.nextafter(y[:, 2:], np.float32(np.inf))  # none in a tile of one row
        tiles.append(rows.shape)

    monkeypatch.setattr(Threads, "has_small_matrix_kernels", True)
    monkeypatch.setattr(fixed, "_multiply", unequal)
    monkeypatch.setattr(fixed, "places_agree", fixed.places_agree.__wrapped__)
    rng = np.random.default_rng(0)
    weight, x = (rng.standard_normal((count, 40), np.float32) for count in (24, 6))
    found = product(x, weight)
    assert tiles[-1] == (6, 1, 40)
    for row, wanted in zip(x, found, strict=True):
        np.testing.assert_array_equal(product(row[None], weight)[0], wanted)


def test_a_product_of_what_is_not_finite_gives_no_warning_on_any_thread() -> None:
    weight, x = np.ones((2000, 576), np.float32), np.ones((5, 576), np.float32)
    weight[:, 0], x[1, 0], x[3] = np.inf, 0.0, -3e38
    with threadpool_limits(2, user_api="blas"), np.errstate(all="raise"):
        found = product(x, weight)
    assert np.isposinf(found[[0, 2, 4]]).all()
    assert np.isnan(found[1]).all()
    assert np.isneginf(found[3]).all()


def product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    y: np.ndarray = linear(x, weight, None, None, glu="none", split_k="fixed")
    return y


@pytest.mark.parametrize("window", [0, 5])
def test_a_query_has_the_same_bits_on_any_pages_and_beside_any_other(window: int) -> None:
    """Pages that neighbour each other are read together; a query alone is computed in another shape than several."""
    rng = np.random.default_rng(1)
    page_size, pages, length, heads, kv_heads, dim = 4, 12, 43, 6, 2, 16
    keys, values = (rng.standard_normal((pages, page_size, kv_heads, dim), np.float32) for _ in range(2))
    q = rng.standard_normal((length, heads, dim), np.float32)
    spec = AttentionSpec(dim**-0.5, window, 0.0, is_deterministic=True)

    def attended(order: np.ndarray, start: int, stop: int) -> np.ndarray:
        k, v = np.full_like(keys, np.nan), np.full_like(values, np.nan)
        k[order], v[order] = keys, values
        if window:
            released = order[: max(start + 1 - window, 0) // page_size]
            k[released] = v[released] = np.nan
        starts, lengths = np.array([0, stop - start], np.int32), np.array([stop], np.int32)
        found: np.ndarray = paged_attention(
            q[start:stop], KVPages(k, v), starts, lengths, order[None].astype(np.int32), spec
        )
        return found

    whole = attended(np.arange(pages), 0, length)
    plain = paged_attention.reference(
        q.astype(float),
        KVPages(keys.astype(float), values.astype(float)),
        np.array([0, length]),
        np.array([length]),
        np.arange(pages)[None],
        spec,
    )
    np.testing.assert_allclose(whole, plain, rtol=1e-4, atol=1e-5)
    for order in (np.arange(pages), rng.permutation(pages), np.arange(pages)[::-1]):
        for start, stop in [(0, 1), (0, 43), (17, 30), (42, 43), (9, 10), (30, 43)]:
            np.testing.assert_array_equal(attended(order, start, stop), whole[start:stop])
