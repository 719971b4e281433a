"""Decode steps without graphs, and with graphs that are compared: a driver that replays stale data is found out."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from harness import COMPILER, Harness
from host_memory import HostMemory, Replayed

import forge
from forge import loading
from forge.engine import Engine
from forge.errors import ParameterError

slow = pytest.mark.slow
needs_harness = pytest.mark.skipif(COMPILER is None, reason="no clang++: scripts/install-toolchain installs it")

LLAMA = Path(__file__).parents[1] / "data" / "arch" / "llama" / "model.gguf"
PROMPTS = [[5, 9, 17, 3], [20, 21]]
GREEDY = forge.SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)


class Device(Replayed, HostMemory, Harness):
    """What engines ask of a backend beside launches."""

    arch = "harness"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device(32)
    monkeypatch.setattr(loading.backends, "select", lambda _: found)
    return found


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """Each time that an engine starts over: the ids of its sequences, prompts included."""
    found: list[list[list[int]]] = []
    real = Engine._start_over

    def noted(self: Engine) -> None:
        real(self)
        assert not self.scheduler.running
        assert all(pool.num_free == pool.num_pages for pool in self.pools)
        found.append([list(sequence.ids) for sequence in self.scheduler.waiting])

    monkeypatch.setattr(Engine, "_start_over", noted)
    return found


def generate(graphs: bool | int | None = None) -> list[list[int]]:
    with forge.load(LLAMA, context=64, max_sequences=2, graphs=graphs) as llm:
        return [completion.ids for completion in llm.generate(PROMPTS, GREEDY)]


@pytest.fixture(scope="module")
def wanted() -> list[list[int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading.backends, "select", lambda _: Device(32))
        return generate(False)


@needs_harness
@pytest.mark.parametrize("value", [False, pytest.param("0", marks=slow)])
def test_without_graphs_nothing_is_replayed(
    value: Any, device: Device, wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(value, str):
        monkeypatch.setenv("FORGE_GRAPHS", value)
    assert generate(None if isinstance(value, str) else value) == wanted
    assert device.replays == 0


@needs_harness
@pytest.mark.parametrize("graphs", [pytest.param(True, marks=slow), pytest.param(1, marks=slow), 3])
def test_right_replays_are_used_and_compared(graphs: Any, device: Device, wanted: list[list[int]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(graphs) == wanted
    assert device.replays >= 15
    assert device.has_graphs


@slow
@needs_harness
def test_stale_replays_are_not_noticed_unless_they_are_compared(device: Device, wanted: list[list[int]]) -> None:
    device.stale_after = 4
    assert generate(True) != wanted


@needs_harness
@pytest.mark.parametrize("first", [0, *(pytest.param(first, marks=slow) for first in (1, 4, 9))])
def test_where_each_replay_is_compared_all_ids_are_right(
    first: int, device: Device, wanted: list[list[int]], known: list[Any]
) -> None:
    device.stale_after = first
    with pytest.warns(UserWarning, match="from now on, not as a graph: a replay computed something else") as said:
        assert generate(1) == wanted
    assert (len(said), len(known), device.replays) == (1, 1, first + 1)


@needs_harness
@pytest.mark.parametrize(
    ("first", "interval"), [(3, 4), *(pytest.param(*row, marks=slow) for row in ((4, 4), (5, 4), (6, 7)))]
)
def test_a_driver_that_goes_stale_is_found_within_the_interval(
    first: int, interval: int, device: Device, known: list[list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From there on the ids are those of a model without graphs, after whatever was told until then."""
    device.stale_after = first
    monkeypatch.setenv("FORGE_GRAPHS", f"check:{interval}")
    with pytest.warns(UserWarning, match="tokens since the comparison before may be wrong") as said:
        got = generate()
    assert len(said) == 1
    assert first < device.replays <= first + interval
    (ids,) = known
    with forge.load(LLAMA, context=64, max_sequences=2, graphs=False) as llm:
        for completion, prompt, begun in zip(got, PROMPTS, ids, strict=True):
            assert [*prompt, *completion][: len(begun)] == begun
            rest = len(prompt) + len(completion) - len(begun)
            assert rest > 3
            assert llm.generate(begun, max_tokens=rest, ignore_eos=True).ids == completion[-rest:]


@pytest.mark.parametrize(
    "value", ["2", "check", "check:0", "check:-1", "check:1x", "no", "check:1\n", "check:9999999999"]
)
def test_values_of_the_variable(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_GRAPHS", value)
    with pytest.raises(ParameterError, match=r"^FORGE_GRAPHS must be 0 .*, 1, or check:N "):
        forge.load(LLAMA, device="cpu")
    with forge.load(LLAMA, device="cpu", graphs=True) as llm:  # the argument goes before the variable
        assert llm.generate([5], max_tokens=1).ids


@pytest.mark.parametrize("value", [0, -3, 1.5, "check:4"])
def test_values_of_the_argument(value: Any) -> None:
    with pytest.raises(ParameterError, match=r"^graphs must be "):
        forge.load(LLAMA, device="cpu", graphs=value)


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_GRAPHS", "")
    assert loading._graphs() is True
