"""Classifier-free guidance and contrastive decoding, against logits that are computed apart, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tiny_models import assert_idle, random_prompts, tiny_llm

from forge import LLM, ContextLengthError, OutOfMemoryError, ParameterError, SamplingParams
from forge.backend.numpy import NumpyBackend
from forge.contrib.guidance import ClassifierFreeGuidance, ContrastiveDecoding

GREEDY = SamplingParams(max_tokens=4, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=5, ignore_eos=True, temperature=1.2, seed=4, n=2)
NEGATIVE = [3, 1, 4, 1, 5]


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["waits", "ahead"])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether engines run ahead, as on a GPU."""
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", request.param)
    return bool(request.param)


@pytest.fixture
def llm(ahead: bool) -> Iterator[LLM]:
    with tiny_llm("llama") as found:
        yield found


@pytest.fixture
def amateur(ahead: bool) -> Iterator[LLM]:
    with tiny_llm("phi3") as found:
        yield found


def log_softmax(row: Any) -> Any:
    z = row.astype(np.float64)
    return z - z.max() - np.log(np.exp(z - z.max()).sum())


class Seen:
    """A processor that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, ...], Any] = {}

    def __call__(self, ids: list[int], logits: Any) -> None:
        self.rows[tuple(ids)] = logits.copy()


def guided(llm: LLM, prompt: list[int], negative: list[int], completion: list[int], scale: float) -> Any:
    own = log_softmax(llm.logits([*prompt, *completion])[-1])
    other = log_softmax(llm.logits([*negative, *completion])[-1])
    return other + scale * (own - other)


def contrasted(llm: LLM, amateur: LLM, ids: list[int], alpha: float, temperature: float) -> Any:
    own = log_softmax(llm.logits(ids)[-1])
    scores = own - log_softmax(amateur.logits(ids)[-1].astype(np.float64) / temperature)
    return np.where(np.exp(own) >= alpha * np.exp(own).max(), scores, -np.inf)


@pytest.mark.parametrize("params", [GREEDY, pytest.param(DRAWN, marks=pytest.mark.slow)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("negative", [NEGATIVE, None])
def test_guidance_is_that_of_both_prompts(llm: LLM, negative: list[int] | None, params: SamplingParams) -> None:
    prompts, seen = random_prompts(2, 12, seed=8), Seen()
    processors = [ClassifierFreeGuidance(llm, negative, scale=2.5), seen]
    found = llm.generate(prompts, params, logits_processors=processors)
    assert_idle(llm)
    for one in found:
        for count, token in enumerate(one.ids):
            row = seen.rows[*one.prompt_ids, *one.ids[:count]]
            other = one.prompt_ids[-1:] if negative is None else negative
            expected = guided(llm, one.prompt_ids, other, one.ids[:count], 2.5)
            np.testing.assert_allclose(row, expected, rtol=0, atol=1e-4)
            if params is GREEDY:
                assert token == row.argmax()
    assert [c.ids for c in found] != [c.ids for c in llm.generate(prompts, params)]


@pytest.mark.parametrize("params", [GREEDY, pytest.param(DRAWN, marks=pytest.mark.slow)], ids=["greedy", "drawn"])
def test_contrastive_decoding_is_that_of_both_models(llm: LLM, amateur: LLM, params: SamplingParams) -> None:
    prompts, seen = random_prompts(2, 12, seed=9), Seen()
    processors = [ContrastiveDecoding(amateur, alpha=0.2, temperature=0.5), seen]
    found = llm.generate(prompts, params, logits_processors=processors)
    assert_idle(llm)
    amateur.logits([1])  # what was given back has been seen
    assert_idle(amateur)
    for one in found:
        for count, token in enumerate(one.ids):
            ids = [*one.prompt_ids, *one.ids[:count]]
            row, expected = seen.rows[tuple(ids)], contrasted(llm, amateur, ids, 0.2, 0.5)
            assert np.array_equal(np.isfinite(row), np.isfinite(expected))
            np.testing.assert_allclose(row, expected, rtol=0, atol=2e-4)
            assert np.isfinite(row[token])
    assert [c.ids for c in found] != [c.ids for c in llm.generate(prompts, params)]


def test_scale_one_is_the_prompts_own(llm: LLM) -> None:
    plain = llm.generate([7, 8, 9], GREEDY, n=2, temperature=1, seed=2)
    same = llm.generate(
        [7, 8, 9], GREEDY, n=2, temperature=1, seed=2, logits_processors=[ClassifierFreeGuidance(llm, "no", scale=1)]
    )
    assert [c.ids for c in same] == [c.ids for c in plain]


@pytest.mark.slow
def test_preemption_and_streams_change_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = random_prompts(4, 30, seed=2)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    guidance = ClassifierFreeGuidance(llm, NEGATIVE)
    undisturbed = llm.generate(prompts, params, logits_processors=[guidance])
    scheduler, steps = llm.engine.scheduler, list[int]()
    schedule = scheduler.schedule

    def scheduling(**how: Any) -> Any:
        steps.append(len(scheduler.running))
        if len(steps) % 3 == 0 and scheduler.running:
            scheduler.preempt()
        return schedule(**how)

    monkeypatch.setattr(scheduler, "schedule", scheduling)
    before = scheduler.num_preemptions
    found = llm.generate(prompts, params, logits_processors=[guidance])
    assert [c.ids for c in found] == [c.ids for c in undisturbed]
    assert scheduler.num_preemptions >= before + 4
    chunks = list(llm.stream(prompts[0], params, logits_processors=[guidance]))
    assert [token for chunk in chunks for token in chunk.ids] == undisturbed[0].ids
    assert_idle(llm)


def test_without_pages_for_the_second_sequence_its_request_alone_ends() -> None:
    llm = tiny_llm("llama", num_pages=16)
    stream = llm.stream(list(range(40)), max_tokens=20, ignore_eos=True)
    first = next(stream)
    with pytest.raises(OutOfMemoryError, match="needs pages of the KV cache that others hold"):
        llm.generate([1] * 40, GREEDY, logits_processors=[ClassifierFreeGuidance(llm, [2] * 60)])
    rest = [token for chunk in stream for token in chunk.ids]
    assert [*first.ids, *rest] == llm.generate(list(range(40)), max_tokens=20, ignore_eos=True).ids
    assert_idle(llm)


def test_the_second_sequence_may_be_too_long(llm: LLM) -> None:
    guidance = ClassifierFreeGuidance(llm, [5] * 94)
    with pytest.raises(ContextLengthError, match=r"97 tokens do not fit the context of 96"):
        llm.generate([1, 2], GREEDY, logits_processors=[guidance])
    assert_idle(llm)
    with pytest.raises(ContextLengthError):
        ClassifierFreeGuidance(llm, [5] * 97)


def test_bad_settings_are_named(llm: LLM, amateur: LLM) -> None:
    with pytest.raises(ParameterError, match=r"^scale must"):
        ClassifierFreeGuidance(llm, scale=float("nan"))
    with pytest.raises(ParameterError, match=r"^alpha must"):
        ContrastiveDecoding(amateur, alpha=0)
    with pytest.raises(ParameterError, match=r"^temperature must"):
        ContrastiveDecoding(amateur, temperature=0)
