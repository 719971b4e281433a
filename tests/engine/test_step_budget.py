"""Prompts get what time between tokens allows, by the times of earlier steps: with a clock that the test turns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tiny_models import GREEDY, assert_idle, tiny_llm

from forge.backend.numpy import NumpyBackend
from forge.engine import step_budget
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
    assert budget_after(decode_s, token_s).tokens(60, 1, 0) == tokens


@pytest.mark.parametrize(
    ("num_settled", "num_crowd", "tokens"),
    [
        (60, 1, 1536),  # 42 ms are 1,680
        (60, 60, 1536),
        (60, 120, 3584),  # 92 ms: 3,680
        (60, 240, 7168),  # 192 ms: 7,680
        (60, 600, 8192),
        (0, 1, 8192),  # nobody decoded before
    ],
)
def test_a_step_may_take_as_long_as_the_crowd_outnumbers_those_that_decoded_before_it(
    num_settled: int, num_crowd: int, tokens: int
) -> None:
    assert budget_after(0.008, 25e-6).tokens(num_settled, num_crowd, 0) == tokens


def test_all_tokens_of_a_step_are_a_number_of_three_binary_digits() -> None:
    """So are the shapes of steps, although the sequences that decode in them change."""
    budget = budget_after(0.008, 25e-6)
    assert {decoding + budget.tokens(decoding, 1, decoding) for decoding in range(60, 110)} == {1536}
    assert budget.tokens(200, 1, 200) + 200 == 1792
    assert budget_after(0.4, 2e-3).tokens(250, 1, 250) == 198


def test_nothing_is_known_before_a_prompt_was_timed() -> None:
    budget = StepBudget(500, clock=Clock())
    assert budget.tokens(3, 1, 3) == 500
    budget.measured(3, 0, 99.0)
    assert budget.tokens(3, 1, 3) == 500


def test_a_clock_that_stands_still_says_nothing() -> None:
    budget = StepBudget(500, clock=Clock())
    for _ in range(5):
        budget.measured(0, 100, 100.0)
    assert budget.tokens(3, 1, 3) == 500


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
    assert budget.tokens(8, 1, 0) == 1024  # 1,050


def test_a_cold_first_step_is_forgotten_within_a_few() -> None:
    """Kernels are loaded in it: 2 s for 16 tokens."""
    clock = Clock()
    budget = StepBudget(8192, clock=clock)
    counts = []
    for seconds, tokens in ((2.0, 16), *[(0.005, 64)] * 3, *[(0.008, 300)] * 12):
        queued_at, clock.now = clock.now, clock.now + seconds
        budget.measured(0, tokens, queued_at)
        counts.append(budget.tokens(8, 1, 0))
    assert counts[0] == 64
    assert counts[-1] >= 1024  # 27 us for each: 1,800 in the end


class Device:
    """An engine whose steps take 8 ms and 1 ms more for each prompt token, by a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
        monkeypatch.setattr(NumpyBackend, "is_asynchronous", True)
        monkeypatch.setattr("forge.engine.step_budget._MIN_TOKENS", 4)
        self.llm = tiny_llm("llama", **sizes)
        self.engine, self.clock = self.llm.engine, Clock()
        pipeline = self.engine.runner.pipeline
        assert pipeline
        self.engine.scheduler.budget = pipeline.budget = StepBudget(512, clock=self.clock)
        real = pipeline.collect
        self.steps: list[tuple[int, int]] = []
        """Sequences that decode and prompt tokens of each step."""

        def collect() -> Any:
            queued = pipeline._queue[0]
            self.clock.now += 0.008 + 0.001 * queued.num_prompt_tokens
            self.steps.append((queued.num_decoding, queued.num_prompt_tokens))
            return real()

        pipeline.collect = collect  # type: ignore[method-assign]

    def add(self, count: int, length: int, tokens: int = 20) -> None:
        for number in range(count):
            self.engine.add([1 + number] * length, replace(GREEDY, max_tokens=tokens))

    def run(self, most: int = 1000) -> list[tuple[int, int]]:
        """The steps that end, at most so many."""
        self.steps.clear()
        while self.engine.has_work and len(self.steps) < most:
            self.engine.step()
        return self.steps.copy()


def test_a_long_prompt_beside_a_stream_keeps_its_steps_near_the_wanted_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps get 40 tokens."""
    device = Device(monkeypatch, context=700)
    device.add(1, 50, tokens=60)
    device.run(10)
    device.add(1, 400)
    steps = [step for step in device.run() if all(step)]
    assert {decoding + tokens for decoding, tokens in steps[:-1]} <= {32, 40}  # 50 tokens alone take 58 ms, 1.16 each
    assert steps.count((1, 39)) > 4
    assert max(0.008 + 0.001 * tokens for _, tokens in steps) <= 0.05
    assert_idle(device.llm)


def test_requests_that_come_at_once_are_read_in_the_largest_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that decode by now are of the same crowd. One that comes later finds them all settled."""
    device = Device(monkeypatch, max_sequences=32, num_pages=700, max_step_tokens=128, context=300)
    device.add(32, 48, tokens=60)
    prompts = [step for step in device.run(40) if step[1]]
    assert [sum(step) for step in prompts[:-1]] == [128] * (len(prompts) - 1)
    assert prompts[-2][0] > 16
    device.engine.finish(device.engine.scheduler.running[0], "abort")
    device.add(1, 200)
    steps = [step for step in device.run() if all(step)]
    assert max(tokens for _, tokens in steps) <= 42
    assert len(steps) >= 5
    assert_idle(device.llm)


def test_a_crowd_of_twice_those_that_decode_gets_steps_of_twice_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, max_sequences=32, num_pages=700, max_step_tokens=512, context=300)
    device.add(8, 20, tokens=100)
    device.run(20)
    device.add(16, 60)
    steps = [step for step in device.run() if all(step)]
    assert {sum(step) for step in steps[1:-1]} == {96, 112}  # 92 tokens, and 8 to 24
    assert_idle(device.llm)


@pytest.mark.parametrize("prompt", [3, 40], ids=["a step that decodes", "a step with a prompt"])
def test_a_step_whose_sequences_have_ended_is_not_timed(prompt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read when the next request comes, however long that takes: here 10 minutes."""
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", True)
    llm = tiny_llm("llama", max_step_tokens=16)
    clock, engine = Clock(), llm.engine
    pipeline = engine.runner.pipeline
    assert pipeline
    budget = pipeline.budget = StepBudget(16, clock=clock)
    (sequence,) = engine.add([1] * prompt, GREEDY)
    for _ in range(1 if prompt == 40 else 3):
        engine.step()
    engine.finish(sequence, "abort")
    assert pipeline.num_queued == 1
    clock.now += 600
    engine.add([1, 2], GREEDY)
    while engine.has_work:
        engine.step()
    assert not budget._decode_s
    assert not budget._token_s
    assert_idle(llm)


@pytest.mark.parametrize(
    ("token_s", "tokens"), [(10e-6, 8192), (25e-6, 8192), (100e-6, 4096), (300e-6, 1536), (1e-3, 512), (0.01, 512)]
)
def test_no_step_takes_much_longer_than_half_a_second(token_s: float, tokens: int) -> None:
    """Nobody need decode in it: an abort and a new request wait for it too."""
    budget = budget_after(0.001, token_s)
    assert budget.longest == tokens
    assert budget.tokens(0, 30, 3) == tokens
    assert budget.tokens(1, 100_000, 3) <= tokens


@pytest.mark.parametrize("decoding", [0, 2])
def test_prompts_that_keep_coming_never_get_longer_steps(decoding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a busy server: some are always read, and whoever decoded before the first of them has ended."""
    monkeypatch.setattr(step_budget, "LONGEST_S", 0.1)
    monkeypatch.setattr(step_budget, "_MIN_LONGEST", 16)
    device = Device(monkeypatch, num_pages=900, max_step_tokens=512, context=450)
    device.add(decoding, 20, tokens=6)
    device.run(3)
    device.add(1, 20, tokens=100)
    steps = device.run(1)
    for number in range(4):
        device.engine.add([10 + number] * 400, replace(GREEDY, max_tokens=2))
        steps += device.run(4)
    steps += device.run()
    device.engine.add([20] * 400, GREEDY)  # alone
    steps += device.run()
    assert sum(tokens for _, tokens in steps) >= 2000
    assert max(tokens for _, tokens in steps) <= 100
    assert_idle(device.llm)
