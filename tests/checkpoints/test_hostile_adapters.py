"""Adapter files that are damaged, forged, of another model or of a kind that is not supported, with their messages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import random_pairs, write_adapter
from gguf_files import Blocks, write_gguf
from table_rows import row

import forge
from forge.checkpoints.adapters import check_adapters, read_adapter
from forge.errors import ForgeError, ParameterError
from forge.formats import gguf

PATH = Path(__file__).parents[1] / "data" / "arch" / "llama" / "model.gguf"
Q, DOWN = "blk.0.attn_q.weight", "blk.1.ffn_down.weight"
Tensors = dict[str, Any]


def keys(**changes: Any) -> dict[str, Any]:
    found = {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
    } | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in found.items() if value is not None}


def tensors() -> Tensors:
    pairs = random_pairs(PATH, seed=0, wants=lambda name: name in (Q, DOWN))
    return {
        f"{name}.lora_{half}": array for name, both in pairs.items() for half, array in zip("ab", both, strict=True)
    }


def changed(change: Callable[[Tensors], Any]) -> Tensors:
    found = tensors()
    change(found)
    return found


def renamed(old: str, new: str) -> Tensors:
    return {name.replace(old, new): array for name, array in tensors().items()}


def with_nan() -> Tensors:
    found = tensors()
    found[f"{Q}.lora_b"][3, 1] = np.nan
    return found


A, B = f"{Q}.lora_a", f"{Q}.lora_b"
ROWS: dict[str, tuple[dict[str, Any], Callable[[], Tensors], str]] = {
    "a model": (keys(general__type="model"), tensors, "is no adapter: its general.type is 'model'"),
    "no type": (keys(general__type=None), tensors, "is no adapter: its general.type is 'model'"),
    "a type that is no text": (keys(general__type=7), tensors, "key 'general.type' should be a string, not 7"),
    "another kind": (
        keys(adapter__type="ia3"),
        tensors,
        "is an adapter of the type 'ia3', and lora alone is supported",
    ),
    "no kind": (keys(adapter__type=None), tensors, "key 'adapter.type' is missing"),
    "activated": (
        keys(adapter__alora__invocation_tokens=[1, 2]),
        tensors,
        "is an activated LoRA ('adapter.alora.invocation_tokens'), which is not supported",
    ),
    "another architecture": (
        keys(general__architecture="qwen2"),
        tensors,
        "is an adapter for the architecture 'qwen2', and the model is 'llama'",
    ),
    "no architecture": (keys(general__architecture=None), tensors, "key 'general.architecture' is missing"),
    "alpha is NaN": (
        keys(adapter__lora__alpha=float("nan")),
        tensors,
        "key 'adapter.lora.alpha' should be a finite number, not nan",
    ),
    "alpha is infinite": (
        keys(adapter__lora__alpha=float("inf")),
        tensors,
        "key 'adapter.lora.alpha' should be a finite number, not inf",
    ),
    "alpha is text": (keys(adapter__lora__alpha="8"), tensors, "key 'adapter.lora.alpha' should be a finite number"),
    "no tensors": (keys(), dict, "has no tensors"),
    "half a pair": (
        keys(),
        lambda: changed(lambda t: t.pop(A)),
        f"'{B}' has no lora_a beside it: the file is damaged",
    ),
    "the other half": (
        keys(),
        lambda: changed(lambda t: t.pop(B)),
        f"'{A}' has no lora_b beside it: the file is damaged",
    ),
    "a whole tensor": (
        keys(),
        lambda: changed(lambda t: t.update({Q: np.ones((4, 4), np.float32)})),
        f"tensor '{Q}' is no half of a low-rank pair",
    ),
    "a norm": (
        keys(),
        lambda: changed(lambda t: t.update({"blk.0.attn_norm.weight": np.ones(4, np.float32)})),
        "tensor 'blk.0.attn_norm.weight' is no half of a low-rank pair",
    ),
    "a magnitude": (
        keys(),
        lambda: changed(lambda t: t.update({f"{Q}.lora_magnitude": np.ones(4, np.float32)})),
        f"tensor '{Q}.lora_magnitude' is no half of a low-rank pair",
    ),
    "a layer beyond the last": (
        keys(),
        lambda: renamed("blk.1.", "blk.77."),
        "adapts 'blk.77.ffn_down.weight', which the model has not: it is for another model",
    ),
    "a matrix that is not there": (
        keys(),
        lambda: renamed("attn_q.weight", "attn_qkv.weight"),
        "adapts 'blk.0.attn_qkv.weight', which the model has not: it is for another model",
    ),
    "an embedding": (
        keys(),
        lambda: renamed(Q, "token_embd.weight"),
        "adapts the embedding or the output's matrix ('token_embd.weight'): not supported",
    ),
    "the output": (
        keys(),
        lambda: renamed(Q, "output.weight"),
        "adapts the embedding or the output's matrix ('output.weight'): not supported",
    ),
    "experts": (
        keys(),
        lambda: renamed(DOWN, "blk.1.ffn_down_exps.weight"),
        "adapts a mixture's experts ('blk.1.ffn_down_exps.weight'): not supported",
    ),
    "a norm's weight": (
        keys(),
        lambda: renamed(Q, "blk.0.attn_norm.weight"),
        "adapts 'blk.0.attn_norm.weight', which is no matrix of a layer's products: not supported",
    ),
    "no name": (keys(), lambda: renamed(Q, ""), "adapts '', which the model has not: it is for another model"),
    "too wide": (
        keys(),
        lambda: changed(lambda t: t.update({A: np.ones((4, 65), np.float32)})),
        f"tensor '{A}' has shape (4, 65), not (4, 64): it is for another model",
    ),
    "too few rows": (
        keys(),
        lambda: changed(lambda t: t.update({B: np.ones((63, 4), np.float32)})),
        f"tensor '{B}' has shape (63, 4), not (128, 4): it is for another model",
    ),
    "ranks that differ": (
        keys(),
        lambda: changed(lambda t: t.update({B: np.ones((64, 5), np.float32)})),
        f"tensor '{B}' has shape (64, 5), not (128, 4): it is for another model",
    ),
    "turned over": (
        keys(),
        lambda: changed(lambda t: t.update({A: np.ones((64, 4), np.float32)})),
        f"tensor '{A}' has shape (64, 4), not (64, 64): it is for another model",
    ),
    "a vector": (
        keys(),
        lambda: changed(lambda t: t.update({A: np.ones(64, np.float32)})),
        f"tensor '{A}' should be a matrix, not of shape (64,)",
    ),
    "a cube": (
        keys(),
        lambda: changed(lambda t: t.update({B: np.ones((2, 32, 4), np.float32)})),
        f"tensor '{B}' should be a matrix, not of shape (2, 32, 4)",
    ),
    "a large rank": (
        keys(),
        lambda: changed(lambda t: t.update({A: np.ones((4097, 64), np.float16)})),
        f"tensor '{A}' has the rank 4097, allowed are 1 to 4096",
    ),
    "a rank of 2^31": (
        keys(),
        lambda: changed(lambda t: t.update({A: Blocks(0, (1 << 31, 64), bytes(64))})),
        f"tensor '{A}'",
    ),
    "a rank of 0": (keys(), lambda: changed(lambda t: t.update({A: Blocks(0, (0, 64), b"")})), f"tensor '{A}'"),
    "NaN": (keys(), with_nan, f"tensor '{B}' holds numbers that are not finite"),
}


def test_a_file_is_refused_with_a_line_that_says_why(tmp_path: Path) -> None:
    for name, (metadata, made, message) in ROWS.items():
        with row(name):
            path = write_gguf(tmp_path / "bad.gguf", metadata, made())
            with gguf.read(PATH) as model, pytest.raises(ForgeError) as caught:
                read_adapter(path, model)
            assert str(caught.value).startswith(f"{path}: ")
            assert message in str(caught.value)
            assert "\n" not in str(caught.value)


def test_the_file_that_the_others_differ_from_is_read(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "good.gguf", keys(), tensors())
    with gguf.read(PATH) as model:
        found = read_adapter(path, model)
    assert {name: pair.scale for name, pair in found.pairs.items()} == {Q: 2.0, DOWN: 2.0}
    np.testing.assert_array_equal(found.pairs[Q].a, tensors()[A])


@pytest.mark.parametrize("alpha", [0.0, None])
def test_without_alpha_pairs_are_not_scaled(alpha: float | None, tmp_path: Path) -> None:
    """As llama.cpp has it."""
    path = write_gguf(tmp_path / "good.gguf", keys(adapter__lora__alpha=alpha), tensors())
    with gguf.read(PATH) as model:
        assert {pair.scale for pair in read_adapter(path, model).pairs.values()} == {1.0}


@pytest.mark.parametrize("cut", [3, 40, 200, -1])
def test_a_truncated_file_is_refused(cut: int, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "cut.gguf", "llama", random_pairs(PATH, seed=0))
    path.write_bytes(path.read_bytes()[:cut])
    with gguf.read(PATH) as model, pytest.raises(ForgeError, match=r"cut\.gguf"):
        read_adapter(path, model)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter.pt", "adapter_model.safetensors"])
def test_a_file_of_another_format_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02}q\x00.")
    with gguf.read(PATH) as model, pytest.raises(ForgeError, match=name):
        read_adapter(tmp_path / name, model)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a.gguf"], "adapters must map at most 256 names to paths, not be a list"),
        ({str(i): "a" for i in range(257)}, "adapters must map at most 256 names to paths, not be 257 entries"),
        ({"": "a.gguf"}, "adapters: a name must be 1 to 200 printable characters, not ''"),
        ({"a\nb": "a.gguf"}, "adapters: a name must be 1 to 200 printable characters, not 'a\\nb'"),
        ({3: "a.gguf"}, "adapters: a name must be 1 to 200 printable characters, not 3"),
        ({"a": 3}, "adapters: 'a' must be a path, not a int"),
    ],
)
def test_what_is_no_mapping_of_names_to_paths_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ParameterError) as caught:
        check_adapters(given)
    assert str(caught.value).startswith(message)


def test_load_names_the_adapter_that_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ForgeError, match=r"nothing\.gguf"):
        forge.load(PATH, device="cpu", context=64, adapters={"a": tmp_path / "nothing.gguf"})
