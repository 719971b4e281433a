"""Who arrives first starts first, nobody waits for ever, and nothing is lost or doubled where pages are scarce."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import GREEDY, SEEDED, assert_idle, random_prompts, tiny_llm

from forge import LLM, SamplingParams
from forge.backend.numpy import NumpyBackend
from forge.engine import Sequence
from forge.engine.page_pool import PagePool
from forge.engine.scheduler import Scheduler
from forge.state.paged_kv import PagedKV

PAGE = 4
ROOT = Path(__file__).parents[2]


class Queue:
    """A scheduler whose sequences get an id in each step that reaches their end, and when each started first."""

    def __init__(self, num_pages: int, **sizes: int) -> None:
        settings = {"max_sequences": 8, "max_step_tokens": 64, **sizes}
        self.scheduler = Scheduler([PagePool(PagedKV((0,), PAGE, 1, 1, 4), num_pages)], **settings)
        self.started: dict[Sequence, int] = {}
        self.steps = 0

    def add(self, length: int, completion: int) -> Sequence:
        sequence = Sequence(0, [0] * length, length, SamplingParams(), 0, length + completion)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> None:
        step = self.scheduler.schedule()
        assert step, "nothing would ever change"
        self.steps += 1
        ending = [entry.sequence for entry in step if entry.samples]
        self.scheduler.commit(step)
        for entry in step:
            self.started.setdefault(entry.sequence, self.steps)
        for sequence in ending:
            sequence.ids.append(0)
            if len(sequence.ids) == sequence.max_length:
                self.scheduler.finish(sequence, "length")


def test_a_large_prompt_is_not_overtaken_by_small_ones_that_never_end_arriving() -> None:
    queue = Queue(num_pages=20)
    for _ in range(4):
        queue.add(4, 12)
    queue.step()
    large = queue.add(70, 5)  # 18 pages of 20
    behind = [queue.add(3, 4) for _ in range(3)]
    while large not in queue.started:
        assert queue.steps < 15, "it starts when those before it have ended"
        queue.step()
        behind.append(queue.add(3, 4))
    assert not queue.started.keys() & set(behind)
    queue.step()
    assert behind[0] in queue.started  # and those behind it, as soon as there is room beside it
    while queue.scheduler.has_work:
        queue.step()
    assert {sequence.finish_reason for sequence in behind} == {"length"}


@pytest.mark.parametrize("seed", range(6))
def test_sequences_start_in_their_order_and_all_end(seed: int) -> None:
    """Also where they lose their pages again and again."""
    rng = random.Random(seed)
    queue = Queue(num_pages=25, max_prefill_tokens=rng.choice([1, 5, 64]))
    added: list[Sequence] = []
    while len(added) < 120 or queue.scheduler.has_work:
        if len(added) < 120 and rng.random() < 0.6:
            added.append(queue.add(rng.choice([1, 3, 20, 60]), rng.randint(1, 40)))
        if queue.scheduler.has_work:
            queue.step()
    starts = [queue.started[sequence] for sequence in added]
    assert starts == sorted(starts)
    assert {sequence.finish_reason for sequence in added} == {"length"}
    assert [len(sequence.ids) for sequence in added] == [sequence.max_length for sequence in added]
    assert queue.scheduler.num_preemptions >= 5


def test_a_choice_without_room_goes_before_requests_that_arrived_later() -> None:
    llm = tiny_llm("llama", max_sequences=1)
    choices = llm.engine.add([1, 2, 3], replace(SEEDED, n=3))
    (later,) = llm.engine.add([4, 5], SEEDED)
    llm.engine.step()
    first, second, last = llm.engine.scheduler.waiting
    assert {first, second} == set(choices[1:])
    assert last is later
    while not later.completion:
        llm.engine.step()
    assert {choice.finish_reason for choice in choices} == {"length"}
    llm.engine.finish(later, "abort")
    assert_idle(llm)


# Aborts


def submit(llm: LLM, prompt: list[int], params: SamplingParams) -> tuple[Any, Any]:
    waiter = llm._loop.waiter()
    request = llm._request([prompt], params, waiter, is_streamed=True)
    llm._loop.work.add(request)
    return request, waiter


@pytest.mark.parametrize("runs_ahead", [False, True], ids=["waits for ids", "runs ahead"])
@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_pages_are_back_at_once_whenever_a_request_is_aborted(
    n: int, runs_ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the queue, within its prompt, before and behind the fork of its choices, and while ids come."""
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", runs_ahead)
    prompts = [*random_prompts(2, 20, seed=3), list(range(40))]
    params = [replace(SEEDED, max_tokens=6), replace(GREEDY, max_tokens=9), replace(SEEDED, max_tokens=5, n=n)]
    llm = tiny_llm("llama", max_sequences=4, max_step_tokens=12, prefix_caching=False)  # as many steps each time
    expected = [tiny_llm("llama").generate(*request).ids for request in zip(prompts[:2], params, strict=False)]
    work, [pool] = llm._loop.work, llm.engine.pools
    seen, is_over, steps = set(), False, 0
    while not is_over:
        prompts[2][0] = steps  # the prefix cache does not find it
        held = [submit(llm, *request) for request in zip(prompts, params, strict=True)]
        bad = held[2][0]
        for _ in range(steps):
            work.run()
        is_over = bad.is_finished
        computed = [choice.sequence.num_computed for choice in bad.choices]
        seen.add("queue" if not any(computed) else "prompt" if max(computed) < 40 else "ids")
        work.cancel(bad)
        others = [choice.sequence for request, _ in held[:2] for choice in request.choices]
        owned = {page for sequence in others for pages in sequence.pages for page in pages}
        assert pool.num_pages - pool.num_free == len(owned)
        assert [choice.sequence.pages for choice in bad.choices] == [[]] * n
        while work:
            work.run()
        assert [sequence.completion for sequence in others] == expected
        assert pool.num_free == pool.num_pages
        steps += 1
    assert_idle(llm)
    assert seen == {"queue", "prompt", "ids"}
    assert steps > 8


# Many requests


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deterministic", "runs_ahead"), [(False, True), (True, False)], ids=["default, runs ahead", "deterministic, waits"]
)
def test_a_thousand_requests_with_a_quarter_of_the_pages_they_need_lose_and_double_nothing(
    deterministic: bool, runs_ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of mixed lengths, half behind shared heads, half streamed, some aborted, by greedy and seeded sampling.

    Each of the others gives what it gives alone, with its own ids, once. What differs in the default mode would be
    rounding, which this model's probabilities are far enough apart for.
    """
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import preemption

    monkeypatch.setattr(NumpyBackend, "is_asynchronous", runs_ahead)
    kinds = preemption.make_kinds(random.Random(2), 60, head=20, prompt=30, new=24)
    alone = preemption.one_by_one(tiny_llm("llama", prefix_caching=False, deterministic=deterministic), kinds)
    assert [len(one.ids) for one in alone] == [kind.params.max_tokens for kind in kinds]
    llm = tiny_llm("llama", num_pages=250, max_prefill_tokens=32, deterministic=deterministic)
    with preemption.scarce_pages(llm, kinds):
        found = asyncio.run(preemption.run_together(llm, kinds, alone, 1000))
    stats = llm.engine.stats()
    assert_idle(llm)
    assert (found.lost, found.doubled, found.different) == (0, 0, 0)
    assert 900 <= found.ended <= 970
    assert found.preemptions >= 100
    assert stats.prefix_hit_tokens > 1000
    assert found.tokens < stats.generated_tokens < found.tokens + 24 * (1000 - found.ended)  # those of the aborted
