"""Hooks and functions of users with `device="hip"`: as with NumPy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import forge

pytestmark = [pytest.mark.virtual_rocm, pytest.mark.slow]
ON = ("gfx942",)

MODEL = Path(__file__).parents[1] / "data" / "arch" / "llama" / "model.gguf"
PROMPTS = [[5, 9, 17, 3], list(range(20, 40)), [7, 8]]
LOGGED = forge.SamplingParams(max_tokens=8, ignore_eos=True, logprobs=0)


def both(compute: Callable[[forge.LLM], Any]) -> tuple[Any, Any]:
    """What is computed on the virtual GPU, and with NumPy."""
    found = []
    for device in ("hip", "cpu"):
        with forge.load(MODEL, device=device, context=64, max_sequences=4) as llm:
            found.append(compute(llm))
    return found[0], found[1]


def near(found: Any, expected: Any, what: str = "") -> None:
    np.testing.assert_allclose(found, expected, atol=2e-2 * max(float(np.abs(expected).max()), 1), err_msg=what)


def test_captured_values_are_those_of_numpy() -> None:
    """Of the residual stream: other points are slices, which CuPy copies by kernels of its own."""

    def compute(llm: forge.LLM) -> list[dict[str, Any]]:
        with llm.capture("*.resid_*") as cache:
            llm.logits(PROMPTS)
        return [dict(request) for request in cache]

    for found, expected in zip(*both(compute), strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            near(found[name], value, name)


def test_recorded_steps_steer_and_read_as_numpy_does() -> None:
    def compute(llm: forge.LLM) -> tuple[list[list[int]], list[dict[str, Any]]]:
        vectors = np.random.default_rng(1).standard_normal((2, llm.config.width)).astype(np.float32)
        first = llm.steer("blk.0.resid_mid", vectors[0], steps="generated", request=0)
        others = llm.steer("blk.0.resid_mid", vectors[1], scale=2.0, steps="generated", request=2)
        with first, others, llm.capture("blk.*.resid_post", steps="generated") as cache:
            done = llm.generate(PROMPTS, LOGGED)
        hooked = llm.engine.runner.hooked
        assert hooked is None or len(hooked._pipelines) == 2  # with a vector, and without one
        assert [one.ids for one in llm.generate(PROMPTS, LOGGED)] != [one.ids for one in done]
        return [one.ids for one in done], [dict(request) for request in cache]

    (ids, values), (other_ids, others) = both(compute)
    assert ids == other_ids
    for one, other in zip(values, others, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert len(value) == LOGGED.max_tokens - 1
            near(one[name], value, name)


def test_a_function_may_ask_another_model_on_the_same_device() -> None:
    """The thread of that model waits for the device, which the step that runs the function has."""
    found = []
    for device in ("hip", "cpu"):
        settings = {"device": device, "context": 64, "max_sequences": 4}
        with forge.load(MODEL, **settings) as expert, forge.load(MODEL, **settings) as amateur:
            asked: list[Any] = []

            def ask(ids: list[int], logits: Any, amateur: forge.LLM = amateur, asked: list[Any] = asked) -> None:
                asked.append(amateur.logits(ids, positions=-1)[0])
                asked.append(amateur.generate(ids, max_tokens=2).ids)

            own = forge.SamplingParams(max_tokens=4, ignore_eos=True, logits_processors=[ask])
            found.append(([one.ids for one in expert.generate(PROMPTS, own)], asked))
    (ids, asked), (expected, others) = found
    assert ids == expected
    assert len(asked) == 2 * 4 * len(PROMPTS)
    for one, other in zip(asked, others, strict=True):
        if isinstance(one, list):
            assert one == other
        else:
            near(one, other)
