"""Logits that are NaN end their request, wherever they come up, and nobody else notices."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from tiny_models import GREEDY, SEEDED, assert_idle, random_prompts, tiny_llm

from forge import LLM, SamplingParams
from forge.backend.numpy import NumpyBackend
from forge.engine import Sampled, Sequence

POISON = 300
"""A token that nobody else draws or has in a prompt. Each position from it on has NaN keys, values and logits."""
WHERE = {
    "in a short prompt": ([4, POISON, 5], {}, 0),
    "in the first chunk of a long prompt": ([POISON, *range(40)], {}, 0),
    "in the last chunk of a long prompt": ([*range(40), POISON], {}, 0),
    "behind the first id": ([4, 5], {POISON: 1e6}, 1),
}


def finish(llm: LLM, sequences: list[Sequence]) -> dict[Sequence, list[Sampled]]:
    """What these sequences sample, to the end of all."""
    found: dict[Sequence, list[Sampled]] = {sequence: [] for sequence in sequences}
    while llm.engine.has_work:
        for token in llm.engine.step():
            if token.sequence in found:
                found[token.sequence].append(token)
    assert_idle(llm)
    return found


def neighbours() -> list[tuple[list[int], SamplingParams]]:
    kinds = [GREEDY, replace(SEEDED, logprobs=2), replace(SEEDED, n=2), replace(GREEDY, repetition_penalty=1.4)]
    own = [replace(kind, logit_bias={POISON: -math.inf}) for kind in kinds]
    return list(zip(random_prompts(4, 20, vocabulary=200), own, strict=True))


@pytest.fixture(scope="module")
def expected() -> list[list[list[Sampled]]]:
    """What each choice of each neighbour samples in an engine of its own."""
    found = []
    for prompt, params in neighbours():
        llm = tiny_llm("llama")
        found.append(list(finish(llm, llm.engine.add(prompt, params)).values()))
    return found


def assert_same(found: dict[Sequence, list[Sampled]], expected: list[list[Sampled]]) -> None:
    for sampled, wanted in zip(found.values(), expected, strict=True):
        assert [token.id for token in sampled] == [token.id for token in wanted]
        for one, other in zip(sampled, wanted, strict=True):
            assert (one.logprobs is None) == (other.logprobs is None)
            if one.logprobs and other.logprobs:
                assert one.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=1e-4)
                assert [token for token, _ in one.logprobs.top] == [token for token, _ in other.logprobs.top]


@pytest.mark.parametrize(
    ("n", "runs_ahead"),
    [
        pytest.param(3, True, id="3-runs ahead"),
        pytest.param(1, False, id="1-waits for ids", marks=pytest.mark.slow),
        pytest.param(1, True, id="1-runs ahead", marks=pytest.mark.slow),
        pytest.param(3, False, id="3-waits for ids", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("prompt", "bias", "length"),
    [pytest.param(*row, id=name, marks=[pytest.mark.slow] * ("first" in name)) for name, row in WHERE.items()],
)
def test_a_request_with_nan_logits_ends_and_its_neighbours_go_on(
    prompt: list[int],
    bias: dict[int, float],
    length: int,
    n: int,
    runs_ahead: bool,
    expected: list[list[list[Sampled]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside greedy, seeded and penalized ones, with and without log probabilities. Others get its pages then."""
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", runs_ahead)
    llm = tiny_llm("llama", num_pages=32, max_prefill_tokens=7)
    llm.engine.runner.model.token_embd[POISON] = np.nan
    groups = [llm.engine.add(*request) for request in neighbours()]
    for _ in range(3):
        llm.engine.step()
    bad = llm.engine.add(prompt, replace(SEEDED, n=n, logprobs=1, logit_bias=bias))
    groups += [llm.engine.add(*request) for request in neighbours()]
    found = finish(llm, bad)
    assert [one.finish_reason for one in bad] == ["error"] * n
    assert [one.completion for one in bad] == [[POISON] * length] * n
    assert [[token.id for token in found[one]] for one in bad] == [[POISON] * length + [-1]] * n
    for group, wanted in zip(groups, [*expected, *expected], strict=True):
        assert [one.completion for one in group] == [[token.id for token in sampled] for sampled in wanted]
    for request, wanted in zip(neighbours(), expected, strict=True):
        assert_same(finish(llm, llm.engine.add(*request)), wanted)
