"""What weights of a Hugging Face directory are stored as: BF16, FP8 with scales, MXFP4, shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import unpacked
from numpy.typing import NDArray
from safetensors_files import safetensors_bytes, write_model

import forge
from forge.checkpoints import open_checkpoint
from forge.checkpoints.scaled import Fp8
from forge.errors import FormatError
from forge.formats import safetensors
from forge.formats.ggml import GGMLType

Tensors = dict[str, Any]
IDS = [5, 9, 17, 3, 200, 44]
_DTYPES = {"F32": "<f4", "F16": "<f2"}


def tensors_of(directory: Path) -> Tensors:
    """Arrays of a directory's one file."""
    with safetensors.read_directory(directory) as files:
        found = {name: np.empty(info.shape, _DTYPES[info.dtype]) for name, info in files.tensors.items()}
        for name, out in found.items():
            files.read(name, 0, out)
    return found


def write(directory: Path, tensors: Tensors, **settings: Any) -> Path:
    """Put these tensors, and settings of config.json, into a directory."""
    (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    config = json.loads((directory / "config.json").read_text()) | settings
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def bf16(values: NDArray[Any]) -> NDArray[np.uint16]:
    """The upper halves: nearest numbers below in size."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def e4m3(code: int) -> float:
    """One number of FP8, by the definition in OCP's 8-bit floating point specification."""
    sign, exponent, fraction = code >> 7, code >> 3 & 15, code & 7
    if exponent == 15 and fraction == 7:
        return float("nan")
    size = fraction * 2.0**-9 if exponent == 0 else (8 + fraction) * 2.0 ** (exponent - 10)
    return -size if sign else size


E4M3 = np.array([e4m3(code) for code in range(256)], np.float32)


def test_numbers_of_fp8() -> None:
    known = {0x38: 1.0, 0x40: 2.0, 0x7E: 448.0, 0x01: 2.0**-9, 0x08: 2.0**-6, 0xB8: -1.0, 0x3C: 1.5, 0xFE: -448.0}
    assert {code: e4m3(code) for code in known} == known


@pytest.mark.parametrize(
    ("kind", "shape", "scales"),
    [
        ("matrix", (200, 300), ()),
        ("matrix", (200, 300), (1,)),
        ("row", (200, 300), (200, 1)),
        ("row", (200, 300), (200,)),
        ("block", (200, 300), (2, 3)),
        ("block", (3, 130, 40), (3, 2, 1)),
        ("matrix", (3, 130, 40), (3, 1, 1)),
        ("row", (3, 130, 40), (3, 130, 1)),
    ],
)
def test_fp8_is_its_number_times_its_scale(
    kind: str, shape: tuple[int, ...], scales: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One scale of a matrix, one of each row, or one of each block of 128 by 128."""
    monkeypatch.setattr("forge.checkpoints.scaled.STEP_BYTES", 9000)
    random = np.random.default_rng(3)
    codes = random.integers(0, 127, shape, np.uint8) | random.integers(0, 2, shape, np.uint8) << 7
    factors = np.asarray(random.random(scales, np.float32) + 0.5, np.float32)
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes({"w": ("F8_E4M3", codes), "w_scale_inv": factors}))
    rows, cols = shape[-2:]
    full = {
        "matrix": lambda: factors.reshape(*shape[:-2], 1, 1) if factors.size > 1 else factors,
        "row": lambda: factors.reshape(*shape[:-1], 1),
        "block": lambda: np.repeat(np.repeat(factors, 128, -2), 128, -1)[..., :rows, :cols],
    }
    expected = E4M3[codes] * full[kind]()
    with safetensors.read_file(path) as files:
        view = Fp8(files, "w", "w_scale_inv")
        np.testing.assert_array_equal(view.floats(), expected)
        part = np.empty((60, view.row_bytes), np.uint8)
        view.read(77, part)
        np.testing.assert_array_equal(part.view(np.float32), expected.reshape(-1, shape[-1])[77:137])


def test_fp8_with_scales_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    codes = np.zeros((200, 300), np.uint8)
    path.write_bytes(safetensors_bytes({"w": ("F8_E4M3", codes), "w_scale": np.ones((2, 2), np.float32)}))
    with safetensors.read_file(path) as files, pytest.raises(FormatError, match="which does not fit"):
        Fp8(files, "w", "w_scale")


def logits(directory: Path) -> NDArray[np.float32]:
    with forge.load(directory, context=64) as llm:
        return llm.logits(IDS)


def test_bf16_matrices_stay_and_vectors_are_widened(tmp_path: Path) -> None:
    """The same numbers as BF16 and as float32 give the same logits."""
    small, whole = (unpacked("qwen3", tmp_path / name) for name in ("bf16", "f32"))
    bits = {name: bf16(weight) for name, weight in tensors_of(small).items()}
    write(small, {name: ("BF16", value) for name, value in bits.items()})
    write(whole, {name: widened(value) for name, value in bits.items()})
    with open_checkpoint(small) as file:
        assert {info.type for name, info in file.tensors.items() if len(info.shape) == 2} == {GGMLType.BF16}
        assert {info.type for name, info in file.tensors.items() if len(info.shape) == 1} == {GGMLType.F32}
        name = "model.layers.1.mlp.down_proj.weight"
        np.testing.assert_array_equal(file.raw("blk.1.ffn_down.weight").view(np.uint16), bits[name])
    np.testing.assert_array_equal(logits(small), logits(whole))


def test_fp8_gives_the_logits_of_its_numbers(tmp_path: Path) -> None:
    small, whole = (unpacked("qwen3", tmp_path / name) for name in ("fp8", "f32"))
    stored: Tensors = {}
    numbers: Tensors = {}
    random = np.random.default_rng(5)
    for name, weight in tensors_of(small).items():
        if name.endswith("_proj.weight"):
            codes, scale = random.integers(0, 0x58, weight.shape, np.uint8), np.full((1, 1), 0.01, np.float32)
            stored |= {name: ("F8_E4M3", codes), name + "_scale_inv": scale}
            numbers[name] = E4M3[codes] * scale
        else:
            stored[name] = numbers[name] = weight
    method = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    write(small, stored, quantization_config=method)
    write(whole, numbers)
    np.testing.assert_array_equal(logits(small), logits(whole))


FP4 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0], np.float32)


def test_mxfp4_keeps_every_number(tmp_path: Path) -> None:
    """Two neighbours in a byte, the first in its low half, and gates and ups in turn, as transformers unpacks them."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "layer_types": ["sliding_attention"], "num_local_experts": 3}
    packed, plain = (unpacked("gpt_oss", tmp_path / name) for name in ("packed", "plain"))
    random = np.random.default_rng(7)

    def wide(name: str, weight: NDArray[Any]) -> NDArray[Any]:
        """A weight of the model with other sizes."""
        shape = [{48: 64, 6: 3}.get(side, side) for side in weight.shape]
        return (random.standard_normal(shape) * 0.1).astype(weight.dtype)

    common = {
        name: wide(name, weight)
        for name, weight in tensors_of(packed).items()
        if not name.startswith(("model.layers.1", "model.layers.2"))
        if not name.endswith(("gate_up_proj", "down_proj"))
    }
    stored, numbers = dict(common), dict(common)
    for name, rows, cols in (("gate_up_proj", 64, 64), ("down_proj", 64, 32)):
        blocks = random.integers(0, 256, (3, rows, cols // 32, 16), np.uint8)
        scales = random.integers(122, 127, (3, rows, cols // 32), np.uint8)
        full = f"model.layers.0.mlp.experts.{name}"
        stored |= {f"{full}_blocks": blocks, f"{full}_scales": scales}
        values = np.stack((FP4[blocks & 15], FP4[blocks >> 4]), -1).reshape(3, rows, cols // 32, 32)
        values = values * np.exp2(scales.astype(np.float32) - 127)[..., None]
        numbers[full] = values.reshape(3, rows, cols).transpose(0, 2, 1).astype(np.float16)
    write(packed, stored, **sizes, quantization_config={"quant_method": "mxfp4"})
    write(plain, numbers, **sizes)
    with open_checkpoint(packed) as file, open_checkpoint(plain) as other:
        for name in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
            full = f"blk.0.{name}.weight"
            assert file.tensors[full].type is GGMLType.MXFP4
            np.testing.assert_array_equal(file.load(full), other.load(full))
    np.testing.assert_allclose(logits(packed), logits(plain), rtol=0, atol=1e-5)


def test_shards_are_one_model(tmp_path: Path) -> None:
    one, many = (unpacked("qwen3moe", tmp_path / name) for name in ("one", "many"))
    tensors = tensors_of(one)
    names = sorted(tensors)
    (many / "model.safetensors").unlink()
    shards = {f"model-0000{i + 1}-of-00003.safetensors": {n: tensors[n] for n in names[i::3]} for i in range(3)}
    write_model(many, shards)
    with open_checkpoint(one) as first, open_checkpoint(many / "model-00002-of-00003.safetensors") as second:
        assert first.metadata.keys() == second.metadata.keys()
        assert first.tensors == second.tensors
        for name in first.tensors:
            np.testing.assert_array_equal(first.raw(name), second.raw(name))
