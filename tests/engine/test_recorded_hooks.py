"""Decode steps whose hooks are data are captured and queued ahead, and do what the same hooks do in steps that wait."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tiny_models import GREEDY, SEEDED, assert_idle, count_preemptions, random_prompts, tiny_llm

from forge import LLM, SamplingParams
from forge.backend.numpy import NumpyBackend
from forge.engine.hooked import Where
from forge.engine.hooked_pipelines import HookedPipelines
from forge.engine.pipeline import StepPipeline
from forge.engine.sequence import Sequence
from forge.errors import OutOfMemoryError


class Read:
    """Keeps values by point and position."""

    request = 0

    def __init__(self, *names: str, first: int = 0, last: int = 1000, is_data: bool = True) -> None:
        """first, last: Positions that it wants."""
        self.names, self.first, self.last = frozenset(names), first, last
        self.recorded: Any = "read" if is_data else None
        self.found: dict[tuple[str, int], npt.NDArray[np.float32]] = {}
        self.ended = 0

    def selects(self, positions: Any, num_prompt: int) -> Any:
        return (positions >= self.first) & (positions <= self.last)

    def at(self, value: Any, where: Where) -> Any:
        for row, position in zip(np.array(value), where.positions, strict=True):
            self.found[where.name, int(position)] = row
        return None

    def finished(self, is_whole: bool) -> None: ...

    def end(self) -> None:
        self.ended += 1


class Add(Read):
    """Adds a vector."""

    def __init__(self, vector: npt.NDArray[np.float32], *names: str, **how: Any) -> None:
        super().__init__(*names, **how)
        self.vector = vector
        self.recorded = vector if self.recorded else None

    def at(self, value: Any, where: Where) -> Any:
        return value + self.vector


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines made from here on run ahead, as on a GPU."""
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", True)


def run(llm: LLM, requests: list[tuple[list[int], tuple[Any, ...]]], params: SamplingParams = GREEDY) -> list[Sequence]:
    """Sequences of requests, each a prompt and its hooks, run to their ends."""
    found = [llm.engine.add(ids, params, hooks=[hooks] if hooks else None)[0] for ids, hooks in requests]
    while llm.engine.has_work:
        llm.engine.step()
    assert_idle(llm)
    return found


def forwards(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Of each forward that waits for its ids, the tokens of each sequence."""
    forward, seen = llm.engine.runner.forward, []

    def forwarding(step: Any, **how: Any) -> Any:
        seen.append([entry.count for entry in step])
        return forward(step, **how)

    monkeypatch.setattr(llm.engine.runner, "forward", forwarding)
    return seen


POINTS = "blk.0.resid_mid", "blk.1.resid_post"


def vector(seed: int, llm: LLM) -> npt.NDArray[np.float32]:
    return 0.5 * np.random.default_rng(seed).standard_normal(llm.config.width).astype(np.float32)


def hooks_of(llm: LLM, number: int, *, is_data: bool) -> tuple[Any, ...]:
    """Hooks of the requests of a batch: reads, a vector of its own between two reads of the same point, none, both."""
    first, last = (Read(*POINTS, is_data=is_data) for _ in range(2))
    steer = Add(vector(number, llm), POINTS[1], is_data=is_data)
    return [(first,), (first, steer, last), (), (steer,), (first,), (first, steer, last)][number]


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("params", [GREEDY, pytest.param(SEEDED, marks=pytest.mark.slow)])
@pytest.mark.parametrize("pages", [200, 12])
def test_recorded_steps_do_what_steps_that_wait_do(
    pages: int, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = random_prompts(6, 20, seed=1)
    llm = tiny_llm("llama", num_pages=pages)
    preemptions = count_preemptions(llm)
    eager = [(ids, hooks_of(llm, number, is_data=False)) for number, ids in enumerate(prompts)]
    expected = [sequence.ids for sequence in run(llm, eager, params)]
    plain = [sequence.ids for sequence in run(llm, [(ids, ()) for ids in prompts], params)]
    seen = forwards(llm, monkeypatch)
    given = [(ids, hooks_of(llm, number, is_data=True)) for number, ids in enumerate(prompts)]
    found = run(llm, given, params)
    assert [sequence.ids for sequence in found] == expected
    assert expected != plain
    assert [plain[n] for n in (0, 2, 4)] == [expected[n] for n in (0, 2, 4)]  # reading changes nothing
    for sequence, (_, hooks), (_, others) in zip(found, given, eager, strict=True):
        for hook, other in zip(hooks, others, strict=True):
            assert hook.found.keys() == other.found.keys()
            if not isinstance(hook, Add):
                assert {position for _, position in hook.found} == set(range(len(sequence.ids) - 1))
            for key, value in hook.found.items():
                np.testing.assert_allclose(value, other.found[key], rtol=2e-5, atol=2e-5, err_msg=str(key))
    if pages == 200:
        assert all(max(counts) > 1 for counts in seen)  # prompts alone wait
    else:
        assert preemptions


@pytest.mark.usefixtures("ahead")
def test_who_is_read_behind_the_prompt_no_more_runs_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm("llama")
    plain = run(llm, [([1, 2, 3], ())])[0].ids
    launched: list[Any] = []
    launch = StepPipeline.launch
    monkeypatch.setattr(
        StepPipeline, "launch", lambda self, step, forks: launched.append(self) or launch(self, step, forks)
    )
    seen, hook = forwards(llm, monkeypatch), Read("blk.0.attn.q", last=2)
    assert run(llm, [([1, 2, 3], (hook,))])[0].ids == plain
    assert seen == [[3]]
    assert set(launched) == {llm.engine.runner.pipeline}
    assert len(hook.found) == 3


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize(
    "hook",
    [Read("blk.0.attn.q"), Read(POINTS[0], last=5), Read(POINTS[0], is_data=False)],
    ids=["another point", "some positions", "code"],
)
def test_what_is_not_data_alone_waits(hook: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm("llama")
    seen = forwards(llm, monkeypatch)
    run(llm, [([1, 2, 3], (hook,))])
    assert seen == [[3]] + [[1]] * 19


@pytest.mark.usefixtures("ahead")
def test_a_hook_that_raises_ends_its_own_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, prompts = tiny_llm("llama"), random_prompts(2, 20)
    alone = [sequence.ids for sequence in run(llm, [(ids, ()) for ids in prompts])]

    class Raising(Read):
        def at(self, value: Any, where: Where) -> None:
            if where.step >= 4:
                raise ValueError("mine")

    first, second = run(llm, [(prompts[0], (Raising(POINTS[0]),)), (prompts[1], (Read(POINTS[0]),))])
    assert str(first.error) == "mine"
    assert first.finish_reason == "error"
    assert first.ids == alone[0][: len(first.ids)]
    assert second.ids == alone[1]


@pytest.mark.usefixtures("ahead")
def test_without_memory_for_their_steps_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm("llama")
    plain = run(llm, [([1, 2, 3], ())])[0].ids

    def make(edits: Any) -> StepPipeline:
        raise OutOfMemoryError("none is left")

    llm.engine.runner.hooked = HookedPipelines(make)
    seen = forwards(llm, monkeypatch)
    assert run(llm, [([1, 2, 3], (Read(*POINTS),))])[0].ids == plain
    assert seen == [[3]] + [[1]] * 19


@pytest.mark.usefixtures("ahead")
def test_more_than_there_are_rows_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, prompts = tiny_llm("llama"), random_prompts(5, 10)
    plain = [sequence.ids for sequence in run(llm, [(ids, ()) for ids in prompts])]
    monkeypatch.setattr("forge.engine.recorded_hooks._RING_BYTES", 2 * 4 * 4 * llm.config.width * 2)
    hooks = [Read(*POINTS) for _ in prompts]
    found = run(llm, [(ids, (hook,)) for ids, hook in zip(prompts, hooks, strict=True)])
    assert [sequence.ids for sequence in found] == plain
    assert all(len(hook.found) == 2 * (len(one.ids) - 1) for hook, one in zip(hooks, found, strict=True))
    hooked = llm.engine.runner.hooked
    assert hooked
    assert [pipeline.max_sequences for pipeline in hooked._pipelines.values()] == [2]


@pytest.mark.usefixtures("ahead")
def test_few_pipelines_are_kept() -> None:
    llm = tiny_llm("llama")
    for layer in range(2):
        for name in ("resid_pre", "resid_mid", "resid_post"):
            run(llm, [([1, 2, 3], (Read(f"blk.{layer}.{name}"),))])
    hooked = llm.engine.runner.hooked
    assert hooked
    assert len(hooked._pipelines) == 4
