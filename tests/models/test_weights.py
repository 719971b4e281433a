"""Weights for a device: what is joined and converted, by threads and in parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import Blocks, write_gguf
from numpy.typing import NDArray

from forge.backend.numpy import NumpyBackend
from forge.checkpoints.retyped import Retyped
from forge.errors import UnsupportedError
from forge.formats import gguf
from forge.formats.ggml import GGMLType, dequantize
from forge.formats.quantize import quantize
from forge.models.weights import Weights
from forge.ops.quant import QuantTensor, split


class Device(NumpyBackend):
    """A GPU whose memory is the host's."""

    is_gpu = True


@pytest.fixture
def taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], Weights]:
    """Weights of these tensors, on their way in pieces of five rows, which threads read three rows at a time."""
    monkeypatch.setattr("forge.models.uploads._TASK_BYTES", 3 * 128)
    monkeypatch.setattr("forge.models.uploads._PIECE_BYTES", 5 * 128 + 256)

    def take(tensors: dict[str, Any]) -> Weights:
        write_gguf(tmp_path / "model.gguf", {"general.architecture": "llama"}, tensors)
        return Weights(gguf.read(tmp_path / "model.gguf"), Device(), range(0), None)

    return take


def numbers(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(shape[0]).standard_normal(shape).astype(np.float32)


def test_matrices_lie_one_behind_the_other_as_float16(taken: Any) -> None:
    tensors = {"a.weight": numbers(7, 64), "b.weight": numbers(5, 64)}
    found = taken(tensors).matrix({"a.weight": 7, "b.weight": 5}, cols=64)
    np.testing.assert_array_equal(found, np.concatenate([*tensors.values()]).astype(np.float16))


def test_tensors_of_an_expert_lie_together(taken: Any) -> None:
    tensors = {"gate.weight": numbers(3, 4, 64), "up.weight": numbers(3, 5, 64)}
    found = taken(tensors).experts({"gate.weight": 4, "up.weight": 5}, count=3, cols=64)
    expected = np.concatenate([*tensors.values()], axis=1).reshape(27, 64)
    np.testing.assert_array_equal(found, expected.astype(np.float16))


def test_a_weight_beyond_float16_is_refused_with_its_tensor(taken: Any) -> None:
    tensors = {"a.weight": numbers(7, 64)}
    tensors["a.weight"][5, 9] = 7e4
    with pytest.raises(UnsupportedError, match=r"tensor 'a\.weight' has weights beyond float16"):
        taken(tensors).matrix({"a.weight": 7}, cols=64)


def bfloat16(values: NDArray[np.float32]) -> tuple[Blocks, NDArray[np.float32]]:
    """Numbers cut to bfloat16, as a file has them and as float32."""
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    return Blocks(GGMLType.BF16.value, values.shape, bits.tobytes()), (bits.astype(np.uint32) << 16).view(np.float32)


def test_bfloat16_becomes_float16_on_the_device(taken: Any) -> None:
    (a, of_a), (b, of_b) = bfloat16(numbers(7, 64)), bfloat16(numbers(5, 64))
    mixed = numbers(2, 64)
    weights = taken({"a.weight": a, "b.weight": b, "c.weight": mixed})
    with weights:
        found = weights.matrix({"a.weight": 7, "b.weight": 5}, cols=64)
        beside_others = weights.matrix({"b.weight": 5, "c.weight": 2}, cols=64)
    np.testing.assert_array_equal(found, np.concatenate([of_a, of_b]).astype(np.float16))
    np.testing.assert_array_equal(beside_others, np.concatenate([of_b, mixed]).astype(np.float16))


def test_bfloat16_beyond_float16_is_refused_with_its_tensors(taken: Any) -> None:
    values = numbers(7, 64)
    values[5, 9] = 7e4
    (a, _), (b, _) = bfloat16(values), bfloat16(numbers(5, 64))
    weights = taken({"a.weight": a, "b.weight": b})
    with (
        pytest.raises(UnsupportedError, match=r"tensor 'a\.weight' or 'b\.weight' has weights beyond float16"),
        weights,
    ):
        weights.matrix({"a.weight": 7, "b.weight": 5}, cols=64)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q6_K"])
def test_planes_of_blocks_come_in_pieces(taken: Any, kind: str) -> None:
    rng = np.random.default_rng(1)
    tensors = [QuantTensor.random(kind, rows, 256, rng) for rows in (7, 5)]
    of_file = {f"{n}.weight": Blocks(t.type.value, t.shape, t.blocks.tobytes()) for n, t in enumerate(tensors)}
    found = taken(of_file).matrix({"0.weight": 7, "1.weight": 5}, cols=256)
    planes = split(tensors[0].type, np.concatenate([t.blocks for t in tensors]))
    for one, expected in zip(found.planes, planes, strict=True):
        np.testing.assert_array_equal(one, expected)


@pytest.mark.parametrize("stored", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("recipe", ["Q8_0", "Q6_K"])
def test_weights_are_quantized_on_the_device(taken: Any, recipe: str, stored: str, monkeypatch: Any) -> None:
    """What was stored is uploaded in pieces, and becomes planes there: the host makes no blocks."""
    values, type = [numbers(rows, 256) for rows in (7, 5)], GGMLType[recipe]
    of_file = [quantize(each, GGMLType[stored]) for each in values]
    tensors = {
        f"blk.0.ffn_{part}.weight": Blocks(GGMLType[stored].value, each.shape, blocks.tobytes())
        for part, each, blocks in zip(("gate", "up"), values, of_file, strict=True)
    }
    weights = taken(tensors)
    weights.file = Retyped(weights.file, dict.fromkeys(tensors, type), "quantize", weights.backend)
    monkeypatch.setattr(Retyped, "_read", None)
    with weights:
        found = weights.matrix({"blk.0.ffn_gate.weight": 7, "blk.0.ffn_up.weight": 5}, cols=256)
    blocks = quantize(np.concatenate([dequantize(each, GGMLType[stored]) for each in of_file]), type)
    for one, expected in zip(found.planes, split(type, blocks), strict=True):
        np.testing.assert_array_equal(one, expected)


def test_weights_without_a_block_are_refused_with_their_tensor(taken: Any) -> None:
    tensors = {"a.weight": numbers(7, 64)}
    tensors["a.weight"][5, 9] = np.inf
    weights = taken(tensors)
    weights.file = Retyped(weights.file, {"a.weight": GGMLType.Q8_0}, "quantize", weights.backend)
    message = r"tensor 'a\.weight': weights are not finite, or too large for Q8_0$"
    with pytest.raises(UnsupportedError, match=message) as caught, weights:
        weights.matrix({"a.weight": 7}, cols=64)
    assert caught.value.parameter == "quantize"
