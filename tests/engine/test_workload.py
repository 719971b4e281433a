"""benchmarks/workload.py runs what its data say, and counts what ran."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import assert_idle, tiny_llm

from forge.backend.numpy import NumpyBackend

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("runs_ahead", [False, True], ids=["waits for ids", "runs ahead"])
def test_requests_arrive_as_their_groups_say_and_give_all_their_ids(
    runs_ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import workload

    monkeypatch.setattr(NumpyBackend, "is_asynchronous", runs_ahead)
    groups = [
        {"count": 4, "prompt": [3, 9], "output": 5},
        {"count": 3, "prompt": 12, "output": [2, 4], "start": 0.01, "rate": 1000, "shared": 20},
    ]
    llm = tiny_llm("llama", max_step_tokens=24)
    arrivals = workload.requests(groups, llm.engine.runner.vocab_size, seed=1)
    shared, others = ([one for one in arrivals if (len(one.ids) == 32) == is_shared] for is_shared in (True, False))
    assert len({tuple(one.ids[:20]) for one in shared}) == 1
    assert (len(shared), len(others)) == (3, 4)
    assert all(3 <= len(one.ids) <= 9 for one in others)
    assert [one.at for one in others] == [0.0] * 4
    assert sorted(one.at for one in shared) == [one.at for one in shared]
    assert 0.01 == shared[0].at < shared[1].at
    found = workload.run(llm.engine, arrivals)
    wanted = sum(one.output for one in arrivals)
    assert sum(map(len, found.times.values())) == wanted
    assert all(times == sorted(times) for times in found.times.values())
    cached = llm.engine.stats().prefix_hit_tokens
    # a last id is not computed; where steps run ahead nothing is computed beyond it either, by its length
    assert sum(map(sum, found.steps.values())) == sum(len(one.ids) for one in arrivals) - cached + wanted - len(
        arrivals
    )
    assert set(found.steps) <= {"prompts", "mixed", "decode"}
    summary = found.summary()
    assert summary["requests_per_s"] == pytest.approx(7 / found.seconds)
    assert summary["first_token_ms"]["median"] > 0
    assert_idle(llm)
