"""Whole models with `device="hip"`: from ids to ids, against NumPy's float32."""

from __future__ import annotations

import gc
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import forge
from forge.backend import NUMPY, Backend, select
from forge.config import EngineConfig
from forge.devtools.recorder import Recorder
from forge.devtools.variants import record
from forge.ops.sampling import sample
from forge.planning import layers_text
from virtual_rocm import tiny
from virtual_rocm.calls import failing, number_of_calls
from virtual_rocm.runtime import CAPTURE_INVALIDATED, CAPTURE_UNSUPPORTED, DEVICE, UNKNOWN

pytestmark = [pytest.mark.virtual_rocm, pytest.mark.slow]

NEAR_TIE = 0.05
"""Top-2 gap of float32 logits under which float16 activations may choose the other id."""
GREEDY = forge.SamplingParams(max_tokens=32, temperature=0, ignore_eos=True)
PROMPTS = [[5, 9, 17, 3], list(range(20, 90)), [7]]
CONTEXT = 128
MODELS = [("llama", "F16"), ("llama", "Q4_K"), ("gemma3", "F16"), ("qwen3moe", "Q4_K")]
Write = Callable[[str, str], Path]


class Expected(NamedTuple):
    """What NumPy makes of a prompt."""

    prompt: list[int]
    ids: list[int]
    logits: np.ndarray
    """Float32, (prompt and ids, V)."""

    @property
    def is_near_tie(self) -> np.ndarray:
        return top_2_gap(self.logits) < NEAR_TIE

    def assert_agrees(self, completion: forge.Completion) -> None:
        """The same ids, or parted from them at a near tie; to there, the same log probabilities."""
        start = len(self.prompt) - 1
        first = first_difference(completion.ids, self.ids)
        assert first is None or self.is_near_tie[start + first], (completion.ids, self.ids)
        assert completion.logprobs
        for i, token in enumerate(completion.logprobs[:first]):
            row = self.logits[start + i].astype(np.float64)
            assert token.logprob == pytest.approx(row[token.id] - np.log(np.exp(row).sum()), abs=0.1)


def top_2_gap(logits: np.ndarray) -> np.ndarray:
    return np.diff(np.sort(logits, axis=1)[:, -2:], axis=1)[:, 0]


def first_difference(ids: list[int], others: list[int]) -> int | None:
    return next((i for i, (one, other) in enumerate(zip(ids, others, strict=True)) if one != other), None)


@pytest.fixture(scope="session")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """A tiny model's file, by family and type of its matrices."""
    directory = tmp_path_factory.mktemp("models")

    def make(family: str, type_name: str) -> Path:
        path = directory / f"{family}-{type_name}.gguf"
        return path if path.exists() else tiny.write(family, type_name, path)

    return make


def expected(path: Path) -> list[Expected]:
    with forge.load(path, device="cpu", context=CONTEXT) as llm:
        completions = llm.generate(PROMPTS, GREEDY)
        assert min(len(set(c.ids)) for c in completions) >= 8  # a text that repeats itself shows little
        return [Expected(c.prompt_ids, c.ids, llm.logits([*c.prompt_ids, *c.ids])) for c in completions]


@pytest.mark.parametrize(("family", "type_name"), MODELS)
def test_ids_are_numpys(family: str, type_name: str, write: Write, gfx: str) -> None:
    path = write(family, type_name)
    wanted = expected(path)
    found = []
    with forge.load(path, device="hip", context=CONTEXT) as llm:
        for one in wanted:  # teacher-forced
            logits = llm.logits([*one.prompt, *one.ids])
            assert np.sqrt(np.mean((logits - one.logits) ** 2) / np.mean(one.logits**2)) < 0.005
            agrees = logits.argmax(axis=1) == one.logits.argmax(axis=1)
            assert (agrees | one.is_near_tie).all()
        together = llm.generate(PROMPTS, GREEDY, logprobs=1)
        alone = [llm.generate(PROMPTS[0], GREEDY, logprobs=1)]
        for one, completion in [*zip(wanted, together, strict=True), *zip(wanted, alone, strict=False)]:
            one.assert_agrees(completion)
            logits = llm.logits([*completion.prompt_ids, *completion.ids])[len(one.prompt) - 1 : -1]
            found.append({"ids": completion.ids, "gaps": top_2_gap(logits).tolist()})
    assert_equal_on_all_targets(f"{family}-{type_name}", found, gfx)


def test_deterministic_requests_have_the_same_bits_beside_any_others(write: Write, gfx: str) -> None:
    """Alone, in a batch and with the prompt in parts; ids agree with NumPy's."""
    path = write("llama", "Q4_K")
    settings = EngineConfig(context=CONTEXT, deterministic=True)
    with forge.load(path, device="hip", engine=settings) as llm:
        together = llm.generate(PROMPTS, GREEDY, logprobs=1)
        alone = [llm.generate(prompt, GREEDY, logprobs=1) for prompt in PROMPTS]
    with forge.load(path, device="hip", engine=replace(settings, max_step_tokens=7)) as llm:
        in_parts = llm.generate(PROMPTS, GREEDY, logprobs=1)
    for wanted, *completions in zip(expected(path), together, alone, in_parts, strict=True):
        wanted.assert_agrees(completions[0])
        for other in completions[1:]:
            assert other.ids == completions[0].ids
            assert other.logprobs == completions[0].logprobs


def test_experts_in_the_hosts_memory_compute_the_same_bits(write: Write) -> None:
    """Of the first layer or of all, in steps that are replayed as graphs, and prompts of many rows."""
    path = write("qwen3moe", "Q4_K")
    found, launched = [], []
    gc.collect()
    pinned = DEVICE.pinned.used
    for count in (0, 1, 99):
        with forge.load(path, device="hip", cpu_experts=count, context=CONTEXT) as llm:
            DEVICE.launches.clear()
            before = number_of_calls("hipGraphLaunch")
            completions = llm.generate(PROMPTS, replace(GREEDY, max_tokens=12), logprobs=1)
            assert number_of_calls("hipGraphLaunch") - before >= 12 - 4
            found.append([(c.ids, [token.logprob for token in c.logprobs]) for c in completions])
            found[-1].append(llm.logits(PROMPTS[1]).tobytes())
            launched.append("fetch_experts" in {kernel for _, kernel in DEVICE.launches})
            (note,) = [note for note in llm.notes if note.startswith("cpu_experts: ")] or [""]
            layers = len(llm.engine.runner.model.host_experts())
            assert note.startswith(f"cpu_experts: experts of {layers_text(layers)} take ") == bool(count)
            assert layers == min(count, llm.config.num_layers)
    gc.collect()
    assert DEVICE.pinned.used == pinned  # nothing is kept of a model that is closed
    assert found[0] == found[1] == found[2]
    assert launched == [False, True, True]


def assert_equal_on_all_targets(name: str, found: list[dict[str, Any]], gfx: str) -> None:
    """Leave the ids for the sessions of other GPUs, and compare with theirs: equal, or parted at near ties."""
    shared = Path(os.environ["VIRTUAL_ROCM_SHARED"])
    scratch = shared / f".{name}-{gfx}"
    scratch.write_text(json.dumps(found))
    scratch.rename(shared / f"{name}-{gfx}.json")
    for path in shared.glob(f"{name}-*.json"):
        for mine, other in zip(found, json.loads(path.read_text()), strict=True):
            first = first_difference(mine["ids"], other["ids"])
            assert first is None or mine["gaps"][first] < NEAR_TIE, f"{path.name} is not what {gfx} computes"


@pytest.mark.parametrize("size", [1, 320, 4097])
def test_the_sampler_draws_numpys_ids(size: int, device: Backend) -> None:
    rng, rows = np.random.default_rng(size), 48
    logits = (rng.standard_normal((rows, size)) * rng.choice([0.1, 1, 8], (rows, 1))).astype(np.float32)
    logits[3::7] = np.round(logits[3::7])  # ties
    arguments = (
        logits,
        rng.choice([0.0, 0.7, 1.0, 100.0], rows).astype(np.float32),
        rng.choice([0, 1, 50, size], rows).astype(np.int32),
        rng.choice([0.1, 0.9, 1.0], rows).astype(np.float32),
        rng.choice([0.0, 0.05, 1.0], rows).astype(np.float32),
        rng.integers(0, 2**63, rows).astype(np.uint64),
        rng.integers(0, 4, rows).astype(np.uint32),
        rng.integers(0, 1000, rows).astype(np.uint32),
    )
    got = device.to_numpy(device.launch(sample, tuple(device.asarray(a) for a in arguments), {}))
    np.testing.assert_array_equal(got, NUMPY.launch(sample, arguments, {}))


@pytest.fixture(scope="module")
def as_graphs(write: Write) -> list[tuple[list[int], list[float]]]:
    """Ids and log probabilities of steps that are replayed as graphs."""
    forget_devices()
    before = number_of_calls("hipGraphLaunch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = greedy(write("llama", "Q4_K"))
    assert number_of_calls("hipGraphLaunch") - before >= GREEDY.max_tokens - 4
    return found


def greedy(path: Path) -> list[tuple[list[int], list[float]]]:
    with forge.load(path, device="hip", context=CONTEXT) as llm:
        completions = llm.generate(PROMPTS, GREEDY, logprobs=1)
    return [(c.ids, [token.logprob for token in c.logprobs]) for c in completions]


@pytest.mark.parametrize(
    ("function", "code"),
    [
        ("hipStreamBeginCapture", CAPTURE_UNSUPPORTED),
        ("hipStreamEndCapture", CAPTURE_INVALIDATED),
        ("hipModuleLaunchKernel", CAPTURE_INVALIDATED),  # while a stream is captured
        ("hipGraphInstantiate", UNKNOWN),
        ("hipGraphLaunch", UNKNOWN),
    ],
)
def test_steps_that_cannot_be_captured_are_launched_one_by_one(
    function: str, code: int, as_graphs: list[tuple[list[int], list[float]]], write: Write, new_device: None
) -> None:
    before = number_of_calls("hipGraphLaunch")
    ends = function == "hipStreamEndCapture"  # which ends the capture also when it fails
    with (
        failing(function, code, runs=ends, when=is_capturing if function == "hipModuleLaunchKernel" else None),
        pytest.warns(UserWarning, match="steps are launched one by one, not as a graph: hipError") as said,
    ):
        one_by_one = greedy(write("llama", "Q4_K"))
    assert len(said) == 1
    assert number_of_calls("hipGraphLaunch") - before <= 1
    assert one_by_one == as_graphs


def test_a_long_step_is_several_graphs(
    as_graphs: list[tuple[list[int], list[float]]], write: Write, new_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forge.backend import graphs

    monkeypatch.setattr(graphs, "MAX_NODES", 5)
    before = number_of_calls("hipGraphLaunch")
    assert greedy(write("llama", "Q4_K")) == as_graphs
    assert number_of_calls("hipGraphLaunch") - before >= 3 * (GREEDY.max_tokens - 4)  # of two layers and what ends it


def test_without_graphs(
    as_graphs: list[tuple[list[int], list[float]]], write: Write, new_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGE_GRAPHS", "0")
    before = number_of_calls("hipStreamBeginCapture")
    assert greedy(write("llama", "Q4_K")) == as_graphs
    assert number_of_calls("hipStreamBeginCapture") == before


@pytest.mark.parametrize(("good", "interval"), [(20, 1), (float("inf"), 3)])
def test_graphs_that_are_compared(
    good: float, interval: int, as_graphs: list[tuple[list[int], list[float]]], write: Write, new_device: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A driver whose replays go stale while the model runs is found out, and the ids are right."""
    monkeypatch.setenv("FORGE_GRAPHS", f"check:{interval}")
    monkeypatch.setattr(DEVICE, "good_replays", good)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = greedy(write("llama", "Q4_K"))
    assert [ids for ids, _ in found] == [ids for ids, _ in as_graphs]
    texts = [str(warning.message) for warning in said]
    assert len(texts) == (good < 100)
    assert all("steps are launched one by one from now on, not as a graph: a replay computed" in text for text in texts)


def is_capturing() -> bool:
    return any(stream.capture is not None for stream in DEVICE.streams())


def forget_devices() -> None:
    from forge.backend import cupy

    cupy._BACKENDS.clear()


@pytest.fixture
def new_device() -> Any:
    """What a device learns of its driver in a test stays there."""
    forget_devices()
    yield
    forget_devices()


def test_a_model_that_nobody_has_any_more_holds_no_memory(write: Write) -> None:
    """At once, not when Python next collects garbage: the next model may need it."""
    import cupy

    used = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):  # what the device keeps for all models is there after the first
            greedy(write("llama", "Q4_K"))
            used.append(cupy.get_default_memory_pool().used_bytes())
    finally:
        gc.enable()
    assert used[0] == used[1]


def test_everything_is_computed_by_kernels_of_forges(write: Write) -> None:
    """Every parameter, and looking inside. `conftest.py` looks at what was launched."""
    with forge.load(write("gemma3", "Q4_K"), device="hip", context=CONTEXT) as llm:
        llm.generate(
            PROMPTS,
            max_tokens=6,
            n=2,
            temperature=0.8,
            top_k=20,
            top_p=0.9,
            min_p=0.01,
            seed=1,
            logprobs=2,
            repetition_penalty=1.2,
            frequency_penalty=0.1,
            presence_penalty=0.1,
            logit_bias={7: 1.0},
            ignore_eos=True,
        )
        llm.logits(PROMPTS[0])
        llm.attention(PROMPTS[0], 0)
        llm.perplexity("abc abc abc")
    assert {"matmul", "sample", "penalize"} <= {file.partition("-")[0] for file, _ in DEVICE.launches} | {
        kernel for _, kernel in DEVICE.launches
    }


def test_closing_a_model_gives_the_driver_back_what_it_took(write: Write) -> None:
    import cupy

    device: Any = select("hip")
    gc.collect()
    device.release_memory()
    before = cupy.cuda.runtime.memGetInfo()
    llm = forge.load(write("llama", "Q4_K"), device="hip", context=CONTEXT)
    stream = llm.stream([1, 2, 3], max_tokens=None, ignore_eos=True)
    next(stream)
    llm.logits([1, 2, 3])
    assert cupy.cuda.runtime.memGetInfo() < before
    gc.collect()  # what pytest keeps of earlier tests, not what the model leaves
    gc.disable()
    try:
        llm.close()
        assert cupy.cuda.runtime.memGetInfo() == before
    finally:
        gc.enable()
    assert device.free_bytes() == before[0]
    assert list(stream)[-1].finish_reason == "abort"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_recording_of_a_model_is_what_it_launches(write: Write, new_device: None, gfx: str, family: str) -> None:
    path = write(family, "Q4_K")
    with forge.load(path, device="hip", context=CONTEXT, max_sequences=20) as llm:
        every = forge.SamplingParams(max_tokens=3, ignore_eos=True, logprobs=2, repetition_penalty=1.5, n=2)
        for rows in (1, 8, 16, 32, 64, 70):
            llm.generate([[5] * rows], every)
        llm.generate([[5, 6]] * 20, every)
        for rows in (2, 20, 70):
            llm.logits([5] * rows)
        llm.attention([5, 6, 7], 0)
    device: Any = select("hip")
    recorder = Recorder(gfx, device.num_cus)
    record(path, recorder, EngineConfig(context=CONTEXT, max_sequences=20))
    assert set(device._modules.loaded) == set(recorder.variants)
