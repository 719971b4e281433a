"""`forge.convert` against llama.cpp's converter, the `gguf` package's quantizer, and the bytes of the file itself."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
import pytest
from gguf_files import Typed
from hf_models import ARCH, NAMES, int4_directory, unpacked

import forge
from forge.checkpoints import gguf_writer, open_checkpoint
from forge.checkpoints.converting import _FILE_TYPES, check_type, retyped
from forge.checkpoints.recipes import RECIPES
from forge.errors import ForgeError, ParameterError, UnsupportedError
from forge.formats import gguf as forge_gguf
from forge.formats import int4
from forge.formats.checkpoint import Checkpoint, TensorInfo
from forge.formats.ggml import GGMLType

LLAMA = ARCH / "llama/model.gguf"
QUICK = {"gemma3", "gpt_oss"}
OURS_ALONE = {"general.name", "general.size_label", "falcon.context_length", "GGUF.kv_count"}
"""What the converter takes from the name of the directory, and its context for all Falcons."""
BY_FAMILY = {
    "gemma": {"tokenizer.ggml.add_space_prefix", "tokenizer.ggml.eot_token_id"},
    "gemma2": {key for key in gguf.GGUFReader(ARCH / "gemma2/model.gguf").fields if "tokenizer.ggml" in key}
    | {"tokenizer.ggml.eot_token_id"},  # its golden has another tokenizer
    "glm4moe": {"tokenizer.ggml.eot_token_id", "tokenizer.ggml.unknown_token_id"},
    "gptneox": {"general.file_type"},
    "gptneox_sequential": {"general.file_type"},
    "hunyuan": {"tokenizer.ggml.eos_token_id"},
    "muse_glimmer": {"tokenizer.ggml.eot_token_id"},
    "phi2": {"tokenizer.ggml.add_bos_token"},
}
"""What the converter writes for a family whatever the directory says, and what is its default."""


def fields(path: Path) -> dict[str, Any]:
    """Values with their types, as the `gguf` package reads them."""
    return {key: (field.types, field.contents()) for key, field in gguf.GGUFReader(path).fields.items()}


def test_a_copy_of_a_gguf_file_is_the_same_bytes(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    written = forge.convert(LLAMA, tmp_path / "a.gguf", progress=lambda *report: seen.append(report))
    assert (tmp_path / "a.gguf").read_bytes() == LLAMA.read_bytes()
    assert written == forge.Converted(tmp_path / "a.gguf", LLAMA.stat().st_size, ())
    assert seen[-1] == ("writing a.gguf", 681_728, 681_728)


def test_a_file_without_tensors_is_copied_too(tmp_path: Path) -> None:
    source = ARCH.parent / "vocab/ggml-vocab-llama-spm.gguf"
    forge.convert(source, tmp_path / "a.gguf", progress=False)
    assert (tmp_path / "a.gguf").read_bytes() == source.read_bytes()


def test_values_of_all_types_keep_them(tmp_path: Path) -> None:
    keys = {
        "general.architecture": "llama",
        "general.alignment": 64,
        **{f"t{kind}": Typed(kind, 0) for kind in (0, 1, 2, 3, 4, 5, 6, 10, 11, 12)},
        "negative": Typed(gguf_files.I8, -7),
        "large": Typed(gguf_files.U64, 2**63),
        "flag": True,
        "texts": ["a", "", "ü"],
        "numbers": Typed(gguf_files.I16, [1, -2]),
        "flags": Typed(gguf_files.BOOL, [True, False]),
        "nested": Typed(gguf_files.ARR, [[1, 2], [3]]),
        "split.no": Typed(gguf_files.U16, 0),
        "split.count": Typed(gguf_files.U16, 1),
    }
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((1, 2, 4), np.float16)}
    (tmp_path / "a.gguf").write_bytes(gguf_files.gguf_bytes(keys, tensors, alignment=64))
    forge.convert(tmp_path / "a.gguf", tmp_path / "b.gguf", progress=False)
    before, after = fields(tmp_path / "a.gguf"), fields(tmp_path / "b.gguf")
    assert before.keys() - after.keys() == {"split.no", "split.count"}  # one file has no shards
    assert {key: value for key, value in before.items() if key in after and key != "GGUF.kv_count"} == {
        key: value for key, value in after.items() if key != "GGUF.kv_count"
    }
    reader = gguf.GGUFReader(tmp_path / "b.gguf")
    assert [tensor.data_offset % 64 for tensor in reader.tensors] == [0, 0]
    for tensor in reader.tensors:
        np.testing.assert_array_equal(tensor.data.reshape(-1), tensors[tensor.name].reshape(-1))


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_a_directory_becomes_what_llama_cpps_converter_makes_of_it(name: str, tmp_path: Path) -> None:
    forge.convert(unpacked(name, tmp_path / name), tmp_path / "a.gguf", progress=False)
    ours, theirs = fields(tmp_path / "a.gguf"), fields(ARCH / name / "model.gguf")
    skipped = OURS_ALONE | BY_FAMILY.get(name, set())
    assert {key: ours.get(key) for key in theirs if key not in skipped} == {
        key: value for key, value in theirs.items() if key not in skipped
    }
    assert ours.keys() - skipped <= theirs.keys()
    assert ours["general.name"][1] == name
    found, expected = (gguf.GGUFReader(path).tensors for path in (tmp_path / "a.gguf", ARCH / name / "model.gguf"))
    tensors = {tensor.name: tensor for tensor in found}
    assert tensors.keys() == {tensor.name for tensor in expected}
    for tensor in expected:
        assert tensors[tensor.name].tensor_type == tensor.tensor_type
        np.testing.assert_array_equal(tensors[tensor.name].data, tensor.data, err_msg=tensor.name)


@pytest.mark.parametrize("type", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_matrices_in_a_type_are_those_of_the_gguf_package(type: str, tmp_path: Path) -> None:
    forge.convert(LLAMA, tmp_path / "a.gguf", type=type.lower(), progress=False)
    before = {tensor.name: tensor for tensor in gguf.GGUFReader(LLAMA).tensors}
    # Q4_0 has an output of Q6_K, whose rows of 64 become Q8_0, as llama.cpp's quantizer chooses
    special = {"output.weight": gguf.GGMLQuantizationType.Q8_0} if type == "Q4_0" else {}
    for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors:
        kind = special.get(tensor.name, gguf.GGMLQuantizationType[type])
        kind = kind if len(tensor.shape) > 1 else gguf.GGMLQuantizationType.F32
        assert tensor.tensor_type == kind, tensor.name
        expected = gguf.quants.quantize(before[tensor.name].data, kind)
        np.testing.assert_array_equal(tensor.data.view(np.uint8), expected.view(np.uint8))
    keys = fields(tmp_path / "a.gguf")
    assert keys.pop("general.file_type")[1] == gguf.LlamaFileType[f"MOSTLY_{type}"]
    assert keys.pop("general.quantization_version")[1] == gguf.GGML_QUANT_VERSION
    changed = {"general.file_type", "general.quantization_version"}
    assert keys == {key: value for key, value in fields(LLAMA).items() if key not in changed}


def test_numbers_of_file_types_are_llama_cpps() -> None:
    assert _FILE_TYPES.keys() == {*RECIPES, "F32", "F16", "BF16"}
    for name, number in _FILE_TYPES.items():
        theirs = gguf.LlamaFileType(number).name
        assert theirs.removeprefix("ALL_").removeprefix("MOSTLY_").removesuffix("_S").removesuffix("_MOE") == name


class Memory(Checkpoint):
    """Tensors of given types, of zeros; `fail` is raised when rows are read."""

    format = "memory"

    def __init__(self, types: dict[str, tuple[tuple[int, ...], GGMLType]], fail: BaseException | None = None) -> None:
        self.path, self.paths, self.metadata, self._fail = Path("memory"), (), {"general.architecture": "llama"}, fail
        infos = [TensorInfo(name, shape, type, _bytes(shape, type)) for name, (shape, type) in types.items()]
        self.tensors = {info.name: info for info in infos}

    def close(self) -> None: ...

    def check_path(self) -> None: ...

    def _read(self, info: TensorInfo, start: int, out: Any) -> None:
        if self._fail is not None:
            raise self._fail
        out[...] = 0


def _bytes(shape: tuple[int, ...], type: GGMLType) -> int:
    return int(np.prod(shape)) // type.block_size * type.type_size


def test_types_of_tensors() -> None:
    names = {
        "token_embd.weight": ((8, 64), GGMLType.BF16),
        "blk.0.attn_norm.weight": ((64,), GGMLType.F16),
        "blk.0.attn_q_norm.weight": ((2, 64), GGMLType.F32),
        "blk.0.ffn_gate_inp.weight": ((4, 64), GGMLType.F16),
        "blk.0.ffn_up_exps.weight": ((4, 32, 64), GGMLType.Q4_0),
        "blk.0.ffn_up_exps.bias": ((4, 32), GGMLType.F16),
    }
    matrices = {"token_embd.weight", "blk.0.ffn_up_exps.weight"}
    for type in ("F16", "BF16", "F32"):
        model = retyped(Memory(names), type)
        assert {name: info.type.name for name, info in model.tensors.items()} == {
            name: type if name in matrices else "F32" for name in names
        }
    message = r"memory: the weights are quantized already \(Q4_0\): again makes them worse: leave type out"
    with pytest.raises(ParameterError, match=message):
        retyped(Memory(names), "Q8_0")
    assert check_type("q8_0") == "Q8_0"


@pytest.mark.parametrize("name", ["llama_gptq", "qwen2_awq", "onnx/genai/qwen3_int4_128"])
def test_four_bits_of_gptq_awq_and_onnx_become_q4_1(name: str, tmp_path: Path) -> None:
    source = ARCH.parent / name if "/" in name else int4_directory(name, tmp_path / name)
    written = forge.convert(source, tmp_path / "a.gguf", progress=False)
    with open_checkpoint(source) as before, forge_gguf.read(tmp_path / "a.gguf") as after:
        own = [info.name for info in before.tensors.values() if not info.type.in_files]
        assert written.notes == (f"{len(own)} matrices are Q4_1, the nearest of GGUF's types to their 4 bits",)
        assert after.get_str("general.name") == source.name
        for tensor in own:
            assert after.tensor(tensor).type is GGMLType.Q4_1
            weights = before.load(tensor)
            largest = np.abs(weights).max(initial=0)  # of a minimum, a multiple of its scale, float16 keeps 11 bits
            np.testing.assert_allclose(after.load(tensor), weights, rtol=0, atol=2.0**-11 * 2 * largest)


def test_minima_of_q4_1_beyond_float16_are_refused() -> None:
    """In float32 they are none: a scale of 60,000 times 15 - 15."""
    model = Memory({"a": ((1, 32), GGMLType.Q4_G32)})
    rows = int4.pack(np.full((1, 32), 15, np.uint8), np.array([[60_000.0]]), np.array([[15]], np.uint8))[1]
    model._read = lambda info, start, out: np.copyto(out, rows)  # type: ignore[method-assign]
    with pytest.raises(UnsupportedError, match=r"^memory: tensor 'a': weights are not finite, or too large for Q4_1$"):
        retyped(model, None).raw("a")


def test_a_failure_leaves_nothing_behind_and_the_old_file_alone(tmp_path: Path) -> None:
    target = tmp_path / "a.gguf"
    target.write_bytes(b"old")
    for failure in (
        KeyboardInterrupt(),
        forge.FormatError("damaged"),
        OSError(errno.ENOSPC, "No space left on device"),
    ):
        with pytest.raises((KeyboardInterrupt, ForgeError)) as raised:
            gguf_writer.write_gguf(Memory({"a.weight": ((2, 32), GGMLType.F32)}, failure), target)
        assert os.listdir(tmp_path) == ["a.gguf"]
        assert target.read_bytes() == b"old"
    assert str(raised.value) == f"{target}: cannot be written: No space left on device"


def test_what_killed_writers_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    left, names = (
        tmp_path / ".old.gguf.0123abcd.part",
        {".a.gguf.part", ".a.gguf.0123abcg.part", "a.gguf.0123abcd.part"},
    )
    for path in (left, *(tmp_path / name for name in names)):
        path.write_bytes(b"half")
    (tmp_path / ".link.gguf.0123abcd.part").symlink_to(tmp_path / "a.gguf.0123abcd.part")
    (tmp_path / ".folder.gguf.0123abcd.part").mkdir()
    with gguf_writer._scratch(tmp_path / "b.gguf") as other:  # a writer that lives
        forge.convert(LLAMA, tmp_path / "a.gguf", progress=False)
        kept = names | {".link.gguf.0123abcd.part", ".folder.gguf.0123abcd.part", Path(str(other.name)).name}
        assert set(os.listdir(tmp_path)) == kept | {"a.gguf"}
    assert (tmp_path / "a.gguf.0123abcd.part").read_bytes() == b"half"


@pytest.mark.slow
def test_a_writer_that_is_killed_leaves_nothing_for_long(tmp_path: Path) -> None:
    kill = "lambda *report: report[0].startswith('writing') and os.kill(os.getpid(), 9)"
    text = f"import os, forge; forge.convert({str(LLAMA)!r}, {str(tmp_path / 'a.gguf')!r}, progress={kill})"
    assert subprocess.run([sys.executable, "-c", text], check=False).returncode == -9
    assert [name.endswith(".part") for name in os.listdir(tmp_path)] == [True]
    forge.convert(LLAMA, tmp_path / "b.gguf", progress=False)
    assert os.listdir(tmp_path) == ["b.gguf"]


def test_a_disk_without_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    with pytest.raises(ForgeError, match=r"a\.gguf: takes 689,728 bytes, and .* has 1,000 free"):
        forge.convert(LLAMA, tmp_path / "a.gguf", progress=False)
    assert not os.listdir(tmp_path)


def test_what_gguf_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"tensor 'a' is Q4_G32, which GGUF does not have: use type=\"Q4_1\""):
        gguf_writer.write_gguf(Memory({"a": ((1, 32), GGMLType.Q4_G32)}), tmp_path / "a.gguf")
    with pytest.raises(UnsupportedError, match="too long a name"):
        gguf_writer.write_gguf(Memory({"a" * 64: ((1, 32), GGMLType.F32)}), tmp_path / "a.gguf")


def test_wrong_targets_are_one_line(tmp_path: Path) -> None:
    copy = shutil.copy(LLAMA, tmp_path / "a.gguf")
    for target, more, message in (
        ("a.gguf", {}, "exists: use force=True to replace it"),
        ("a.gguf", {"force": True}, "is the model itself: give another one"),
        ("b.bin", {}, "path must end in .gguf, not"),
        ("no/b.gguf", {}, "is no directory"),
        ("b.gguf", {"type": "Q9"}, "type must be one of F32, F16, BF16"),
    ):
        with pytest.raises(ParameterError) as raised:
            forge.convert(copy, tmp_path / target, progress=False, **more)
        assert message in str(raised.value)
    (tmp_path / "d.gguf").mkdir()
    with pytest.raises(ParameterError, match="is a directory"):
        forge.convert(copy, tmp_path / "d.gguf", force=True, progress=False)
    forge.convert(LLAMA, copy, force=True, type="F16", progress=False)
    with forge_gguf.read(copy) as model:
        assert model.tensor("output.weight").type is GGMLType.F16


def test_a_converted_directory_gives_the_same_ids(tmp_path: Path) -> None:
    source = unpacked("qwen3", tmp_path / "qwen3")
    forge.convert(source, tmp_path / "a.gguf", progress=False)
    before, after = forge.load_tokenizer(source), forge.load_tokenizer(tmp_path / "a.gguf")
    assert before.encode("na ne ni?") == after.encode("na ne ni?")
    assert json.dumps(sorted(before.eog_ids)) == json.dumps(sorted(after.eog_ids))
