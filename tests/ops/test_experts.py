"""Launches of mixtures of experts, at sizes that no other test has, and the limits of their kernels."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from forge.devtools.recorder import Recorder
from forge.formats.ggml import GGMLType
from forge.ops.experts import MAX_EXPERTS, MAX_USED, Experts, experts
from forge.ops.quant import Packed


def test_as_many_pairs_as_the_longest_prompts_have_fit_into_grids() -> None:
    """8,192 rows of 8 experts: one pair more than a grid has blocks in y. Gates and ups are two matrices."""
    device, rows, used, count = Recorder("gfx1100"), 8192, 8, 16
    first, gate = (Packed.empty(GGMLType[name], (count * 256, 512), device) for name in ("IQ3_XXS", "IQ2_XXS"))
    down = Packed.empty(GGMLType["Q4_K"], (count * 512, 256), device)
    matrices = Experts(gate, first, None, None, down, None, count)
    x, y = device.empty((rows, 512), np.float16), device.empty((rows, 512), np.float32)
    chosen, weights = device.empty((rows, used), np.int32), device.empty((rows, used), np.float32)
    experts(x, chosen, weights, matrices, y, activation="silu", weighs="output", order="any", partials="never")
    assert {entry.function for entry in device.entries} >= {"expert_act", "split_k_reduce"}


def test_a_grid_that_no_gpu_takes_is_refused() -> None:
    device = Recorder("gfx1100")
    arrays = device.empty((1,), np.float32), device.empty((1,), np.float16)
    device.run("expert_act", "expert_act", (1 << 20, 65_535), *arrays, 1, 0)
    for grid in ((1, 65_536), (1, 1, 65_536)):
        with pytest.raises(ValueError, match=r"expert_act: a grid of .* has more than 65535 in y or z"):
            device.run("expert_act", "expert_act", grid, *arrays, 1, 0)


def test_kernels_have_the_limits_of_experts_that_files_are_checked_for() -> None:
    kernels = Path(str(resources.files("forge"))) / "raw_kernels"
    text = "".join(path.read_text(encoding="utf-8") for path in kernels.rglob("*.hip"))
    found = set(re.findall(r"^#define (MAX_EXPERTS|MAX_USED) (\d+)", text, re.MULTILINE))
    assert found == {("MAX_EXPERTS", str(MAX_EXPERTS)), ("MAX_USED", str(MAX_USED))}
