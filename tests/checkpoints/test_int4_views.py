"""Directories with matrices of GPTQ, AWQ and compressed-tensors: transformers' logits of the weights that they mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import DATA as ALL_DATA
from hf_models import int4_directory, unpacked
from safetensors_files import safetensors_bytes
from table_rows import row

import forge
from forge.checkpoints import open_checkpoint
from forge.errors import ForgeError, FormatError, UnsupportedError
from forge.formats import safetensors

DATA = ALL_DATA / "int4"
TYPES = {"llama_gptq": "Q4_G128", "qwen2_awq": "Q4_G128", "qwen2_gptq_v2": "Q4_G32", "llama_compressed": "Q4_G128"}
Tensors = dict[str, tuple[str, np.ndarray]]


def tensors_of(path: Path) -> Tensors:
    """Dtypes, and arrays of integers of their size."""
    found = {}
    with safetensors.read_directory(path) as files:
        for name, info in files.tensors.items():
            array = np.empty(info.shape, f"<u{info.nbytes // max(int(np.prod(info.shape)), 1)}")
            files.read(name, 0, array)
            found[name] = info.dtype, array
    return found


def nibbles(words: np.ndarray, axis: int) -> np.ndarray:
    moved = np.moveaxis(words, axis, -1)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
    return np.moveaxis(moved.reshape(*moved.shape[:-2], -1), -1, axis).astype(np.int64)


@pytest.mark.parametrize(
    "name", ["llama_gptq", "qwen2_awq", *(pytest.param(name, marks=pytest.mark.slow) for name in list(TYPES)[2:])]
)
def test_logits_equal_transformers_at_every_position(name: str, tmp_path: Path) -> None:
    golden = np.load(DATA / name / "logits.npz")
    with forge.load(int4_directory(name, tmp_path), device="cpu") as llm:
        found = llm.logits(golden["ids"].tolist())
    np.testing.assert_allclose(found, golden["logits"], rtol=0, atol=5e-4)


def test_matrices_stay_in_four_bits_with_their_rows_in_the_order_of_the_engine(tmp_path: Path) -> None:
    """Queries of a llama, whose heads have neighbours where the file has halves; codes, scales and zeros alike."""
    path = int4_directory("llama_gptq", tmp_path)
    arrays = {name: array for name, (_, array) in tensors_of(path).items()}
    base = "model.layers.1.self_attn.q_proj"
    codes, zeros = nibbles(arrays[f"{base}.qweight"], 0), nibbles(arrays[f"{base}.qzeros"], 1) + 1
    scales = arrays[f"{base}.scales"].view(np.float16).astype(np.float64)
    stored = (scales * (codes.reshape(1, 128, 128) - zeros[:, None])).reshape(128, 128).T  # (N, K), a group of 128
    expected = stored.reshape(4, 2, 16, 128).swapaxes(1, 2).reshape(128, 128)
    with open_checkpoint(path) as file:
        info = file.tensors["blk.1.attn_q.weight"]
        assert (info.type.name, info.shape, info.nbytes) == ("Q4_G128", (128, 128), 128 * 68)
        np.testing.assert_array_equal(file.load("blk.1.attn_q.weight"), expected)
        np.testing.assert_array_equal(file.load_rows("blk.1.attn_q.weight", slice(5, 44)), expected[5:44])
        assert not any(name.endswith(".bias") for name in file.tensors)  # zeros that AutoGPTQ writes


@pytest.mark.parametrize(("name", "type"), TYPES.items())
def test_what_is_a_matrix_of_four_bits(name: str, type: str, tmp_path: Path) -> None:
    with open_checkpoint(int4_directory(name, tmp_path)) as file:
        found = {tensor: info.type.name for tensor, info in file.tensors.items() if len(info.shape) == 2}
    floats = {"token_embd.weight"} | ({"output.weight"} - found.keys())
    assert {tensor for tensor, kind in found.items() if kind == type} == found.keys() - floats
    assert ("output.weight" in found) == (name == "qwen2_gptq_v2")
    assert found["token_embd.weight"] == "F16"


def test_a_bias_that_is_zeros_in_one_layer_stays(tmp_path: Path) -> None:
    path = int4_directory("qwen2_awq", tmp_path)
    tensors = tensors_of(path)
    tensors["model.layers.0.self_attn.q_proj.bias"][1][:] = 0
    (path / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    with open_checkpoint(path) as file:
        assert not file.load("blk.0.attn_q.bias").any()
        assert file.load("blk.1.attn_q.bias").any()


def test_experts_in_four_bits_compute_what_their_weights_do(tmp_path: Path) -> None:
    """Gates and ups of all experts of a layer are one tensor of blocks, downs beside them floats."""
    paths = [unpacked("qwen2moe", tmp_path / name) for name in ("floats", "int4")]
    floats, packed = tensors_of(paths[0]), tensors_of(paths[1])
    for name in [name for name in floats if "experts." in name and "down_proj" not in name and "shared" not in name]:
        weights = floats[name][1].view(np.float16).astype(np.float64).reshape(16, 2, 32)  # groups of 32
        scales = (np.ptp(weights, axis=2) / 15).astype(np.float16)
        zeros = np.round(-weights.min(axis=2) / scales).astype(np.int64)
        codes = np.clip(np.round(weights / scales[..., None]) + zeros[..., None], 0, 15).astype(np.int64)
        meant = (scales[..., None].astype(np.float64) * (codes - zeros[..., None])).reshape(16, 64)
        floats[name] = "F32", meant.astype(np.float32).view(np.uint32)
        base = name.removesuffix("weight")
        packed[f"{base}qweight"] = "I32", awq_words(codes.reshape(16, 64).T)
        packed[f"{base}qzeros"], packed[f"{base}scales"] = (
            ("I32", awq_words(zeros.T)),
            ("F16", scales.T.view(np.uint16)),
        )
        del packed[name]
    config = json.loads((paths[1] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32}
    (paths[1] / "config.json").write_text(json.dumps(config))
    found = []
    for path, tensors in zip(paths, (floats, packed), strict=True):
        (path / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        with forge.load(path, device="cpu") as llm:
            found.append(llm.logits(list(range(30))))
    with open_checkpoint(paths[1]) as file:
        assert file.tensors["blk.0.ffn_up_exps.weight"].type.name == "Q4_G32"
    np.testing.assert_array_equal(*found)


def awq_words(codes: np.ndarray) -> np.ndarray:
    """(A, B) codes as (A, B / 8): nibbles of a word are columns 0, 2, 4, 6, 1, 3, 5, 7."""
    eights = codes.reshape(len(codes), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
    return np.asarray((eights << np.arange(0, 32, 4)).sum(axis=-1)).astype(np.uint32)


# Directories that are refused


def settings(**changes: Any) -> Callable[[dict[str, Any], Tensors], None]:
    def edit(config: dict[str, Any], tensors: Tensors) -> None:
        config["quantization_config"] |= changes

    return edit


def weights(**changes: Any) -> Callable[[dict[str, Any], Tensors], None]:
    def edit(config: dict[str, Any], tensors: Tensors) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"] |= changes

    return edit


def without(end: str) -> Callable[[dict[str, Any], Tensors], None]:
    def edit(config: dict[str, Any], tensors: Tensors) -> None:
        del tensors[f"model.layers.0.mlp.up_proj.{end}"]

    return edit


def array(end: str, dtype: str, value: np.ndarray) -> Callable[[dict[str, Any], Tensors], None]:
    def edit(config: dict[str, Any], tensors: Tensors) -> None:
        tensors[f"model.layers.0.mlp.up_proj.{end}"] = dtype, value

    return edit


def second_group(config: dict[str, Any], tensors: Tensors) -> None:
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}}


LLAMA, QWEN, PACKED = "llama_gptq", "qwen2_awq", "llama_compressed"
UP = "'model.layers.0.mlp.up_proj': "
BAD: dict[str, tuple[str, Callable[[dict[str, Any], Tensors], None], type[ForgeError], str]] = {
    "a method that is not known": (LLAMA, settings(quant_method="aqlm"), UnsupportedError, "aqlm"),
    "three bits": (LLAMA, settings(bits=3), UnsupportedError, "weights of 3 bits are not supported, those of 4 are"),
    "eight bits": (LLAMA, settings(bits=8), UnsupportedError, "weights of 8 bits"),
    "eight bits of AWQ": (QWEN, settings(bits=8), UnsupportedError, "weights of 8 bits"),
    "eight bits of compressed-tensors": (PACKED, weights(num_bits=8), UnsupportedError, "weights of 8 bits"),
    "bits that are text": (LLAMA, settings(bits="4"), FormatError, "should say its bits, not '4'"),
    "no bits": (QWEN, settings(bits=None), FormatError, "should say its bits"),
    "groups that are text": (LLAMA, settings(group_size="128"), FormatError, "group_size' should be a whole number"),
    "groups of no size": (QWEN, settings(group_size=None), FormatError, "group_size' should be a whole number"),
    "groups of 0": (QWEN, settings(group_size=0), FormatError, "group_size' should be a whole number"),
    "groups of true": (LLAMA, settings(group_size=True), FormatError, "group_size' should be a whole number"),
    "groups of another size": (
        LLAMA,
        settings(group_size=64),
        FormatError,
        r"qzeros has shape \(\d, \d+\), not \(\d, ",
    ),
    "groups that no row is whole": (LLAMA, settings(group_size=96), FormatError, "no groups of 96"),
    "Marlin's order": (LLAMA, settings(checkpoint_format="marlin"), UnsupportedError, "checkpoint_format = 'marlin'"),
    "Marlin's order, as once said": (LLAMA, settings(is_marlin_format=True), UnsupportedError, "marlin"),
    "Marlin's order, as GPTQModel may say": (LLAMA, settings(format="marlin"), UnsupportedError, "= 'marlin'"),
    "AWQ for one row, as GPTQModel says": (QWEN, settings(version=None, format="gemv_fast"), UnsupportedError, "gemv"),
    "bits by module": (LLAMA, settings(dynamic={"+:.*up.*": {"bits": 8}}), UnsupportedError, "dynamic"),
    "rules that are a list": (LLAMA, settings(dynamic=[1]), UnsupportedError, "dynamic"),
    "AWQ for one row": (QWEN, settings(version="gemv"), UnsupportedError, "version = 'gemv' is not supported"),
    "AWQ of its authors": (QWEN, settings(backend="llm-awq"), UnsupportedError, "llm-awq"),
    "floats of four bits": (PACKED, weights(type="float"), UnsupportedError, "weights.type = 'float'"),
    "blocks": (PACKED, weights(strategy="block"), UnsupportedError, "weights.strategy = 'block'"),
    "no groups of modules": (PACKED, settings(config_groups={}), FormatError, "should be an object of groups"),
    "a group without weights": (
        PACKED,
        settings(config_groups={"a": {}}),
        FormatError,
        "a.weights' should be an object",
    ),
    "groups of two sizes": (PACKED, second_group, UnsupportedError, "groups of different sizes, -1, 64, are not"),
    "no zeros beside codes that have some": (
        PACKED,
        weights(symmetric=False),
        FormatError,
        "weight_zero_point is missing",
    ),
    "zeros beside codes that have none": (
        *(PACKED, array("weight_zero_point", "I32", np.zeros((32, 1), np.uint32)), FormatError),
        "has weight_zero_point, and config.json says symmetric",
    ),
    "matrices to multiply by": (
        PACKED,
        settings(transform_config={"config_groups": {"u": {"type": "hadamard"}}}),
        UnsupportedError,
        "transform_config = .* is not supported",
    ),
    "weights without zeros": (
        PACKED,
        settings(sparsity_config={"format": "sparse-24-bitmask"}),
        UnsupportedError,
        "sparsity_config = .* is not supported",
    ),
    "no codes": (LLAMA, without("qweight"), FormatError, f"{UP}qweight is missing"),
    "no zeros": (QWEN, without("qzeros"), FormatError, f"{UP}qzeros is missing"),
    "no scales": (PACKED, without("weight_scale"), FormatError, f"{UP}weight_scale is missing"),
    "floats beside codes": (
        *(LLAMA, array("weight", "F16", np.zeros((256, 128), np.uint16)), FormatError),
        "two tensors 'layers.0.mlp.up_proj.weight'",
    ),
    "a group that is not there": (
        *(LLAMA, array("g_idx", "I32", np.ones(128, np.uint32)), FormatError),
        "g_idx names groups that are not there",
    ),
    "rows of another number": (
        *(PACKED, array("weight_packed", "I32", np.zeros((8, 16), np.uint32)), FormatError),
        r"weight_scale has shape \(256, 1\), not \(8, 1\)",
    ),
}


def test_directories_that_no_kernel_multiplies_are_refused(tmp_path: Path) -> None:
    """In one line that names the file, when they are opened."""
    kept = {name: (int4_directory(name, tmp_path / name), tensors_of(DATA / name)) for name in (LLAMA, QWEN, PACKED)}
    for title, (name, edit, kind, message) in BAD.items():
        with row(title):
            path, tensors = kept[name][0], dict(kept[name][1])
            config = json.loads((DATA / name / "config.json").read_text())
            edit(config, tensors)
            (path / "config.json").write_text(json.dumps(config))
            (path / "model.safetensors").write_bytes(safetensors_bytes(tensors))
            with pytest.raises(ForgeError, match=message) as caught:
                open_checkpoint(path)
            assert type(caught.value) is kind
            assert str(caught.value).startswith(str(path))
            assert "\n" not in str(caught.value)


def test_act_order_is_refused_by_name(tmp_path: Path) -> None:
    path = int4_directory("qwen2_gptq_v2", tmp_path)
    tensors = tensors_of(path)
    tensors["model.layers.1.mlp.down_proj.g_idx"][1][:] = np.arange(256) % 8
    (path / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    with pytest.raises(UnsupportedError, match=r"down_proj': its columns are not in the order .*desc_act false"):
        open_checkpoint(path)
