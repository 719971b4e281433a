"""Sequences with hooks run in a forward of their own. Those beside them keep their steps, their ids and their pages."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import GREEDY, SEEDED, assert_idle, count_preemptions, random_prompts, tiny_llm

from forge import LLM
from forge.backend.numpy import NumpyBackend
from forge.engine.hooked import Watch
from forge.engine.pipeline import StepPipeline
from forge.engine.scheduler import Scheduled
from forge.engine.sequence import Sequence

IDLE = Watch(frozenset())
HOOKED, PLAIN = [(IDLE,)], None


@pytest.fixture(params=[False, True], ids=["waits", "ahead"])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether engines run ahead, as on a GPU."""
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", request.param)
    return bool(request.param)


def watch_steps(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[Sequence]], list[list[Sequence]]]:
    """The sequences of each forward that waits for its ids, and of each that is queued."""
    waited: list[list[Sequence]] = []
    queued: list[list[Sequence]] = []
    forward, launch = llm.engine.runner.forward, StepPipeline.launch

    def forwarding(step: list[Scheduled], **how: Any) -> Any:
        waited.append([entry.sequence for entry in step])
        return forward(step, **how)

    def launching(self: StepPipeline, step: list[Scheduled], forks: Any) -> bool:
        queued.append([entry.sequence for entry in step])
        return launch(self, step, forks)

    monkeypatch.setattr(llm.engine.runner, "forward", forwarding)
    monkeypatch.setattr(StepPipeline, "launch", launching)
    return waited, queued


def run(llm: LLM, requests: list[tuple[list[int], Any]], params: Any = GREEDY) -> list[Sequence]:
    """Sequences of requests, each a prompt and its hooks, run to their ends."""
    found = [llm.engine.add(ids, params, hooks=hooks)[0] for ids, hooks in requests]
    while llm.engine.has_work:
        llm.engine.step()
    assert_idle(llm)
    return found


@pytest.mark.parametrize("params", [GREEDY, pytest.param(SEEDED, marks=pytest.mark.slow)])
def test_ids_do_not_depend_on_who_is_separate(ahead: bool, params: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = random_prompts(6, 30)
    llm = tiny_llm("llama")
    plain = [sequence.ids for sequence in run(llm, [(ids, PLAIN) for ids in prompts], params)]
    waited, queued = watch_steps(llm, monkeypatch)
    mixed = run(llm, [(ids, HOOKED if index % 2 else PLAIN) for index, ids in enumerate(prompts)], params)
    assert [sequence.ids for sequence in mixed] == plain
    separate = [step for step in waited if step[0].hooks]
    assert all(sequence.hooks for step in separate for sequence in step)
    assert not any(sequence.hooks for step in queued for sequence in step)
    assert max(map(len, separate)) == 3  # all of them in one forward
    assert len(separate) == 20
    assert ahead == bool(queued)


def test_scarce_pages_and_short_steps_change_nothing(ahead: bool) -> None:
    prompts = random_prompts(6, 40, seed=2)
    roomy = [sequence.ids for sequence in run(tiny_llm("llama"), [(ids, PLAIN) for ids in prompts])]
    scarce = tiny_llm("llama", num_pages=12, max_step_tokens=16)
    preemptions = count_preemptions(scarce)
    mixed = run(scarce, [(ids, HOOKED if index % 2 else PLAIN) for index, ids in enumerate(prompts)])
    assert [sequence.ids for sequence in mixed] == roomy
    assert preemptions


def test_every_choice_with_hooks_computes_its_prompt(ahead: bool) -> None:
    llm = tiny_llm("llama")
    params = SEEDED.__class__(max_tokens=5, ignore_eos=True, temperature=1.5, seed=4, n=2)
    plain = llm.engine.add([1, 2, 3], params)
    hooked = llm.engine.add([1, 2, 3], params, hooks=[(IDLE,), (IDLE,)])
    while llm.engine.has_work:
        llm.engine.step()
    assert [one.ids for one in hooked] == [one.ids for one in plain]
    assert [one.num_computed for one in hooked] == [0, 0]
    assert_idle(llm)


def test_the_prefix_cache_neither_gives_to_them_nor_takes_from_them() -> None:
    llm, ids = tiny_llm("llama"), list(range(30))
    assert llm.engine.prefix_cache
    assert run(llm, [(ids, HOOKED)])[0].num_cached == 0
    assert run(llm, [(ids, PLAIN)])[0].num_cached == 0
    assert run(llm, [(ids, HOOKED)])[0].num_cached == 0
    assert run(llm, [(ids, PLAIN)])[0].num_cached == 24


def test_an_error_of_user_code_ends_its_own_sequence_alone(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = random_prompts(4, 20, seed=5)
    llm = tiny_llm("llama")
    alone = [sequence.ids for sequence in run(llm, [(ids, PLAIN) for ids in prompts])]
    forward, error, steps = llm.engine.runner.forward, ValueError("mine"), []

    def forwarding(step: list[Scheduled], **how: Any) -> Any:
        steps.append(step)
        if step[0].sequence.hooks and len(step[0].sequence.completion) == 3:
            step[0].sequence.error = error
        return forward(step, **how)

    monkeypatch.setattr(llm.engine.runner, "forward", forwarding)
    first, *others = run(llm, [(prompts[0], HOOKED), (prompts[1], HOOKED), (prompts[2], PLAIN), (prompts[3], PLAIN)])
    assert first.error is error
    assert first.finish_reason == "error"
    assert first.ids == alone[0][: len(prompts[0]) + 3]
    assert [sequence.ids for sequence in others] == alone[1:]


def test_a_separate_forward_that_fails_ends_its_sequences_alone(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = random_prompts(3, 20, seed=6)
    llm = tiny_llm("llama")
    alone = [sequence.ids for sequence in run(llm, [(ids, PLAIN) for ids in prompts])]
    forward = llm.engine.runner.forward

    def forwarding(step: list[Scheduled], **how: Any) -> Any:
        if step[0].sequence.hooks:
            raise RuntimeError("the device has failed")
        return forward(step, **how)

    monkeypatch.setattr(llm.engine.runner, "forward", forwarding)
    first, *others = run(llm, [(prompts[0], HOOKED), (prompts[1], PLAIN), (prompts[2], PLAIN)])
    assert str(first.error) == "the device has failed"
    assert [sequence.ids for sequence in others] == alone[1:]


def test_the_time_of_queued_steps_is_not_told_where_a_separate_one_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", True)
    llm, told = tiny_llm("llama"), []
    pipeline = llm.engine.runner.pipeline
    assert pipeline

    class Budget:
        clock = staticmethod(lambda: 0.0)

        def measured(self, decoding: int, prompt_tokens: int, queued_at: float) -> None:
            told.append((decoding, prompt_tokens))

    pipeline.budget = Budget()  # type: ignore[assignment]
    run(llm, [([1, 2, 3], PLAIN)])
    assert len(told) == 20
    run(llm, [([4, 5, 6], PLAIN), ([1, 2, 3], HOOKED)])
    assert len(told) == 21  # the first one was queued before any separate step
