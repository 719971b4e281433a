"""Hooks of `LLM.score`: the prompt is the caller's, and a continuation is what is generated behind it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_models import assert_idle, tiny_llm

from forge import LLM, Where

POINT = "blk.1.resid_post"
PROMPTS = [[3, 17, 5, 9], [200, 41, 8, 7, 6, 30]]
ENDS = [[[1, 2, 3], [4, 5]], [[6, 7, 8, 9], [10]]]
"""Continuations of each."""


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny_llm("llama")


def expected(llm: LLM, prompt: list[int], ids: list[int], position: int, row: Any) -> float:
    """From the logits of a pass over all ids, one position of which is patched by its number."""
    whole = [*prompt, *ids]
    with llm.patch(POINT, row, positions=position):
        logits = llm.logits(whole[:-1]).astype(np.float64)[len(prompt) - 1 :]
    logits -= logits.max(axis=1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return float(logprobs[np.arange(len(ids)), ids].sum())


@pytest.mark.parametrize("position", [-1, -2, 0])
def test_positions_count_from_the_prompts_end_and_not_the_continuations(llm: LLM, position: int) -> None:
    row = np.linspace(-2, 2, 64)
    with llm.patch(POINT, row, positions=position):
        found = llm.score(PROMPTS, ENDS)
    for prompt, ends, scores in zip(PROMPTS, ENDS, found, strict=True):
        for ids, score in zip(ends, scores, strict=True):
            assert score.logprob == pytest.approx(expected(llm, prompt, ids, position % len(prompt), row), abs=1e-4)
    assert_idle(llm)


def test_a_request_is_a_prompt_with_all_of_its_continuations(llm: LLM) -> None:
    plain, row = llm.score(PROMPTS, ENDS), np.linspace(-2, 2, 64)
    with llm.patch(POINT, row, positions=-1, request=1):
        found = llm.score(PROMPTS, ENDS)
    for ids, score, other in zip(ENDS[0], found[0], plain[0], strict=True):
        assert score.logprob == pytest.approx(other.logprob, abs=1e-5), ids
    for ids, score in zip(ENDS[1], found[1], strict=True):
        assert score.logprob == pytest.approx(expected(llm, PROMPTS[1], ids, 5, row), abs=1e-4)


def test_continuations_are_generated_and_a_cache_has_one_request_of_each(llm: LLM) -> None:
    seen: list[Where] = []
    with (
        llm.capture(POINT, steps="generated") as cache,
        llm.capture(POINT, steps="prompt") as prompts,
        llm.patch(POINT, lambda _, where: seen.append(where)),
    ):
        llm.score(PROMPTS, ENDS)
    pairs = [(prompt, ids) for prompt, ends in zip(PROMPTS, ENDS, strict=True) for ids in ends]
    assert [request.prompt_ids for request in cache] == [prompt for prompt, _ in pairs]
    for request, before, (prompt, ids) in zip(cache, prompts, pairs, strict=True):
        with llm.capture(POINT) as whole:
            llm.logits([*prompt, *ids[:-1]])
        split = len(prompt)
        np.testing.assert_allclose(before[POINT], whole[POINT][:split], rtol=1e-4, atol=1e-5)
        if len(ids) > 1:  # of one token nothing behind the prompt is computed
            np.testing.assert_allclose(request[POINT], whole[POINT][split:], rtol=1e-4, atol=1e-5)
    assert [(where.request, where.num_prompt) for where in seen] == [(0, 4), (0, 4), (1, 6), (1, 6)]


def test_a_perplexitys_text_is_a_prompt(llm: LLM) -> None:
    with llm.capture(POINT, positions=-1) as cache:
        llm.perplexity(PROMPTS[1])
    assert cache.positions(POINT).tolist() == [len(PROMPTS[1]) - 2]  # the last id is only predicted
