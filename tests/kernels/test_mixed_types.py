"""Sublayers whose matrices have types that the kernels take in different ways, against float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf_files import Blocks, write_gguf
from harness import COMPILER, Harness

from forge import models
from forge.formats import gguf
from forge.models.batch import Batch
from forge.models.family import FEED_FORWARD, Sublayer
from forge.models.feed_forward import FeedForward
from forge.models.layer_tensors import LayerTensors
from forge.models.residual import ResidualStream
from forge.models.weights import Weights
from forge.ops.quant import QuantTensor

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no clang++: scripts/install-toolchain installs it")

MODEL = Path(__file__).parents[1] / "data" / "arch" / "llama" / "model.gguf"
WIDTH = 256


def test_a_gate_before_a_matrix_without_lines_is_stored_as_it_is(tmp_path: Path) -> None:
    """Products of such matrices read rows in no other order."""
    rng = np.random.default_rng(0)
    matrices = {
        name: QuantTensor.random(kind, WIDTH, WIDTH, rng, 1e-3)
        for name, kind in (("ffn_gate", "Q4_K"), ("ffn_up", "Q4_K"), ("ffn_down", "IQ3_XXS"))
    }
    stored = {f"blk.0.{name}.weight": Blocks(int(m.type), m.shape, m.blocks.tobytes()) for name, m in matrices.items()}
    path = write_gguf(tmp_path / "m.gguf", {}, stored | {"blk.0.ffn_norm.weight": np.ones(WIDTH, np.float32)})
    device = Harness(seed=1, tile="TILE_MMA", wave=32, groups=True)
    config = replace(models.read_config(gguf.read(MODEL)), width=WIDTH, layer_ffn_widths=(WIDTH,))
    weights = Weights(gguf.read(path), device, range(0), None)
    tensors = LayerTensors(weights, config, Sublayer("gated", FEED_FORWARD), 0, 0, is_deterministic=False)
    x = rng.standard_normal((40, WIDTH)).astype(np.float32)
    stream = ResidualStream(device.asarray(x), leaves_pending=False)
    batch = Batch(None, None, None, None, (), None)  # no row has an adapter, and the rest is not read
    FeedForward(tensors, None)(stream, batch, hook=None)
    exact = x.astype(np.float64)
    normed = exact / np.sqrt((exact**2).mean(axis=1, keepdims=True) + config.norm_eps)
    gate, up, down = (matrix.dequantize().astype(np.float64) for matrix in matrices.values())
    first = normed @ gate.T
    added = first / (1 + np.exp(-first)) * (normed @ up.T) @ down.T
    np.testing.assert_allclose(np.asarray(stream.x) - exact, added, rtol=2e-3, atol=1e-2 * added.std())
    assert {"matmul", "matmul_wgmma_quant_many"} <= {variant.file for variant in device.variants}
