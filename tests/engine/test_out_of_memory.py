"""Whichever allocation of a step fails, one request is refused or waits, and all others give what they give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tiny_models import GREEDY, SEEDED, assert_idle, random_prompts, tiny_llm

from forge import LLM, OutOfMemoryError
from forge.backend.numpy import NumpyBackend
from forge.engine import Sequence

PROMPTS = random_prompts(5, 30, seed=8)
PARAMS = [
    replace(SEEDED, max_tokens=4),
    replace(GREEDY, max_tokens=3, logprobs=1),
    replace(SEEDED, max_tokens=3, n=3),
    replace(GREEDY, max_tokens=5, repetition_penalty=1.3),
    replace(SEEDED, max_tokens=2),
]


def run(llm: LLM) -> tuple[list[list[Sequence]], list[BaseException]]:
    """The sequences of five requests, two of which come later, when nothing runs any more, and errors of steps."""
    engine, errors, pairs = llm.engine, [], list(zip(PROMPTS, PARAMS, strict=True))
    groups = [engine.add(*pair) for pair in pairs[:3]]
    while engine.has_work or len(groups) < len(pairs):
        if len(groups) < len(pairs) and any(sequence.completion for sequence in groups[-2]):
            groups.append(engine.add(*pairs[len(groups)]))
        try:
            engine.step()
        except (MemoryError, OutOfMemoryError) as error:
            errors.append(error)
        if not engine.has_work and len(groups) < len(pairs):
            groups.append(engine.add(*pairs[len(groups)]))
    assert_idle(llm)
    return groups, errors


@pytest.mark.parametrize("every", [23, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "any"])
@pytest.mark.parametrize("runs_ahead", [False, True], ids=["waits for ids", "runs ahead"])
def test_the_kth_allocation_that_fails_costs_one_request(
    runs_ahead: bool, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", runs_ahead)
    expected = [[one.completion for one in group] for group in run(tiny_llm("llama"))[0]]
    llm = tiny_llm("llama", max_sequences=4, max_prefill_tokens=9)
    count = fails_at = 0

    def failing(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == fails_at:
                raise OutOfMemoryError(f"allocation {count}")
            return call(*arguments, **options)

        return counted

    for name in ("asarray", "empty", "launch"):  # an op allocates its results
        monkeypatch.setattr(NumpyBackend, name, failing(getattr(NumpyBackend, name)))
    num_refused = num_preempted = last = preemptions = 0
    while True:
        fails_at, count = fails_at + every, 0
        groups, errors = run(llm)
        if count < fails_at:
            break
        last = count
        refused = [number for number, group in enumerate(groups) if "error" in [one.finish_reason for one in group]]
        if errors:
            assert [str(error) for error in errors] == [f"allocation {fails_at}"]
        else:  # of a choice's own page: it waits
            assert llm.engine.stats().preemptions > preemptions
        assert len(refused) == len(errors)
        preemptions = llm.engine.stats().preemptions
        num_refused += len(errors)
        num_preempted += not errors
        for number, group in enumerate(groups):
            if number in refused:
                assert {one.finish_reason for one in group} <= {"error", "length"}
            else:
                assert [one.completion for one in group] == expected[number]
                assert {one.finish_reason for one in group} == {"length"}
    assert num_refused + num_preempted == last // every >= 9
    assert num_preempted <= 2
    assert [[one.completion for one in group] for group in groups] == expected


def test_memory_that_runs_out_again_and_again_ends_one_request_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until those that are left fit."""
    prompts = random_prompts(6, 30, seed=9)
    llm = tiny_llm("llama")
    expected = [one.ids for one in llm.generate(prompts, SEEDED)]
    forward = llm.engine.runner.forward

    def fails_for_many(step: Any) -> Any:
        if len(step) > 2:
            raise MemoryError("too many")
        return forward(step)

    monkeypatch.setattr(llm.engine.runner, "forward", fails_for_many)
    sequences = [llm.engine.add(prompt, SEEDED)[0] for prompt in prompts]
    num_errors = 0
    while llm.engine.has_work:
        try:
            llm.engine.step()
        except MemoryError:
            num_errors += 1
    assert num_errors == 4
    assert [one.finish_reason for one in sequences] == ["length"] * 2 + ["error"] * 4
    assert [one.completion for one in sequences[:2]] == expected[:2]
    assert_idle(llm)


def test_a_choice_for_whose_page_no_memory_is_left_waits_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, params = list(range(20)), replace(SEEDED, n=3)
    llm = tiny_llm("llama")
    expected = [one.ids for one in llm.generate(prompt, params)]
    copy_page, calls = llm.engine.runner.copy_page, 0

    def fails_once(*arguments: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise MemoryError("no copy")
        copy_page(*arguments)

    monkeypatch.setattr(llm.engine.runner, "copy_page", fails_once)
    sequences = llm.engine.add(prompt, params)
    llm.engine.step()
    assert [one in llm.engine.scheduler.waiting for one in sequences] == [False, True, False]
    while llm.engine.has_work:
        llm.engine.step()
    assert [one.completion for one in sequences] == expected
    assert_idle(llm)
