"""Layers with a window hold the pages that it reaches. Requests give the same as where they hold all positions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tiny_models import CONTEXT, GREEDY, SEEDED, assert_idle, count_preemptions, random_prompts, tiny_llm

from forge import LLM, OutOfMemoryError, SamplingParams
from forge.backend.numpy import NumpyBackend
from forge.engine.page_pool import PagePool

NAMES = ["gemma3", pytest.param("gemma2", marks=pytest.mark.slow), "phi3_window"]
"""Windows of 16, 32, 16: most, half, all of the layers."""
PAGE = 4


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[False, True], ids=["", "as on a GPU"], autouse=True)
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether steps are queued before the ids of earlier ones are known."""
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", request.param)
    return bool(request.param)


def llm_of(name: str, monkeypatch: pytest.MonkeyPatch, **sizes: Any) -> LLM:
    """Released pages of any kind that cannot be found hold NaN at once: what reads them is found out."""
    llm = tiny_llm(name, page_size=PAGE, max_step_tokens=sizes.pop("max_step_tokens", 12), **sizes)
    caches = dict(zip(llm.engine.pools, llm.engine.runner.state.caches, strict=True))
    release = PagePool.release

    def poisoning(pool: PagePool, pages: Iterable[int]) -> None:
        pages = list(pages)
        release(pool, pages)
        for array in caches[pool].arrays if pool in caches else ():
            array[:, [page for page in pages if not pool.references(page) and not pool.is_findable(page)]] = np.nan

    monkeypatch.setattr(PagePool, "release", poisoning)
    return llm


_known: dict[str, list[list[int]]] = {}


def expected_ids(name: str, prompts: list[list[int]], params: SamplingParams, window: int = 0) -> list[list[int]]:
    """Where layers hold all positions: computed once for steps that wait and for those that are queued ahead."""
    key = repr((name, prompts, params, window))
    if key not in _known:
        _known[key] = ids(tiny_llm(name, windows=False), prompts, params)
    return _known[key]


def ids(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    found = llm.generate(prompts, params)
    assert isinstance(found, list)
    return [completion.ids for completion in found]


def most_held(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """The most pages of each kind that a sequence has held at one time."""
    most = [0] * len(llm.engine.pools)
    extend = PagePool.extend

    def watched(pool: PagePool, pages: list[int], count: int) -> None:
        extend(pool, pages, count)
        number = llm.engine.pools.index(pool)
        most[number] = max(most[number], len(pool.held(pages)))

    monkeypatch.setattr(PagePool, "extend", watched)
    return lambda: most


@pytest.mark.parametrize(
    "params", [pytest.param(GREEDY, id="greedy", marks=pytest.mark.slow), pytest.param(SEEDED, id="seeded")]
)
@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_prompts_longer_than_the_window_in_chunks(
    name: str, params: SamplingParams, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [*random_prompts(3, 70, seed=1), random_prompts(1, 1, seed=2)[0] * 70]
    params = replace(params, n=n, max_tokens=26)
    expected = expected_ids(name, prompts, params)
    llm = llm_of(name, monkeypatch)
    held = most_held(llm, monkeypatch)
    assert ids(llm, prompts, params) == expected
    for kind, count in zip(llm.engine.runner.kinds, held(), strict=True):
        assert count <= kind.num_pages(CONTEXT)
        assert count == CONTEXT // PAGE or kind.name.startswith("window")
    assert_idle(llm)


@pytest.mark.parametrize(
    ("name", "n", "longest", "count"),
    [
        pytest.param(
            *(name, *sizes),
            id="-".join(map(str, (name, *sizes))),
            marks=() if (name, sizes) == ("phi3_window", (3, 60, 3)) else pytest.mark.slow,
        )
        for name in ("gemma3", "gemma2", "phi3_window")
        for sizes in ((1, 6, 5), (3, 60, 3), (3, 60, 5))
    ],
)
def test_scarce_pages_of_windows(name: str, n: int, longest: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are pages of windows for little more than one sequence, and more than enough of other layers."""
    prompts = random_prompts(count, longest, seed=3)
    params = replace(SEEDED, n=n, max_tokens=36)
    expected = expected_ids(name, prompts, params)
    kinds = llm_of(name, monkeypatch).engine.runner.kinds
    counts = tuple(
        kind.num_pages(CONTEXT) + 3 if kind.name.startswith("window") else 16 * CONTEXT // PAGE for kind in kinds
    )
    scarce = llm_of(name, monkeypatch, num_pages=counts)
    preemptions = count_preemptions(scarce)
    assert ids(scarce, prompts, params) == expected
    assert len(preemptions) >= 2
    assert_idle(scarce)


@pytest.mark.parametrize(
    "window", [pytest.param(w, marks=() if w == 5 else pytest.mark.slow) for w in (1, 2, 3, 4, 5, 17)]
)
@pytest.mark.parametrize("max_step_tokens", [1, 5])
def test_windows_of_any_length(window: int, max_step_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that end in the middle of a page, or on its border."""
    read_config = tiny_llm.__globals__["models"].read_config

    def changed(*arguments: Any) -> Any:
        config = read_config(*arguments)
        windows = tuple(window if own else 0 for own in config.layer_windows)
        return replace(config, layer_windows=windows)

    monkeypatch.setattr(tiny_llm.__globals__["models"], "read_config", changed)
    prompts = random_prompts(2, 40, seed=4)
    expected = expected_ids("gemma3", prompts, SEEDED, window)
    sizes = {"max_step_tokens": max_step_tokens, "max_sequences": max_step_tokens}
    llm = llm_of("gemma3", monkeypatch, **sizes)
    assert [kind.name for kind in llm.engine.runner.kinds] == ["all positions", f"window of {window}"]
    assert ids(llm, prompts, SEEDED) == expected
    assert_idle(llm)


def test_passes_over_all_positions_beside_requests(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = random_prompts(1, 1, seed=5)[0] * 90
    prompts = random_prompts(2, 40, seed=6)
    plain = tiny_llm(name, windows=False)
    expected, logits, weights = ids(plain, prompts, SEEDED), plain.logits(text), plain.attention(text)
    kinds = llm_of(name, monkeypatch).engine.runner.kinds
    llm = llm_of(name, monkeypatch, num_pages=tuple(kind.num_pages(CONTEXT) for kind in kinds))
    streams = [llm.stream(prompt, SEEDED) for prompt in prompts]
    found: list[list[int]] = [[], []]
    for number in range(16):
        found[number % 2] += next(streams[number % 2]).ids
        if number % 5 == 0:
            np.testing.assert_allclose(llm.logits(text), logits, rtol=0, atol=1e-4)
            np.testing.assert_allclose(llm.attention(text), weights, rtol=0, atol=1e-5)
    for rest, stream in zip(found, streams, strict=True):
        rest += [token for chunk in stream for token in chunk.ids]
    assert found == expected
    assert_idle(llm)


def test_a_pass_gets_the_pages_of_its_windows_back_that_requests_took_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = random_prompts(1, 1, seed=7)[0] * 90
    expected = tiny_llm("phi3_window", windows=False).logits(text)
    kind = llm_of("phi3_window", monkeypatch).engine.runner.kinds[0]
    llm = llm_of("phi3_window", monkeypatch, num_pages=2 * kind.num_pages(CONTEXT))
    rows = []
    requests = [llm.engine.add([1 + number] * 20, GREEDY)[0] for number in range(4)]
    for part in llm.engine.logits(text):
        rows.append(np.array(part))
        llm.engine.step()
    np.testing.assert_allclose(np.concatenate(rows), expected, rtol=0, atol=1e-4)
    while llm.engine.has_work:
        llm.engine.step()
    assert {sequence.finish_reason for sequence in requests} == {"length"}
    assert_idle(llm)


def test_a_second_pass_that_needs_the_pages_of_one_that_is_not_read_to_its_end_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind = llm_of("phi3_window", monkeypatch).engine.runner.kinds[0]
    llm = llm_of("phi3_window", monkeypatch, num_pages=2 * kind.num_pages(CONTEXT) - 1)
    rows = llm.engine.logits([1] * 90)
    next(rows)
    with pytest.raises(OutOfMemoryError, match="read or close them first"):
        next(llm.engine.logits([1] * 90))
    rows.close()
    assert_idle(llm)
