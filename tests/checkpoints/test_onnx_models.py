"""ONNX models of optimum's exporter and of onnxruntime-genai's builder: logits, hostile cases, how they are opened."""

from __future__ import annotations

import json
import math
import re
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx_files import array, attribute, external, graph, integer, model, node, span, tensor

import forge
from forge.checkpoints import open_checkpoint
from forge.checkpoints.onnx_genai import frequencies_of
from forge.checkpoints.onnx_parameters import Constants, find_parameters
from forge.errors import ForgeError, FormatError, UnsupportedError
from forge.formats.onnx import ONNX

DATA = Path(__file__).parents[1] / "data/onnx"
NAMES = sorted(str(path.parent.relative_to(DATA)) for path in DATA.glob("*/*/logits.npz"))
QUICK = {"optimum/llama", "genai/qwen3_int4_128"}


def copy_of(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(DATA / name, folder / "model"))


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_logits_equal_at_every_position(name: str) -> None:
    """Those of transformers for exports; for the builder's int4 those of onnxruntime with the same weights."""
    golden = np.load(DATA / name / "logits.npz")
    with forge.load(DATA / name, device="cpu", dtype="f32", progress=False) as llm:
        found = llm.logits(golden["ids"].tolist())
    np.testing.assert_allclose(found, golden["logits"], atol=5e-4, rtol=0)


def test_there_are_all_layouts() -> None:
    assert len(NAMES) == 12


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("genai/llama_int4_f16", {"Q4_G32", "F16", "F32"}),
        ("genai/qwen3_int4_128", {"Q4_G128", "F16", "F32"}),
        ("genai/llama_shared", {"Q4_G32", "F32"}),
        ("genai/qwen2_int4_tail", {"Q4_G32", "F16", "F32"}),  # rows of 96 in blocks of 128
        ("genai/mistral_int4_int8", {"Q4_G32", "F32"}),
        ("genai/gemma_f16", {"F16", "F32"}),
        ("optimum/llama", {"F32"}),
    ],
)
def test_weights_stay_as_small_as_they_are(name: str, types: set[str]) -> None:
    with open_checkpoint(DATA / name) as found:
        assert {info.type.name for info in found.tensors.values()} == types
        assert (found.format, found.path.name) == ("ONNX", "model.onnx")


@pytest.mark.parametrize("name", ["optimum/llama", "genai/qwen3_int4_128", "genai/mistral_int4_int8", "genai/phi3_f16"])
def test_rows_are_read_apart(name: str) -> None:
    """Whole, row by row, and in other pieces: transposed, parted, joined, unpacked and reordered."""
    with open_checkpoint(DATA / name) as found:
        for tensor_name in ("blk.0.attn_output.weight", "token_embd.weight", "output.weight", *found.tensors):
            if tensor_name not in found.tensors or ".1." in tensor_name:
                continue
            whole = found.raw(tensor_name)
            rows = len(whole)
            for start, stop in ((0, 1), (rows // 3, rows // 2 + 1), (rows - 1, rows)):
                np.testing.assert_array_equal(found.raw(tensor_name, slice(start, stop)), whole[start:stop])


def test_the_numbers_of_a_graph_without_config_json() -> None:
    with open_checkpoint(DATA / "genai/qwen3_int4_128") as found:
        numbers = {key.removeprefix("qwen3."): value for key, value in found.metadata.items() if "token" not in key}
        assert numbers["general.architecture"] == "qwen3"
        assert numbers["rope.freq_base"] == 10_000.0
        assert numbers["attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
        sizes = ("embedding_length", "feed_forward_length", "attention.head_count", "attention.key_length")
        assert [numbers[key] for key in sizes] == [128, 128, 4, 32]
        assert found.metadata["tokenizer.ggml.eos_token_id"] == 257


@pytest.mark.parametrize("base", [1e4, 5e5, 1.5e5, 1e6, 12e6])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_rotation_is_found_in_its_tables(base: float, dtype: type) -> None:
    expected = base ** (-np.arange(32) / 32)
    angles = np.arange(4096)[:, None] * expected
    found = frequencies_of(*(part.astype(dtype).astype(np.float64) for part in (np.cos(angles), np.sin(angles))))
    assert found is not None
    assert np.abs(found - expected).max() < 1e-6


def test_a_file_in_a_folder_of_the_model(tmp_path: Path) -> None:
    """As repositories for transformers.js have it: config.json above onnx/model.onnx."""
    folder = copy_of("genai/gemma_f16", tmp_path)
    (folder / "onnx").mkdir()
    (folder / "genai_config.json").unlink()
    for name in ("model.onnx", "model.onnx.data"):
        (folder / name).rename(folder / "onnx" / name)
    with open_checkpoint(folder) as found, open_checkpoint(folder / "onnx/model.onnx") as same:
        assert found.tensors == same.tensors
        assert [path.name for path in found.paths] == ["model.onnx", "model.onnx.data"]


def test_links_of_the_cache_of_the_hub(tmp_path: Path) -> None:
    """A snapshot whose files are links to blobs."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/1234"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in (DATA / "genai/gemma_f16").iterdir():
        shutil.copy(path, blobs / path.stem[::-1])
        (snapshot / path.name).symlink_to(f"../../blobs/{path.stem[::-1]}")
        if path.name == "model.onnx.data":
            shutil.copy(path, blobs / "data")
            (snapshot / path.name).unlink()
            (snapshot / path.name).symlink_to("../../blobs/data")
    with open_checkpoint(snapshot) as found:
        assert found.load("token_embd.weight").shape == (272, 64)


def edited(name: str, **changes: object) -> Callable[[Path], None]:
    """A JSON file with other values; None = without them. Dots part keys of objects in objects."""

    def edit(folder: Path) -> None:
        whole = json.loads((folder / name).read_text())
        for path, value in changes.items():
            *way, last = path.split("__")
            inner = whole
            for key in way:
                inner = inner[key]
            inner[last] = value
        (folder / name).write_text(json.dumps(whole))

    return edit


def without(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None  # type: ignore[func-returns-value]


def replaced(old: bytes, new: bytes) -> Callable[[Path], None]:
    """Bytes of the graph, of equal length."""

    def edit(folder: Path) -> None:
        data = (folder / "model.onnx").read_bytes()
        assert old in data
        assert len(old) == len(new)
        (folder / "model.onnx").write_bytes(data.replace(old, new))

    return edit


def graph_of(*nodes: bytes, tensors: tuple[bytes, ...] = ()) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.onnx").write_bytes(model(nodes, tensors)) and None  # type: ignore[func-returns-value]


def listed_epsilons(folder: Path) -> None:
    """Attributes of one number become lists of one."""
    path = folder / "model.onnx"
    number = re.compile(rb"(\x0a\x07epsilon)\x15(.{4})\xa0\x01\x01", re.DOTALL)
    path.write_bytes(number.sub(lambda found: found[1] + b"\x3d" + found[2] + b"\xa0\x01\x06", path.read_bytes()))


MATRIX = np.ones((32, 32), np.float32)
QWEN, LLAMA = "genai/qwen3_int4_128", "optimum/llama"
# name: (model, what is done to its folder, the error, words of its message)
REFUSED: dict[str, tuple[str, Callable[[Path], None], type[ForgeError], tuple[str, ...]]] = {
    "no configuration": (LLAMA, without("config.json"), UnsupportedError, ("neither config.json", "operations are")),
    "no tokenizer": (LLAMA, without("tokenizer.json"), FormatError, ("no tokenizer.json",)),
    "no data": (QWEN, without("model.onnx.data"), FormatError, ("model.onnx.data: is missing",)),
    "no model": (LLAMA, without("model.onnx"), FormatError, ("model.safetensors",)),
    "file name that leads out": (
        QWEN,
        edited("genai_config.json", model__decoder__filename="../model.onnx"),
        FormatError,
        ("'../model.onnx'",),
    ),
    "type of no family": (QWEN, edited("genai_config.json", model__type="x"), UnsupportedError, ("'x'", "config.json")),
    "type that is no string": (QWEN, edited("genai_config.json", model__type=["x"]), UnsupportedError, ("type",)),
    "model that is no object": (QWEN, edited("genai_config.json", model=[1]), FormatError, ("model should be",)),
    "head of no size": (QWEN, edited("genai_config.json", model__decoder__head_size=-1), FormatError, ("head_size",)),
    "layers of a string": (
        QWEN,
        edited("genai_config.json", model__decoder__num_hidden_layers="2"),
        FormatError,
        ("num_hidden_layers",),
    ),
    "other heads": (
        QWEN,
        edited("genai_config.json", model__decoder__num_attention_heads=8),
        FormatError,
        ("4 heads", "8 and 2", "belong together"),
    ),
    "another family": (
        LLAMA,
        edited("config.json", model_type="gpt2"),
        UnsupportedError,
        ("no decoder that forge knows", "no wte.weight", "first parameters 'model.embed_tokens.weight"),
    ),
    "no family": (LLAMA, edited("config.json", model_type="no_such"), UnsupportedError, ("'no_such'",)),
    "epsilons in lists": (QWEN, listed_epsilons, UnsupportedError, ("epsilon of the norms",)),
    "more layers": (LLAMA, edited("config.json", num_hidden_layers=3), UnsupportedError, ("2 operations", "3 layers")),
    "fewer layers": (LLAMA, edited("config.json", num_hidden_layers=1), FormatError, ("layers.1",)),
    "heads of two numbers": (
        QWEN,
        edited("genai_config.json", model__decoder__head_size=2),
        UnsupportedError,
        ("the scale of its attention is",),
    ),
    "no table of cosines": (QWEN, replaced(b"cos_cache", b"xos_cache"), UnsupportedError, ("cos_cache",)),
    "operations of another domain": (
        QWEN,
        replaced(b"com.microsoft", b"com.ryzenai_x"),
        UnsupportedError,
        ("no decoder that forge knows", "'com.ryzenai_x'", "operations are"),
    ),
    "codes of 5 bits": (
        QWEN,
        replaced(span(1, "bits") + integer(3, 4), span(1, "bits") + integer(3, 5)),
        ForgeError,
        ("5 bits",),
    ),
    "image classifier": (
        LLAMA,
        graph_of(node("Conv", ["x", "w"], ["y"], "/conv/Conv"), tensors=(array("w", MATRIX),)),
        UnsupportedError,
        ("no decoder that forge knows", "'Conv'", "operations are Conv"),
    ),
    "no embedding": (
        LLAMA,
        graph_of(node("MatMul", ["x", "w"], ["y"], "/fc/MatMul"), tensors=(array("w", MATRIX),)),
        UnsupportedError,
        ("no embed_tokens.weight", "operations are MatMul", "fc.weight"),
    ),
    "no names": (
        LLAMA,
        graph_of(node("MatMul", ["x", "w"], ["y"], "MatMul_3"), tensors=(array("w", MATRIX),)),
        UnsupportedError,
        ("'MatMul_3'", "'w'", "names of modules"),
    ),
    "no place": (
        LLAMA,
        graph_of(node("Div", ["x", "w"], ["y"], "/a/Div"), tensors=(array("w", MATRIX),)),
        UnsupportedError,
        ("Div '/a/Div' reads tensor 'w'", "no place"),
    ),
    "two parameters of a name": (
        LLAMA,
        graph_of(
            node("MatMul", ["x", "w"], ["y"], "/a/MatMul"),
            node("MatMul", ["y", "v"], ["z"], "/a/MatMul_1"),
            tensors=(array("w", MATRIX), array("v", MATRIX)),
        ),
        UnsupportedError,
        ("'a.weight' is both 'w' and 'v'",),
    ),
    "empty graph": (LLAMA, graph_of(), UnsupportedError, ("no embed_tokens.weight", "operations are none")),
}


def open_and_load(folder: Path) -> None:
    open_checkpoint(folder).close()
    forge.load(folder, device="cpu", progress=False).close()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_known_decoder_is_refused_by_name(tmp_path: Path, name: str) -> None:
    source, edit, error, words = REFUSED[name]
    folder = copy_of(source, tmp_path)
    edit(folder)
    with pytest.raises(error) as caught:
        open_and_load(folder)
    message = str(caught.value)
    assert message.isprintable()
    assert str(tmp_path) in message
    assert [word for word in words if word not in message] == [], message


def blocked(**numbers: int) -> Callable[[Path], None]:
    """A graph with one MatMulNBits of 32 rows of 64 weights in blocks of 32, and other numbers or sizes of arrays."""
    sizes = {"codes": 32 * 32, "scales": 64, "zeros": 32, "bits": 4, "block_size": 32, "N": 32, "K": 64} | numbers
    attributes = [attribute(key, 2, integer(3, sizes[key])) for key in ("bits", "block_size", "N", "K")]
    return graph_of(
        node("MatMulNBits", ["x", "q", "s", "z"], ["y"], "/lm_head/MatMul_Q4", attributes),
        tensors=(
            tensor("q", (sizes["codes"],), span(9, bytes(sizes["codes"])), 2),
            array("s", np.ones(sizes["scales"], np.float32)),
            tensor("z", (sizes["zeros"],), span(9, bytes(sizes["zeros"])), 2),
        ),
    )


BLOCKS: dict[str, tuple[dict[str, int], str]] = {
    "codes too short": ({"codes": 1023}, "'q' [1023] has 1023 bytes"),
    "scales too long": ({"scales": 65}, "'s' [65] has 260 bytes"),
    "zeros too short": ({"zeros": 31}, "'z' [31] has 31 bytes"),
    "3 bits": ({"bits": 3}, "codes of 3 bits"),
    "blocks of 0": ({"block_size": 0}, "blocks of 0 is impossible"),
    "blocks of 24": ({"block_size": 24}, "blocks of 24 is impossible"),
    "no rows": ({"N": 0}, "is impossible"),
    "2^62 rows": ({"N": 1 << 62}, "N should be a whole number"),
    "2^30 rows": ({"N": 1 << 30}, "1073741824"),
    "rows below zero": ({"N": -1}, "N should be a whole number"),
    "2^30 columns": ({"K": 1 << 30}, "1073741824"),
    "0 bits": ({"bits": 0}, "codes of 0 bits"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_matrices_in_blocks_that_lie(tmp_path: Path, name: str) -> None:
    numbers, words = BLOCKS[name]
    folder = copy_of(LLAMA, tmp_path)
    blocked(**numbers)(folder)
    with pytest.raises(ForgeError) as caught:
        open_checkpoint(folder)
    assert words in str(caught.value)


@pytest.mark.parametrize(("shape", "bits", "words"), [((), 4, "is one number"), ((8, 16), 0, "codes of 0 bits")])
def test_embeddings_in_blocks_that_lie(tmp_path: Path, shape: tuple[int, ...], bits: int, words: str) -> None:
    attributes = [attribute("bits", 2, integer(3, bits)), attribute("block_size", 2, integer(3, 32))]
    codes = tensor("q", shape, span(9, bytes(math.prod(shape))), 2)
    folder = copy_of(LLAMA, tmp_path)
    graph_of(
        node("GatherBlockQuantized", ["q", "x", "s"], ["y"], "/model/embed_tokens/Gather", attributes),
        tensors=(codes, array("s", np.ones(8, np.float32))),
    )(folder)
    with pytest.raises(ForgeError, match=words):
        open_checkpoint(folder)


def test_a_number_is_no_parameter_of_another_shape(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    sizes = array("sizes", np.zeros(0, np.int64))
    same = node("Reshape", ["number", "sizes"], ["same"], "Reshape")
    path.write_bytes(model([same], [tensor("number", (), span(9, bytes(4))), sizes]))
    with ONNX(path) as opened:
        assert Constants(opened).found["same"].shape == ()


@pytest.mark.parametrize("op_type", ["Conv" * 4000 + "-", "\x1b[31m", "A" * 101])
def test_names_of_operations_have_bounds(tmp_path: Path, op_type: str) -> None:
    """What is matched and shown of them is short. The first took seconds for a regular expression."""
    path = tmp_path / "model.onnx"
    path.write_bytes(model([node(op_type, ["x"], ["y"], "a")]))
    with pytest.raises(FormatError, match=r"at most 100 printable") as caught:
        ONNX(path)
    assert len(str(caught.value)) < 300 + len(str(path))


def test_a_node_that_onnx_runtime_fused_has_the_module_of_its_parts(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    fused = node("SimplifiedLayerNormalization", ["x", "model.norm.weight"], ["y"], "/model/norm/Mul_1/NormFusion/")
    path.write_bytes(model([fused], [array("model.norm.weight", np.ones(4, np.float32))]))
    with ONNX(path) as opened:
        assert list(find_parameters(Constants(opened), by_nodes=False)) == ["model.norm.weight"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimum/llama", "genai/mistral_int4_int8", "genai/llama_shared"])
def test_no_changed_bytes_are_another_error(tmp_path: Path, name: str) -> None:
    folder = copy_of(name, tmp_path)
    path = folder / "model.onnx"
    whole, rng, used = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(100):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            data[at] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(data)
        try:
            with open_checkpoint(folder) as found:
                used += sum(found.raw(name).size > 0 for name in found.tensors) > 0
        except ForgeError as error:
            assert str(error).isprintable()  # noqa: PT017 - most changes are refused, and some are not
    assert 0 < used < 100


def test_a_norm_of_terabytes_is_not_read(tmp_path: Path) -> None:
    """A sparse file: what is looked at when a model is opened has bounds of its own."""
    folder = copy_of(LLAMA, tmp_path)
    huge = 1 << 38
    graph_of(
        node("LayerNormalization", ["x", "w"], ["y"], "/norm/LayerNormalization"),
        tensors=(tensor("w", (huge,), external("data")),),
    )(folder)
    with open(folder / "data", "wb") as file:
        file.truncate(4 * huge)
    tracemalloc.start()
    with pytest.raises(UnsupportedError, match=r"first parameters 'norm\.weight'"):
        open_checkpoint(folder)
    assert tracemalloc.get_traced_memory()[1] < 5 << 20
    tracemalloc.stop()


def test_nodes_of_inner_graphs_are_found(tmp_path: Path) -> None:
    """As a decoder with and without a cache has them, in the branches of an If."""
    inner = graph([node("MatMul", ["x", "w"], ["y"], "/fc/MatMul")])
    folder = copy_of(LLAMA, tmp_path)
    graph_of(
        node("If", ["c"], ["z"], "if", [attribute("then_branch", 5, span(6, inner))]), tensors=(array("w", MATRIX),)
    )(folder)
    with pytest.raises(UnsupportedError, match=r"first parameters 'fc\.weight'"):
        open_checkpoint(folder)
