"""Prefill attention on the matrix cores of each family, which the harness plays, against float64 and against itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from harness import COMPILER, TILE_FAMILIES, Harness

from forge.devtools.cases.attention import attention_case
from forge.devtools.verify import run_case
from forge.errors import UnsupportedError
from forge.ops.attention import AttentionSpec, paged_attention
from forge.ops.kv_cache import KVPages
from forge.ops.op import Array
from forge.tuning import Choices

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no clang++: scripts/install-toolchain installs it")

SHAPES: dict[str, tuple[Any, ...]] = {
    "heads of 64": ([35, 1, 70, 0, 0], [90, 7, 70, 1, 1], (4, 2), 64, 16, 40),  # two sequences without tokens
    "heads of 80": ([40, 1], [41, 90], (2, 1), 80, 16),
    "heads of 100": ([20, 2], [40, 3], (2, 2), 100, 16, 0, 2.0),
    "heads of 128": ([33], [80], (4, 1), 128, 16),
    "heads of 192": ([33, 1], [40, 70], (2, 1), 192, 16, 25),
    "heads of 256": ([40], [70], (2, 1), 256, 8),
    "heads of 512": ([20, 1], [50, 35], (2, 1), 512, 16, 30, 3.0),
}
CHOICES = {
    "large tiles": {"QUERIES": 32, "KEYS": 64, "WAVES": 4, "MIN_BLOCKS": 1},
    "small tiles": {"QUERIES": 16, "KEYS": 16, "WAVES": 8, "MIN_BLOCKS": 1},
}


def device_of(family: str, seed: int = 1, choice: str = "", dim: int = 0) -> Harness:
    device = Harness(seed=seed, tile=family.partition(",")[0], **TILE_FAMILIES[family])
    if choice:
        device.tuning = Choices("", {("attention_prefill", (dim,)): CHOICES[choice]})
    return device


ONE_EACH = [
    pytest.param(family, shape, marks=[] if shape == "heads of 64" and "," not in family else pytest.mark.slow)
    for shape in SHAPES
    for family in TILE_FAMILIES
]


@pytest.mark.parametrize(("family", "shape"), ONE_EACH)
def test_each_family_computes_attention(family: str, shape: str) -> None:
    device = device_of(family)
    error, _ = run_case(paged_attention, attention_case(shape, *SHAPES[shape]), device)
    assert error.passed, error
    assert {variant.file for variant in device.variants} == {"attention_prefill"}


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(("shape", "dim"), [("heads of 64", 64), ("heads of 128", 128), ("heads of 192", 192)])
@pytest.mark.parametrize("family", TILE_FAMILIES)
def test_each_family_computes_tiles_of_other_sizes(family: str, shape: str, dim: int, choice: str) -> None:
    for seed in (0, 1, 2):
        case = attention_case(shape, *SHAPES[shape])
        error, _ = run_case(paged_attention, case, device_of(family, seed, choice, dim))
        assert error.passed, error


class Prompt:
    """A sequence of a model's layer in float16, in pages of its own."""

    def __init__(self, length: int, seed: int = 0, dim: int = 64, heads: int = 2) -> None:
        rng = np.random.default_rng(seed)
        self.length, self.rng = length, rng
        self.q = rng.standard_normal((length, heads, dim)).astype(np.float16)
        self.pages = -(-length // 16)
        self.k, self.v = rng.standard_normal((2, self.pages, 16, 1, dim)).astype(np.float16)

    def float64(self, spec: AttentionSpec) -> Array:
        table, starts = np.arange(self.pages, dtype=np.int32)[None], np.array([0, self.length], np.int32)
        kv = KVPages(self.k.astype(np.float64), self.v.astype(np.float64))
        lengths = starts[1:]
        return np.asarray(paged_attention.reference(self.q.astype(np.float64), kv, starts, lengths, table, spec))


def attended(device: Harness, prompts: list[tuple[Prompt, int]], spec: AttentionSpec, order: int = 0) -> list[Array]:
    """Of each prompt the tokens from a number on, in one launch. order: a seed for the order of all pages."""
    pages = sum(prompt.pages for prompt, _ in prompts)
    places = np.random.default_rng(order).permutation(pages) if order else np.arange(pages)
    table = np.full((len(prompts), max(prompt.pages for prompt, _ in prompts)), -1, np.int32)
    k, v = (np.empty((pages, *prompts[0][0].k.shape[1:]), np.float16) for _ in "kv")
    first = 0
    for row, (prompt, _) in enumerate(prompts):
        own = places[first : first + prompt.pages]
        table[row, : prompt.pages], k[own], v[own] = own, prompt.k, prompt.v
        first += prompt.pages
    counts = [prompt.length - begin for prompt, begin in prompts]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    lengths = np.array([prompt.length for prompt, _ in prompts], np.int32)
    q = np.concatenate([prompt.q[begin:] for prompt, begin in prompts])
    kv = KVPages(device.asarray(k), device.asarray(v))
    out = np.asarray(
        paged_attention(*map(device.asarray, (q,)), kv, *map(device.asarray, (starts, lengths, table)), spec)
    )
    return np.split(out, starts[1:-1])


SPEC = AttentionSpec(0.125, 0, 0.0)


@pytest.mark.parametrize("family", ["TILE_MMA", "TILE_MFMA"])
@pytest.mark.parametrize("spec", [SPEC, replace(SPEC, window=50)], ids=["causal", "window"])
def test_a_querys_bits_depend_on_its_sequence_alone(spec: AttentionSpec, family: str) -> None:
    """Not on where a chunk of the prompt begins, on other sequences of the launch, nor on the order of pages."""
    prompt, other = Prompt(100), Prompt(37, 1)
    device = device_of(family)
    (whole,) = attended(device, [(prompt, 0)], spec)
    for begin in (5, 37, 99):
        (part,) = attended(device, [(prompt, begin)], spec)
        np.testing.assert_array_equal(part, whole[begin:], err_msg=f"a chunk from {begin} on")
    _, beside, _ = attended(device, [(other, 0), (prompt, 23), (other, 36)], spec, order=7)
    np.testing.assert_array_equal(beside, whole[23:])


@pytest.mark.parametrize("family", ["TILE_MMA", "TILE_MFMA"])
def test_more_sequences_than_lanes_find_their_queries(family: str) -> None:
    prompts = [Prompt(1 + row % 20, row) for row in range(70)]
    together = attended(
        device_of(family),
        [(prompt, prompt.length - 1 - row % 2 * (prompt.length > 1)) for row, prompt in enumerate(prompts)],
        SPEC,
    )
    for prompt, out in zip(prompts, together, strict=True):
        np.testing.assert_allclose(out, prompt.float64(SPEC)[-len(out) :], rtol=2e-3, atol=2e-3)


def in_float16(prompt: Prompt, spec: AttentionSpec) -> Array:
    """FlashAttention with float16 weights and results and exact sums: (T, H, D)."""
    q, k, v = (x.astype(np.float64) for x in (prompt.q, prompt.k, prompt.v))
    k, v = k.reshape(-1, k.shape[-1])[: prompt.length], v.reshape(-1, v.shape[-1])[: prompt.length]
    scores = np.einsum("thd,sd->hts", q, k) * spec.scale
    scores = np.where(np.tri(prompt.length, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    sums = weights.sum(axis=-1)
    return (np.einsum("hts,sd->thd", weights.astype(np.float16).astype(np.float64), v) / sums.T[..., None]).astype(
        np.float16
    )


@pytest.mark.parametrize("family", ["TILE_MMA", "TILE_WMMA_11"])
@pytest.mark.parametrize("scale", [0.125, 1.0])
def test_the_error_is_within_twice_that_of_float16_weights(scale: float, family: str) -> None:
    """At scale 1 a few weights are near 1."""
    prompt, spec = Prompt(150, 3), replace(SPEC, scale=scale)
    exact = prompt.float64(spec)
    allowed, (out,) = in_float16(prompt, spec) - exact, attended(device_of(family), [(prompt, 0)], spec)
    error = out - exact
    assert np.abs(error).max() <= 2 * np.abs(allowed).max()
    assert np.sqrt((error**2).mean()) <= 1.1 * np.sqrt((allowed**2).mean())


def test_scores_that_rise_and_fall_by_much_stay_exact() -> None:
    """The maximum that weights are counted from moves by more than float16 has room for, or not at all."""
    prompt = Prompt(80, 5)
    prompt.k *= np.exp2(np.arange(80) % 40 / 8 - 1).astype(np.float16).reshape(5, 16, 1, 1)
    spec = replace(SPEC, scale=1.0)
    for family in ("TILE_MMA", "TILE_MFMA"):
        (out,) = attended(device_of(family), [(prompt, 0)], spec)
        np.testing.assert_allclose(out, prompt.float64(spec), rtol=2e-3, atol=2e-3)


def test_heads_above_the_most_have_no_kernel() -> None:
    device = device_of("TILE_MMA")
    with pytest.raises(UnsupportedError, match=r"^heads of 520 numbers have no kernel: 512 is the most$"):
        attended(device, [(Prompt(2, dim=520), 0)], SPEC)
    with pytest.raises(UnsupportedError, match=r"^heads of 512 numbers have no kernel: 256 is the most$"):
        attended(device, [(Prompt(2, dim=512), 0)], replace(SPEC, is_deterministic=True))
