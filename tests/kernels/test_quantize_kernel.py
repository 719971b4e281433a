"""Weights that a device quantizes while a model is loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf_files import write_gguf
from harness import COMPILER, Harness

from forge.backend.numpy import NUMPY
from forge.checkpoints import open_checkpoint
from forge.checkpoints.retyped import Retyped, quantized
from forge.formats.ggml import GGMLType
from forge.formats.quantize import is_sound
from forge.formats.quantize import quantize as make
from forge.models.weights import Weights
from forge.ops.quant import Packed, split
from forge.ops.quantize import quantize, quantize_planes

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no clang++: scripts/install-toolchain installs it")

LLAMA = Path(__file__).parents[1] / "data" / "arch" / "llama" / "model.gguf"


def test_a_device_reads_the_blocks_that_numpy_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows at a time, of which the last ones are fewer."""
    monkeypatch.setattr("forge.checkpoints.retyped._GPU_STEP_WEIGHTS", 5 * 64)
    name = "blk.0.attn_q.weight"
    with open_checkpoint(LLAMA) as stored:
        on_device, on_host = (quantized(stored, "Q8_0", backend) for backend in (Harness(32), NUMPY))
        np.testing.assert_array_equal(on_device.raw(name), on_host.raw(name))


@pytest.mark.parametrize("type", ["Q8_0", "Q4_1", "MXFP4", "Q4_K", "Q6_K"])
def test_blocks_of_weights_that_are_not_finite_say_so(type: str) -> None:
    """Those beside them are as they would be."""
    rows = np.ones((3, 512), np.float32)
    rows[1, 300], rows[2, 7] = np.inf, np.nan
    for stored in (rows, -rows):
        device = Harness(64)
        options = {"stored": "F32", "type": type}
        blocks = device.to_numpy(device.launch(quantize, (device.asarray(stored.view(np.uint8)),), options))
        size = GGMLType[type].type_size
        sound = [is_sound(block[None], GGMLType[type]) for block in blocks.reshape(-1, size)]
        per_row = len(sound) // 3
        bad = {per_row + 300 // (512 // per_row), 2 * per_row}
        assert [i for i, each in enumerate(sound) if not each] == sorted(bad)
        for row in range(3):
            planes = Packed.empty(GGMLType[type], (1, 512), device).planes
            refused = device.asarray(np.zeros(1, np.int32))
            quantize_planes(device.asarray(stored[row : row + 1].view(np.uint8)), *planes, refused, **options)
            assert device.to_numpy(refused)[0] == (row > 0)


def test_planes_come_in_pieces_that_begin_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bytes before a piece are no multiple of a word."""
    monkeypatch.setattr("forge.models.uploads._PIECE_BYTES", 3 * 4 * 96 + 256)
    rows = np.random.default_rng(0).standard_normal((7, 96)).astype(np.float32)
    write_gguf(tmp_path / "model.gguf", {"general.architecture": "llama"}, {"a.weight": rows})
    device = Harness(32)
    with open_checkpoint(tmp_path / "model.gguf") as stored:
        file = Retyped(stored, {"a.weight": GGMLType.MXFP4}, "quantize", device)
        with Weights(file, device, range(0), None) as weights:
            found = weights.matrix({"a.weight": 7}, cols=96)
    for one, expected in zip(found.planes, split(GGMLType.MXFP4, make(rows, GGMLType.MXFP4)), strict=True):
        np.testing.assert_array_equal(one if one is None else device.to_numpy(one), expected)
