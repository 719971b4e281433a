"""Captured values against those of `transformers`' modules, in every family (scripts/make_activation_goldens.py)."""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt
import pytest
from tiny_models import ARCH

import forge

POSITIONS = [11, 23]
FAMILIES = sorted(path.parent.name for path in ARCH.glob("*/activations.npz"))
QUICK = {"gemma4_e2b", "qwen2moe", "gpt2", "olmo2", "granitemoe_shared"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_captured_values_equal_transformers(name: str) -> None:
    golden = np.load(ARCH / name / "activations.npz")
    contexts = json.loads((ARCH / name / "meta.json").read_text()).get("context", {})
    settings = forge.EngineConfig(context=contexts.get("24", 512))
    with forge.load(ARCH / name / "model.gguf", engine=settings) as llm:
        known = {point.name for point in llm.hook_points()}
        wanted = [point for point in golden if point in known]
        with llm.capture(wanted) as cache:
            llm.logits(np.load(ARCH / name / "logits.npz")["ids_24"].tolist())
    # Of others' layers there are keys and values, of halves that read one stream a value in between.
    assert len(wanted) >= 0.8 * len(golden.files)
    for point in wanted:
        expected, found = golden[point], cache[point]
        rows = found[:, POSITIONS] if point.endswith("pattern") else found[POSITIONS].reshape(expected.shape)
        if point.endswith((".q", ".k")) and not close(rows, expected):
            expected = interleaved(expected)
        assert close(rows, expected), (point, float(np.abs(rows - expected).max()), float(np.abs(expected).max()))


def close(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> bool:
    """Within 1e-5 of the array's largest number: what one sum of the layers before rounds differently."""
    return float(np.abs(found - expected).max()) <= 1e-5 * float(np.abs(expected).max())


def interleaved(heads: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(T, H, D) whose rotated pairs are halves, as files of families that rotate neighbours hold them."""
    tokens, count, dim = heads.shape
    return heads.reshape(tokens, count, 2, dim // 2).swapaxes(2, 3).reshape(heads.shape)
