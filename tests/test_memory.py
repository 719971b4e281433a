"""forge.plan_memory says what load then takes, and reads no weights for it."""

from __future__ import annotations

import gc
import re
import shutil
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import DATA, unpacked
from tiny_models import ARCH

import forge
from forge import OutOfMemoryError, ParameterError
from forge.backend import NUMPY
from forge.formats.checkpoint import Checkpoint

LLAMA = ARCH / "llama" / "model.gguf"
NOT_WALKED = type, types.ModuleType, types.FunctionType


def arrays_of(root: Any) -> Iterator[np.ndarray[Any, Any]]:
    """Every array that an object refers to, by whatever way."""
    seen, left = {id(NUMPY): NUMPY}, [root]
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, NOT_WALKED):
            continue
        seen[id(one)] = one
        if isinstance(one, np.ndarray):
            yield one
        else:
            left += gc.get_referents(one)


def directory(name: str) -> Callable[[Path], Path]:
    return lambda path: unpacked(name, path / name)


MODELS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "llama": (lambda _: LLAMA, {}),
    "context": (lambda _: LLAMA, {"context": 100, "max_sequences": 3}),
    "quantize": (lambda _: LLAMA, {"quantize": "Q8_0"}),
    "a window": (lambda _: ARCH / "gemma3" / "model.gguf", {"context": 300}),
    "experts": (lambda _: ARCH / "qwen3moe" / "model.gguf", {"cpu_experts": 1}),
    "a directory": (directory("qwen3"), {"max_sequences": 2}),
    "ONNX": (lambda _: DATA / "onnx/optimum/llama", {"max_sequences": 2}),
}


@pytest.mark.parametrize("case", MODELS)
def test_the_plan_is_what_load_takes(case: str, tmp_path: Path) -> None:
    make, settings = MODELS[case]
    path = make(tmp_path)
    plan = forge.plan_memory(path, device="cpu", **settings)
    with forge.load(path, device="cpu", **settings) as llm:
        runner = llm.engine.runner
        kv_bytes = sum(array.nbytes for cache in runner.state.caches for array in cache.arrays)
        weight_bytes = sum(array.nbytes for array in arrays_of(runner.model))
        own = tuple(note for note in llm.notes if not note.startswith("memory: "))  # other tests' models
        sizes = plan.context, plan.max_sequences, plan.total_bytes, plan.notes
        assert sizes == (llm.context, llm.engine.scheduler.max_sequences, llm.nbytes, own)
    assert (plan.fits, plan.problem, plan.kv_bytes) == (True, None, kv_bytes)
    assert 0 <= weight_bytes - plan.weight_bytes < 1024  # frequencies of the rotation, which the model makes itself
    assert plan.weight_bytes > 100_000
    assert plan.max_context == max(plan.context, llm.config.context_length)


@pytest.mark.parametrize("asked", [None, 200])
def test_the_largest_context_can_be_loaded_and_no_larger_one(
    asked: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, token = 681_728, 1536
    monkeypatch.setattr(NUMPY, "free_bytes", lambda: round((weights + 330 * token) / 0.9))
    plan = forge.plan_memory(LLAMA, device="cpu", context=asked)
    assert (plan.max_context, plan.context) == (256, asked or 256)  # whole pages of 64, and a spare one
    forge.load(LLAMA, device="cpu", context=256).close()
    with pytest.raises(OutOfMemoryError, match="use context=256"):
        forge.load(LLAMA, device="cpu", context=257)
    refused = forge.plan_memory(LLAMA, device="cpu", context=257)
    assert (refused.fits, refused.max_context, refused.max_sequences) == (False, 256, 0)
    assert (refused.weight_bytes, refused.kv_bytes) == (weights, (320 + 64) * token)


def test_a_model_that_does_not_fit_is_no_error_and_says_what_load_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NUMPY, "free_bytes", lambda: 500_000)
    plan = forge.plan_memory(LLAMA, device="cpu", memory_fraction=0.5)
    with pytest.raises(OutOfMemoryError) as error:
        forge.load(LLAMA, device="cpu", memory_fraction=0.5)
    assert plan.problem == str(error.value)
    assert (plan.fits, plan.max_context, plan.weight_bytes) == (False, 0, 681_728)
    assert (plan.free_bytes, plan.usable_bytes) == (500_000, 250_000)


def test_no_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise AssertionError("weights are read")

    for kind in Checkpoint.__subclasses__():
        monkeypatch.setattr(kind, "_read", fails)
    assert forge.plan_memory(LLAMA, device="cpu", quantize="Q4_0").fits
    with pytest.raises(AssertionError, match="weights are read"):
        forge.load(LLAMA, device="cpu")


def test_a_file_cut_behind_its_header_is_refused_as_load_does(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    shutil.copy(LLAMA, path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1000)
    for call in (forge.plan_memory, forge.load):
        with pytest.raises(forge.FormatError, match=r"cut\.gguf: tensor .* ends"):
            call(path, device="cpu")


def test_its_settings_are_checked_as_those_of_load() -> None:
    with pytest.raises(ParameterError, match="contxt is no parameter of plan_memory: did you mean context"):
        forge.plan_memory(LLAMA, contxt=3)  # type: ignore[call-arg]
    with pytest.raises(ParameterError, match="quantize"):
        forge.plan_memory(LLAMA, device="cpu", quantize="Q9")
    with pytest.raises(ParameterError, match="cpu_experts"):
        forge.plan_memory(LLAMA, device="cpu", cpu_experts=1)


def test_people_read_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NUMPY, "free_bytes", lambda: 2 * 10**9)
    plan = forge.plan_memory(LLAMA, device="cpu", max_sequences=1)
    assert repr(plan).splitlines() == [
        f"model.gguf fits {NUMPY.device}",
        "weights: 681.7 kB",
        "KV cache: 884.7 kB",
        "in all: 1.566 MB of 2 GB free",
        "context: 512 tokens; 512 would fit",
        "sequences: up to 1 together",
    ]
    page = plan._repr_html_()
    assert re.findall(r"<td[^>]*>(.*?)</td>", page)[:4] == ["weights", "681.7 kB", "KV cache", "884.7 kB"]
