"""Steps whose launches are queued again: right from new inputs, and recorded anew where anything has moved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

import forge
from forge.backend import tensor_maps
from forge.engine.graph_cache import GraphCache
from forge.ops.activation import add, gelu
from forge.ops.linear import linear
from virtual_rocm import tiny
from virtual_rocm.calls import failing
from virtual_rocm.runtime import OUT_OF_MEMORY

pytestmark = [pytest.mark.virtual_rocm, pytest.mark.slow]
ON = ("gfx1100",)
WIDTH = 64


class Step:
    """gelu((x + x) @ weight.T) by two ops with memory between them, and one in place: counts the times it runs."""

    def __init__(self, device: Any, rows: int = 2) -> None:
        rng = np.random.default_rng(rows)
        self.device, self.num_runs = device, 0
        self.values = (rng.standard_normal((WIDTH, WIDTH)) / 8).astype(np.float16)
        self.weight = device.asarray(self.values)
        self.x = device.asarray(np.zeros((rows, WIDTH), np.float32))
        self.total = device.asarray(np.zeros((rows, WIDTH), np.float32))

    def run(self) -> Any:
        self.num_runs += 1
        h = gelu(add(self.x, self.x))
        linear(h, self.weight, None, self.total, glu="none", split_k="never")
        return linear(h, self.weight, None, None, glu="none", split_k="never")

    def check(self, recorded: Callable[..., Any], seed: int) -> None:
        """The step's result for random inputs, and what it adds to its total."""
        x = np.random.default_rng(seed).standard_normal(self.x.shape).astype(np.float32)
        before = self.device.to_numpy(self.total)
        self.device.upload(self.x, x)
        found = recorded([self.x, None], self.run)
        expected = gelu.reference(2.0 * x) @ self.values.astype(np.float32).T
        np.testing.assert_allclose(self.device.to_numpy(found), expected, rtol=5e-3, atol=5e-3)
        np.testing.assert_allclose(self.device.to_numpy(self.total) - before, expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("rows", [2, 270])
def test_a_step_is_run_once_and_then_queued_again(device: Any, rows: int) -> None:
    """270 rows are products of BLAS."""
    recorded, step = device.recorder(), Step(device, rows)
    for seed in range(3):
        step.check(recorded, seed)
    assert step.num_runs == 1


def test_steps_share_their_memory(device: Any) -> None:
    """The steps take turns, so that each writes to what the other has left."""
    recorded, steps = device.recorder(), [Step(device, rows) for rows in (2, 3, 2)]
    for seed in range(4):
        for step in steps:
            step.check(recorded, seed)
    assert [step.num_runs for step in steps] == [1, 1, 1]


def test_inputs_elsewhere_and_of_other_shapes_are_other_steps(device: Any) -> None:
    recorded, step = device.recorder(), Step(device)
    step.check(recorded, 0)
    kept, step.x = step.x, device.asarray(np.zeros((2, WIDTH), np.float32))
    step.check(recorded, 1)
    assert step.num_runs == 2
    recorded([step.x], step.run)
    assert step.num_runs == 3
    step.x = kept
    step.check(recorded, 2)
    assert step.num_runs == 3


def test_a_step_is_recorded_anew_where_shared_memory_has_moved(device: Any) -> None:
    recorded, step = device.recorder(), Step(device)
    step.check(recorded, 0)
    with device.active():
        device.scratch((1 + (0 if device._scratch is None else device._scratch.nbytes),), np.uint8)
    step.check(recorded, 1)
    assert step.num_runs == 2
    device.release_memory()
    step.check(recorded, 2)
    assert step.num_runs == 3
    step.check(recorded, 3)
    assert step.num_runs == 3


def test_a_step_is_recorded_anew_where_the_driver_had_no_memory(device: Any) -> None:
    """The pool then gives back what no array uses, which recorded steps do."""
    recorded, step, larger = device.recorder(), Step(device), Step(device, 3000)
    step.check(recorded, 0)
    with failing("hipMalloc", OUT_OF_MEMORY, count=1) as fault:
        larger.check(recorded, 0)
    assert fault.met == 1
    larger.check(recorded, 1)
    step.check(recorded, 1)
    step.check(recorded, 2)
    assert step.num_runs == 2


def test_a_step_that_is_collected_or_captured_runs_as_it_is(device: Any) -> None:
    recorded, step = device.recorder(), Step(device)
    device.prepare(lambda: recorded([step.x, None], step.run))
    assert step.num_runs == 1
    _, replay = device.capture(lambda: recorded([step.x, None], step.run), [step.x], None)
    replay()
    assert step.num_runs == 2
    step.check(recorded, 0)
    assert step.num_runs == 3


def test_a_step_that_fails_is_not_kept(device: Any) -> None:
    recorded, step = device.recorder(), Step(device)

    def fails() -> Any:
        step.run()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recorded([step.x, None], fails)
    step.check(recorded, 0)
    step.check(recorded, 1)
    assert step.num_runs == 2


def test_what_outlives_a_step_is_not_in_the_memory_of_steps(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor map is made where a step is the first to need it. Steps that were recorded before write on."""
    words = np.arange(1, 17, dtype=np.uint64)
    monkeypatch.setattr(tensor_maps, "encode", lambda *_: words)
    device.release_memory()
    recorded, earlier, later, made = device.recorder(), Step(device), Step(device, 3), []

    def run() -> Any:
        made.extend(device.map_of(address, (1, 2, 3, 4), 8) for address in range(8))
        return later.run()

    earlier.check(recorded, 0)
    recorded([later.x], run)
    for seed in range(2):
        earlier.check(recorded, seed)
        later.check(recorded, seed)
    assert earlier.num_runs == 1
    assert [device.to_numpy(each).tolist() for each in made] == [words.tolist()] * 8


def test_models_of_several_threads_do_not_write_to_each_others_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread of one model computes a whole request, if it may, between a step of the other's and its draw."""
    path = tiny.write("llama", "F16", tmp_path / "tiny.gguf")
    params = forge.SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    prompts = [5, 9, 17, 3], [40, 41, 42, 43]
    with forge.load(path, device="hip", context=128) as one, forge.load(path, device="hip", context=128) as other:
        for _ in range(2):
            wanted = [llm.generate(prompt, params).ids for llm, prompt in zip((one, other), prompts, strict=True)]
        assert wanted[0][0] != wanted[1][0]
        pipeline, found = one.engine.runner.pipeline, list[list[int]]()
        draw, thread = pipeline._draw, Thread(target=lambda: found.append(other.generate(prompts[1], params).ids))

        def late(logits: Any) -> Any:
            if not thread.ident:
                thread.start()
                thread.join(1)
            return draw(logits)

        monkeypatch.setattr(pipeline, "_draw", late)
        assert one.generate(prompts[0], params).ids == wanted[0]
        thread.join()
        assert found == [wanted[1]]


def test_captured_steps_share_the_memory_of_recorded_ones(device: Any) -> None:
    """Each replay is right although others have written there since, and the largest step takes all that there is."""
    recorded, steps = device.recorder(), [Step(device, rows) for rows in (64, 2, 17)]
    steps[0].check(recorded, 0)
    reserved = device._step_memory._pool.total_bytes()
    captured = [device.capture(step.run, [step.total], lambda state: [state[0] + 1]) for step in steps]
    assert device._step_memory._pool.total_bytes() == reserved
    assert device._step_memory._pool.used_bytes() == 0
    for seed in range(1, 4):
        for step, (_, replay) in zip(steps, captured, strict=True):
            step.check(lambda inputs, run, replay=replay: replay(), seed)
            steps[0].check(recorded, seed)
    assert [step.num_runs for step in steps] == [2, 1, 1]


def test_a_captured_step_whose_memory_is_gone_is_not_replayed(device: Any) -> None:
    step = Step(device)
    _, replay = device.capture(step.run, [step.total], None)
    replay()
    device.release_memory()
    with pytest.raises(RuntimeError, match="memory is gone"):
        replay()


def test_a_model_that_is_closed_takes_no_memory_of_anothers_replay(
    tmp_path: Path, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that closes one gives the memory of steps back, if it may, where the other is about to replay."""
    path = tiny.write("llama", "F16", tmp_path / "tiny.gguf")
    params = forge.SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    with forge.load(path, device="hip", context=128) as llm:
        for _ in range(2):
            wanted = llm.generate([5, 9, 17, 3], params).ids
        thread, run, running = Thread(target=device.release_memory), GraphCache.run, []

        def generation(self: Any) -> object:
            found = self._step_memory.generation
            if running and not thread.ident:
                thread.start()
                thread.join(1)
            return found

        monkeypatch.setattr(GraphCache, "run", lambda *args, **how: running.append(1) or run(*args, **how))
        monkeypatch.setattr(type(device), "step_generation", property(generation))
        assert llm.generate([5, 9, 17, 3], params).ids == wanted
        thread.join()
        assert llm.generate([5, 9, 17, 3], params).ids == wanted
