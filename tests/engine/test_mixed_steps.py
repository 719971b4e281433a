"""Who streams gets a token in every step, whoever joins and leaves, and prompt tokens of a step are limited."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tiny_models import GREEDY, SEEDED, assert_idle, count_preemptions, random_prompts, tiny_llm

from forge import LLM
from forge.backend.numpy import NumpyBackend
from forge.config import SamplingParams
from forge.engine import Sequence
from forge.engine.page_pool import PagePool
from forge.engine.scheduler import Scheduled, Scheduler
from forge.state.paged_kv import PagedKV


def prompt_tokens(sequence: Sequence, start: int, count: int) -> int:
    """How many of a sequence's next tokens are its prompt's, or are computed again after it lost its pages."""
    return count if count > 1 or start < sequence.num_prompt else 0


@pytest.mark.parametrize("seed", range(5))
def test_every_decoding_sequence_gets_one_token_in_each_step_while_prompts_arrive(seed: int) -> None:
    rng = random.Random(seed)
    most = rng.randint(1, 20)
    scheduler = Scheduler([PagePool(PagedKV((0,), 4, 1, 1, 4), 1000)], 8, rng.randint(8, 64), most)
    mixed = 0
    for number in range(200):
        if rng.random() < 0.5 or number == 0:
            length = rng.choice([1, 2, 30, 150])
            scheduler.add(Sequence(0, [0] * length, length, SamplingParams(), 0, length + rng.randint(1, 40)))
        decoding = [s for s in scheduler.running if s.num_computed >= s.num_prompt]
        step = scheduler.schedule()
        counts = {entry.sequence: entry.count for entry in step}
        assert [counts.get(sequence) for sequence in decoding] == [1] * len(decoding)
        taken = sum(prompt_tokens(entry.sequence, entry.start, entry.count) for entry in step)
        assert taken <= (most if decoding else scheduler.max_step_tokens)
        mixed += bool(decoding and taken)
        ending = [entry.sequence for entry in step if entry.samples]
        scheduler.commit(step)
        for sequence in ending:
            sequence.ids.append(0)
            if len(sequence.ids) == sequence.max_length or rng.random() < 0.02:
                scheduler.finish(sequence, "length")
    assert mixed > 20


def test_a_prompt_alone_is_not_held_to_what_is_allowed_beside_others() -> None:
    scheduler = Scheduler([PagePool(PagedKV((0,), 4, 1, 1, 4), 100)], 8, 64, 5)
    scheduler.add(Sequence(0, [0] * 60, 60, SamplingParams(), 0, 61))
    assert [entry.count for entry in scheduler.schedule()] == [60]


def test_the_last_token_of_a_prompt_counts_as_a_prompt_token() -> None:
    """Else many prompts' last tokens would be more than a step may have."""
    scheduler = Scheduler([PagePool(PagedKV((0,), 4, 1, 1, 4), 100)], 8, 64, 5)
    decoding = Sequence(0, [0] * 3, 3, SamplingParams(), 0, 50)
    scheduler.add(decoding)
    scheduler.commit(scheduler.schedule())
    decoding.ids.append(0)
    first, second = (Sequence(0, [0] * 6, 6, SamplingParams(), 0, 50) for _ in range(2))
    scheduler.add(first)
    scheduler.add(second)
    for counts in ([(decoding, 1), (first, 5)], [(decoding, 1), (first, 1), (second, 4)], [(decoding, 1), (first, 1)]):
        step = scheduler.schedule()
        assert [(entry.sequence, entry.count) for entry in step][: len(counts)] == counts
        ending = [entry.sequence for entry in step if entry.samples]
        scheduler.commit(step)
        for sequence in ending:
            sequence.ids.append(0)


def watch_steps(llm: LLM) -> list[tuple[int, int]]:
    """The prompt tokens of each step, and how many sequences decode in it."""
    found: list[tuple[int, int]] = []
    runner = llm.engine.runner
    owner, name = (runner.pipeline, "launch") if runner.pipeline else (runner, "forward")
    real = getattr(owner, name)

    def watched(step: list[Scheduled], *args: Any, **options: Any) -> Any:
        counts = [prompt_tokens(entry.sequence, entry.start, entry.count) for entry in step]
        found.append((sum(counts), counts.count(0)))
        return real(step, *args, **options)

    setattr(owner, name, watched)
    return found


@pytest.mark.parametrize(
    "runs_ahead",
    [pytest.param(False, id="waits for ids", marks=pytest.mark.slow), pytest.param(True, id="runs ahead")],
)
def test_nobody_who_streams_misses_a_step_where_others_join_and_leave(
    runs_ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where steps are queued ahead, as on a GPU: each call of `step` brings the ids of one step."""
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", runs_ahead)
    llm = tiny_llm("llama", max_sequences=6, max_prefill_tokens=7)
    steps, rng = watch_steps(llm), random.Random(3)
    prompts = random_prompts(30, 60, seed=3)
    params = [replace(SEEDED, max_tokens=rng.randint(1, 30), n=rng.choice([1, 1, 2])) for _ in prompts]
    left: set[Sequence] = set()
    added: list[tuple[int, Sequence]] = []
    number = 0
    while llm.engine.has_work or number < len(prompts):
        if number < len(prompts) and rng.random() < 0.3:
            added += [(number, one) for one in llm.engine.add(prompts[number], params[number])]
            number += 1
        if rng.random() < 0.05 and llm.engine.scheduler.running:
            leaves = rng.choice(llm.engine.scheduler.running)
            left.add(leaves)
            llm.engine.finish(leaves, "abort")
        streaming = {s for s in llm.engine.scheduler.running if s.is_decoding}
        tokens = [token.sequence for token in llm.engine.step()]
        assert streaming <= set(tokens)
        assert len(tokens) == len(set(tokens))
    assert all(taken <= 7 for taken, decoding in steps if decoding)
    assert sum(1 for taken, decoding in steps if decoding and taken) > 20
    assert len(left) >= 3
    alone = tiny_llm("llama")
    expected = [alone.engine.add(prompt, one) for prompt, one in zip(prompts, params, strict=True)]
    while alone.engine.has_work:
        alone.engine.step()
    for index, sequence in added:
        whole = expected[index][sequence.choice].completion
        assert sequence.completion == (whole[: len(sequence.completion)] if sequence in left else whole)
    assert_idle(llm)


@pytest.mark.parametrize("most", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(64, marks=pytest.mark.slow)])
def test_what_a_preempted_sequence_gives_does_not_depend_on_how_its_ids_are_computed_again(most: int) -> None:
    """Beside others that decode, in chunks of so many tokens. Preempted ones have from 1 to 80 ids."""
    prompts = random_prompts(12, 50, seed=4)
    params = replace(GREEDY, max_tokens=40)
    expected = [one.ids for one in tiny_llm("llama").generate(prompts, params)]
    scarce = tiny_llm("llama", num_pages=18, max_prefill_tokens=most)
    preemptions = count_preemptions(scarce)
    assert [one.ids for one in scarce.generate(prompts, params)] == expected
    assert len(preemptions) >= 3
    assert_idle(scarce)


def test_a_pass_beside_a_stream_has_no_more_tokens_in_a_step_than_a_prompt_has() -> None:
    llm = tiny_llm("llama", max_step_tokens=40, max_prefill_tokens=7)
    [text] = random_prompts(1, 1, seed=1)
    text = text * 60
    expected = np.concatenate(list(llm.engine.logits(text)))
    (stream,) = llm.engine.add([1, 2, 3], replace(GREEDY, max_tokens=6))
    llm.engine.step()
    parts = []
    for part in llm.engine.logits(text):
        parts.append(np.array(part))
        if llm.engine.has_work:
            llm.engine.step()
    assert stream.finish_reason == "length"
    assert [len(part) for part in parts] == [7] * 5 + [25]  # the stream has ended by then
    np.testing.assert_allclose(np.concatenate(parts), expected, rtol=0, atol=1e-4)
    assert_idle(llm)
