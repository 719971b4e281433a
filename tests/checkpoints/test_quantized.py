"""Models that are quantized while they are read: types as llama.cpp's quantizer chooses, blocks of the gguf package."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_files import Blocks, write_gguf
from hf_models import unpacked
from table_rows import row

import forge
from forge.backend.numpy import NUMPY
from forge.checkpoints import open_checkpoint
from forge.checkpoints.recipes import RECIPES, new_types
from forge.checkpoints.retyped import quantized
from forge.errors import ParameterError, UnsupportedError
from forge.formats.blocks import Bytes
from forge.formats.checkpoint import Checkpoint, TensorInfo
from forge.formats.ggml import GGMLType, dequantize, nbytes
from forge.formats.quantize import quantize

DATA = Path(__file__).parents[1] / "data"
CHOSEN: dict[str, dict[str, Any]] = json.loads((DATA / "quantize" / "types.json").read_text())
SHAPES = {
    "17": (17, 0, 256),
    "80": (80, 0, 256),
    "8 experts": (9, 8, 256),
    "16 experts": (9, 16, 256),
    "96": (9, 0, 96),
}
LLAMA = DATA / "arch" / "llama" / "model.gguf"


class Listed(Checkpoint):
    """A model with names and shapes of tensors, which cannot be read."""

    def __init__(self, parts: dict[str, Any], layers: int, experts: int, width: int) -> None:
        self.path = Path("listed")
        self.metadata = {"general.architecture": "llama", "llama.block_count": layers, "llama.expert_count": experts}
        self.tensors = {}
        for part in parts:
            shape = (2, 256) if "ffn_down" in part else (2, width)
            shape = (experts, *shape) if "_exps" in part else shape
            is_outer = part in ("token_embd.weight", "output.weight", "output_norm.weight")
            for name in [part] if is_outer else [f"blk.{layer}.{part}" for layer in range(layers)]:
                type = GGMLType.F32 if "_norm" in name or "_inp" in name else GGMLType.F16
                shape = shape[-1:] if "_norm" in name else shape
                self.tensors[name] = TensorInfo(name, shape, type, nbytes(type, shape))

    def close(self) -> None: ...

    def check_path(self) -> None: ...

    def _read(self, info: TensorInfo, start: int, out: Bytes) -> None: ...


def expected(parts: dict[str, Any]) -> Iterator[tuple[str, list[int], str]]:
    for part, types in parts.items():
        for type, layers in ({types: []} if isinstance(types, str) else types).items():
            yield part, layers, type


@pytest.mark.parametrize("source", CHOSEN)
def test_types_are_those_that_llama_cpp_chooses(source: str) -> None:
    name, mixture = source.split(": ")
    if name in SHAPES:
        model: Checkpoint = Listed(CHOSEN[source], *SHAPES[name])
    else:
        model = open_checkpoint(DATA / name / "model.gguf")
    with model:
        types = {each: info.type for each, info in model.tensors.items()} | new_types(model, mixture)
    for part, layers, type in expected(CHOSEN[source]):
        names = [each for each in types if each == part or (each.startswith("blk.") and each.split(".", 2)[2] == part)]
        for each in names if not layers else [f"blk.{layer}.{part}" for layer in layers if layer >= 0]:
            with row(each):
                assert types[each].name == type


def test_a_dense_model_becomes_mxfp4_but_for_its_output() -> None:
    """Where llama.cpp's mixture of this name would make all of it Q8_0."""
    types = new_types(Listed(CHOSEN["17: Q8_0"], 17, 0, 256), "MXFP4")
    assert types.pop("output.weight") is GGMLType.Q8_0
    assert set(types.values()) == {GGMLType.MXFP4}
    assert len(types) == 1 + 7 * 17


def by_gguf(rows: np.ndarray, type: GGMLType) -> np.ndarray:
    return np.asarray(gguf.quantize(rows, gguf.GGMLQuantizationType(type.value)))


@pytest.mark.parametrize("recipe", ["Q8_0", "Q4_K_M", "MXFP4"])
def test_blocks_are_those_of_the_stored_weights(recipe: str) -> None:
    """Of all rows and of some, read by several threads, into given memory."""
    with open_checkpoint(LLAMA) as stored, quantized(stored, recipe, NUMPY) as model:
        changed = [name for name, info in model.tensors.items() if info.type is not stored.tensors[name].type]
        assert len(changed) == 2 + 3 * 7
        with ThreadPoolExecutor(4) as pool:
            read = dict(zip(changed, pool.map(model.raw, changed), strict=True))
        for name in changed:
            info, rows = model.tensors[name], stored.load_rows(name, slice(None))
            with row(name):
                assert info.nbytes == read[name].nbytes
                np.testing.assert_array_equal(read[name], by_gguf(rows, info.type))
                out = np.empty((3, read[name].shape[1]), np.uint8)
                np.testing.assert_array_equal(model.raw(name, slice(1, 4), out), read[name][1:4])
                np.testing.assert_array_equal(
                    model.load_rows(name, slice(2, 5)), dequantize(read[name], info.type)[2:5]
                )
        norm = "blk.0.attn_norm.weight"
        np.testing.assert_array_equal(model.raw(norm), stored.raw(norm))


def test_rows_are_quantized_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forge.checkpoints.retyped._STEP_WEIGHTS", 5 * 64)
    name = "blk.1.ffn_down.weight"
    with open_checkpoint(LLAMA) as stored, quantized(stored, "Q5_0", NUMPY) as model:
        np.testing.assert_array_equal(model.raw(name), quantize(stored.load_rows(name, slice(None)), GGMLType.Q5_0))


def test_a_model_is_quantized_while_it_is_loaded() -> None:
    with forge.load(LLAMA, device="cpu") as plain, forge.load(LLAMA, device="cpu", quantize="q8_0") as llm:
        assert (plain.quantize, llm.quantize) == (None, "Q8_0")
        assert repr(llm).startswith("<forge.LLM model.gguf as Q8_0: llama, ")
        expected = "quantize: Q8_0: 0.00 GB of weights as they are stored become 0.00 GB"
        assert any(note.startswith(expected) for note in llm.notes)
        exact, found = plain.logits([1, 2, 3]), llm.logits([1, 2, 3])
    assert 0.005 < np.abs(exact - found).max() < 0.3


def test_a_directory_of_safetensors_is_quantized(tmp_path: Path) -> None:
    with open_checkpoint(unpacked("phi3_window", tmp_path)) as stored:
        model = quantized(stored, "Q4_0", NUMPY)
        for name, info in model.tensors.items():
            if info.type.block_size > 1:
                expected = by_gguf(stored.load_rows(name, slice(None)), info.type)
                np.testing.assert_array_equal(model.raw(name), expected)
    with forge.load(tmp_path, device="cpu") as plain, forge.load(tmp_path, device="cpu", quantize="Q8_0") as llm:
        exact, found = plain.logits([5, 6, 7]), llm.logits([5, 6, 7])
    assert 1e-3 < np.sqrt(np.mean((exact - found) ** 2) / np.mean(exact**2)) < 0.03


def test_a_name_that_is_no_type_is_refused() -> None:
    for name in ("Q9", "F16", 4):
        with pytest.raises(ParameterError) as caught:
            forge.load(LLAMA, quantize=name)  # type: ignore[arg-type]
        assert str(caught.value) == f"quantize must be one of {', '.join(sorted(RECIPES))}, not {name!r}"


def tiny(path: Path, **tensors: Any) -> Path:
    metadata = {"general.architecture": "llama", "llama.block_count": 1}
    return write_gguf(path, metadata, {name.replace("__", "."): value for name, value in tensors.items()})


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    path = tiny(tmp_path / "q.gguf", output__weight=Blocks(8, (2, 32), bytes(68)))
    with open_checkpoint(path) as stored, pytest.raises(ParameterError) as caught:
        quantized(stored, "Q4_0", NUMPY)
    assert str(caught.value) == (
        f"{path}: the weights are quantized already (Q8_0): again makes them worse: "
        "leave quantize out, or use a model in F16, BF16 or F32"
    )


def test_weights_without_a_block_name_their_tensor(tmp_path: Path) -> None:
    rows = np.ones((4, 64), np.float16)
    rows[2, 5] = np.inf
    path = tiny(tmp_path / "inf.gguf", output__weight=rows, token_embd__weight=np.ones((4, 64), np.float16))
    with open_checkpoint(path) as stored, quantized(stored, "Q8_0", NUMPY) as model:
        model.raw("token_embd.weight")
        with pytest.raises(UnsupportedError) as caught:
            model.raw("output.weight")
    assert str(caught.value) == f"{path}: tensor 'output.weight': weights are not finite, or too large for Q8_0"
