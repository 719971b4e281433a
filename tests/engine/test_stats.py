"""What an engine counts is what has happened."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tiny_models import CONTEXT, SEEDED, assert_idle, count_preemptions, random_prompts, tiny_llm

from forge.engine import EngineStats


def test_a_snapshot_counts_who_runs_and_waits_and_the_pages_of_each_kind() -> None:
    llm = tiny_llm("gemma3", max_sequences=2, num_pages=(50, 40), max_prefill_tokens=4)
    engine = llm.engine
    assert [pool.kind.name for pool in engine.pools] == ["all positions", "window of 16"]
    assert engine.stats() == EngineStats(
        running=0,
        waiting=0,
        pages_used={"all positions": 0, "window of 16": 0},
        pages_total={"all positions": 50, "window of 16": 40},
        preemptions=0,
        prompt_tokens=0,
        generated_tokens=0,
    )
    first = engine.add([1] * 20, SEEDED)
    engine.add([2] * 9, replace(SEEDED, n=3))
    engine.add([3] * 5, SEEDED)
    assert (engine.stats().running, engine.stats().waiting) == (0, 5)
    engine.step()  # the first two prompts; of three choices one has no place beside the first
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (2, 3)
    assert (stats.prompt_tokens, stats.generated_tokens) == (29, 4)
    assert stats.pages_used["all positions"] == 3 + 2
    engine.finish(first[0], "abort")
    assert (engine.stats().running, engine.stats().pages_used["all positions"]) == (1, 2)
    llm.close()
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)


def test_totals_are_those_of_the_steps() -> None:
    llm = tiny_llm("llama", num_pages=CONTEXT // 8)
    preemptions, forward, computed = count_preemptions(llm), llm.engine.runner.forward, 0

    def counted(step: Any) -> Any:
        nonlocal computed
        for entry in step:
            computed += sum(
                position < entry.sequence.num_prompt for position in range(entry.start, entry.start + entry.count)
            )
        return forward(step)

    llm.engine.runner.forward = counted  # type: ignore[method-assign]
    prompts = random_prompts(6, 30, seed=2)
    found = llm.generate(prompts, replace(SEEDED, max_tokens=40))
    stats = llm.engine.stats()
    assert stats.generated_tokens == sum(len(one.ids) for one in found)
    assert stats.prompt_tokens == computed > sum(map(len, prompts))  # some twice
    assert stats.preemptions == len(preemptions) >= 3
    assert_idle(llm)
