"""Requests with adapters with `device="hip"`: through CuPy's plans, recorded steps and captured ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import random_pairs, write_adapter

import forge

pytestmark = [pytest.mark.virtual_rocm, pytest.mark.slow]
ON = ("gfx942",)

MODEL = Path(__file__).parents[1] / "data" / "arch" / "llama" / "model.gguf"
GREEDY = forge.SamplingParams(max_tokens=16, ignore_eos=True, logprobs=0)
PROMPTS = [[5, 9, 17, 3], list(range(20, 50)), [7], [11, 12]]


def run(llm: forge.LLM, names: tuple[str | None, ...]) -> list[Any]:
    """The completions of requests that run in the same steps, as sequences."""
    pairs = zip(PROMPTS, names, strict=True)
    sequences = [llm.engine.add(prompt, GREEDY, llm._slot_of(name))[0] for prompt, name in pairs]
    while llm.engine.has_work:
        llm.engine.step()
    return [sequence.completion for sequence in sequences]


def test_a_mixed_batch_agrees_with_numpy_and_steps_without_adapters_with_a_model_without(tmp_path: Path) -> None:
    files = {
        name: write_adapter(tmp_path / f"{name}.gguf", "llama", random_pairs(MODEL, seed=seed, rank=4 + 8 * seed))
        for seed, name in enumerate("ab")
    }
    names = ("a", None, "b", "a")
    with forge.load(MODEL, device="cpu", context=64, adapters=files) as llm:
        wanted = run(llm, names)
        exact = [
            llm.logits([*prompt, *ids], adapter=name) for prompt, ids, name in zip(PROMPTS, wanted, names, strict=True)
        ]
        assert run(llm, (None,) * 4) != wanted
    with forge.load(MODEL, device="hip", context=64, max_sequences=4) as llm:
        plain = run(llm, (None,) * 4)
    with forge.load(MODEL, device="hip", context=64, max_sequences=4, adapters=files, graphs=2) as llm:
        assert run(llm, (None,) * 4) == plain
        got = run(llm, names)
        assert run(llm, names) == got  # replayed
        logits = llm.logits(PROMPTS[1], adapter="b")
        assert run(llm, (None,) * 4) == plain
    with forge.load(MODEL, device="cpu", context=64, adapters=files) as llm:
        np.testing.assert_allclose(logits, llm.logits(PROMPTS[1], adapter="b"), atol=0.1)
    for prompt, ids, other, rows in zip(PROMPTS, got, wanted, exact, strict=True):
        parted = [place for place, pair in enumerate(zip(ids, other, strict=True)) if len({*pair}) > 1]
        if parted:  # only a near tie may part them
            row = np.sort(rows[len(prompt) + parted[0] - 1])
            assert row[-1] - row[-2] < 0.05
