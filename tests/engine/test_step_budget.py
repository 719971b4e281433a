"""Prompts get what time between tokens allows, by the times of earlier steps: with a clock that the test turns."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import GREEDY, assert_idle, tiny_llm

from forge.backend.numpy import NumpyBackend
from forge.config import SamplingParams
from forge.engine.step_budget import StepBudget


class Clock:
    """Seconds, as the test says."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def budget_after(decode_s: float, token_s: float, *, steps: int = 30, most: int = 8192) -> StepBudget:
    """The budget of a device whose steps take `decode_s`, and `token_s` more for each prompt token."""
    clock = Clock()
    budget = StepBudget(most, clock=clock)
    for _ in range(steps):
        for tokens in (0, 256):
            queued_at = clock.now
            clock.now += decode_s + tokens * token_s
            budget.measured(8, tokens, queued_at)
    return budget


@pytest.mark.parametrize(
    ("decode_s", "token_s", "tokens"),
    [
        (0.008, 10e-6, 4096),  # 42 ms for prompts are 4,200 tokens, of which three binary digits are kept
        (0.008, 25e-6, 1536),  # 1,680
        (0.002, 2e-6, 8192),  # no more than a step may have
        (0.03, 100e-6, 256),  # 30 ms: as long as decoding takes
        (0.4, 2e-3, 192),  # a CPU: 200
        (0.01, 0.1, 64),  # no fewer
    ],
)
def test_a_step_takes_as_many_prompt_tokens_as_the_time_between_tokens_allows(
    decode_s: float, token_s: float, tokens: int
) -> None:
    assert budget_after(decode_s, token_s).tokens == tokens


def test_nothing_is_known_before_a_prompt_was_timed() -> None:
    budget = StepBudget(500, clock=Clock())
    assert budget.tokens == 500
    budget.measured(3, 0, 99.0)
    assert budget.tokens == 500


def test_a_clock_that_stands_still_says_nothing() -> None:
    budget = StepBudget(500, clock=Clock())
    for _ in range(5):
        budget.measured(0, 100, 100.0)
    assert budget.tokens == 500


def test_a_step_that_was_queued_behind_another_runs_when_that_has_ended() -> None:
    """Two steps of 10 ms are queued at once: the second has not taken 20."""
    clock = Clock()
    budget = StepBudget(8192, target_s=1.0, clock=clock)
    for _ in range(2):
        clock.now += 0.01
        budget.measured(0, 100, 100.0)
    assert budget._token_s == pytest.approx(100e-6)


def test_a_device_that_changes_is_followed() -> None:
    budget = budget_after(0.008, 10e-6)
    for _ in range(30):
        budget.clock.now += 0.008 + 256 * 40e-6  # type: ignore[attr-defined]
        budget.measured(8, 256, 0.0)
    assert budget.tokens == 1024  # 1,050


def test_a_cold_first_step_is_forgotten_within_a_few() -> None:
    """Kernels are loaded in it: 2 s for 16 tokens."""
    clock = Clock()
    budget = StepBudget(8192, clock=clock)
    counts = []
    for seconds, tokens in ((2.0, 16), *[(0.005, 64)] * 3, *[(0.008, 300)] * 12):
        queued_at, clock.now = clock.now, clock.now + seconds
        budget.measured(0, tokens, queued_at)
        counts.append(budget.tokens)
    assert counts[0] == 64
    assert counts[-1] >= 1024  # 27 us for each: 1,800 in the end


def test_a_long_prompt_beside_a_stream_keeps_its_steps_near_the_wanted_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that takes 8 ms for a step and 1 ms for a prompt token: the steps' chunks become 40 tokens."""
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", True)
    monkeypatch.setattr("forge.engine.step_budget._MIN_TOKENS", 4)
    llm = tiny_llm("llama", context=700)
    clock, engine = Clock(), llm.engine
    pipeline = engine.runner.pipeline
    assert pipeline
    engine.budget = pipeline.budget = StepBudget(512, clock=clock)
    real, chunks, times = pipeline.collect, [], []

    def collect() -> Any:
        queued = pipeline._queue[0]
        seconds = 0.008 + 0.001 * queued.num_prompt_tokens
        clock.now += seconds
        if queued.num_decoding and queued.num_prompt_tokens:
            chunks.append(queued.num_prompt_tokens)
            times.append(seconds)
        return real()

    pipeline.collect = collect  # type: ignore[method-assign]
    engine.add([1] * 50, SamplingParams(max_tokens=60, ignore_eos=True))
    for _ in range(10):
        engine.step()
    engine.add([2] * 400, GREEDY)
    while engine.has_work:
        engine.step()
    assert set(chunks[:-1]) <= {32, 40}  # 50 tokens alone take 58 ms, 1.16 ms each
    assert chunks.count(40) > 4
    assert max(times) <= 0.05
    assert_idle(llm)
