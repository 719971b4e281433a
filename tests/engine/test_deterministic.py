"""EngineConfig.deterministic on NumPy: what a request gives has the same bits whatever runs beside it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from threadpoolctl import threadpool_limits
from tiny_models import count_preemptions, random_prompts, tiny_llm

from forge import LLM, Completion, SamplingParams
from forge.ops.attention import AttentionSpec, paged_attention
from forge.ops.kv_cache import KVPages
from forge.ops.linear import linear

FAMILIES = ["llama", "gemma3", "qwen3"]
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


@pytest.mark.parametrize("params", [MANY, SEEDED])
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


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with threadpool_limits(request.param, user_api="blas"):
        yield request.param


@pytest.mark.parametrize(("inner", "outer"), [(64, 192), (576, 960), (37, 101), (130, 7), (2048, 257), (64, 9000)])
def test_a_row_of_a_product_has_the_same_bits_among_any_number(inner: int, outer: int, threads: int) -> None:
    rng = np.random.default_rng(0)
    weight, x = (rng.standard_normal((count, inner), np.float32) for count in (outer, 70))
    with threadpool_limits(3 - threads, user_api="blas"):
        rows = [product(x[i : i + 1], weight)[0] for i in range(70)]
    for count in (1, 2, 3, 6, 7, 33, 70):
        for start in (0, 70 - count):
            np.testing.assert_array_equal(product(x[start : start + count], weight), rows[start : start + count])


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
