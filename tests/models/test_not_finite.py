"""Weights that are no numbers, in every tensor type and place: requests say so, and NumPy's warnings do not escape.

pytest runs with warnings as errors: each of these tests fails where one does.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import Blocks, write_gguf
from typer.testing import CliRunner

import forge
from forge.backend import NUMPY
from forge.cli.app import app
from forge.config import RopeConfig
from forge.errors import UnsupportedError
from forge.formats import gguf
from forge.formats.ggml import TYPE_OF_NUMBER, GGMLType, dequantize, nbytes
from forge.models.rope import RotaryEmbedding

ARCH = Path(__file__).parents[1] / "data" / "arch"
WIDTH = 256  # a block of every type
PROMPT = [71, 72, 3]
slow = pytest.mark.slow


def metadata_of(name: str) -> dict[str, Any]:
    with gguf.read(ARCH / name / "model.gguf") as file:
        return {k: v if isinstance(v, int | float | str | np.ndarray) else list(v) for k, v in file.metadata.items()}


def one_layer(path: Path, type: GGMLType, fill: str) -> Path:
    """A llama of one layer whose matrices are blocks of a type: random bytes, or all bits of a byte the same."""
    rng = np.random.default_rng(0)

    def matrix(rows: int) -> Blocks:
        size = nbytes(type, (rows, WIDTH))
        data = rng.integers(0, 256, size, np.uint8) if fill == "random" else np.full(size, int(fill, 16), np.uint8)
        return Blocks(type, (rows, WIDTH), data.tobytes())

    keys = metadata_of("llama")
    keys |= {"llama.block_count": 1, "llama.embedding_length": WIDTH, "llama.feed_forward_length": WIDTH}
    keys |= {"llama.attention.head_count": 8, "llama.attention.head_count_kv": 2}
    names = ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    tensors: dict[str, Any] = {f"blk.0.{name}.weight": matrix(WIDTH) for name in names}
    tensors |= {f"blk.0.{name}.weight": matrix(64) for name in ("attn_k", "attn_v")}
    norms = ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")
    tensors |= {f"{name}.weight": np.ones(WIDTH, np.float32) for name in norms}
    return write_gguf(path, keys, tensors | {"token_embd.weight": matrix(320)})


def is_convertible(type: GGMLType) -> bool:
    """Some are not, and others only by a newer `gguf` package."""
    try:
        return dequantize(np.zeros((1, type.type_size), np.uint8), type).size > 0
    except UnsupportedError:
        return False


def use(llm: forge.LLM) -> bool:
    """Every way to run a model; whether its logits are finite, which all of them must agree on."""
    params = forge.SamplingParams(max_tokens=3, ignore_eos=True, temperature=0.8, seed=1, repetition_penalty=1.3)
    logits = llm.logits(PROMPT)
    finite = bool(np.isfinite(logits).all())
    for chosen in (params, forge.SamplingParams(max_tokens=3, ignore_eos=True, logprobs=2, top_p=0.9, min_p=0.1)):
        completion = llm.generate(PROMPT, chosen)
        assert isinstance(completion, forge.Completion)
        chunks = list(llm.stream(PROMPT, chosen))
        assert chunks[-1].finish_reason == completion.finish_reason
        if np.isnan(logits[-1]).any():
            assert (completion.finish_reason, completion.ids) == ("error", [])
        elif finite:
            assert completion.finish_reason in ("length", "error")  # a later step may overflow
    assert llm.attention(PROMPT).shape == (llm.config.num_layers, llm.config.num_heads, 3, 3)
    if np.isnan(logits[:-1]).any():
        with pytest.raises(forge.NumericsError, match="not finite"):
            llm.perplexity(PROMPT)
    else:
        with suppress(forge.NumericsError):
            assert llm.perplexity(PROMPT).tokens == 2
    assert all(pool.num_free == pool.num_pages for pool in llm.engine.pools)
    return finite


@pytest.mark.parametrize("fill", ["0x7F", *(pytest.param(fill, marks=slow) for fill in ("random", "0xFF", "0x7B"))])
@pytest.mark.parametrize("type", TYPE_OF_NUMBER.values(), ids=lambda t: t.name)
def test_blocks_of_any_bytes(tmp_path: Path, type: GGMLType, fill: str) -> None:
    """0xFF and 0x7F are NaN (or the largest scales), 0x7B nearly the largest float16."""
    path = one_layer(tmp_path / "model.gguf", type, fill)
    if not is_convertible(type):
        with pytest.raises(UnsupportedError, match=f"type {type.name} "):
            forge.load(path, device="cpu")
        return
    with forge.load(path, device="cpu") as llm:
        use(llm)


QUICK = {"llama_bias_tied": (np.nan,), "gemma2": (3e38,)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(name, value, marks=() if value in QUICK.get(name, ()) else slow)
        for name in ("llama_bias_tied", "gemma2", "qwen3", "starcoder2")
        for value in (np.nan, np.inf, 3e38, -3e38, 1e-45)
    ],
)
def test_one_tensor_that_is_no_number(tmp_path: Path, name: str, value: float) -> None:
    """Each kind of tensor of the second layer, and those outside of layers."""
    with gguf.read(ARCH / name / "model.gguf") as file:
        tensors = {tensor: file.load(tensor) for tensor in file.tensors}
    seen, metadata = set(), metadata_of(name)
    for tensor in tensors:
        if tensor.startswith("blk.") and not tensor.startswith("blk.1."):
            continue
        changed = tensors[tensor].copy()
        changed.reshape(-1)[::3] = value
        path = write_gguf(tmp_path / "model.gguf", metadata, tensors | {tensor: changed})
        with forge.load(path, device="cpu") as llm:
            seen.add(use(llm))
    assert (False in seen) == (abs(value) > 1 or np.isnan(value))


def test_the_command_line_says_so_in_one_line(tmp_path: Path) -> None:
    path = one_layer(tmp_path / "model.gguf", GGMLType.Q8_0, "0xFF")
    text = tmp_path / "text"
    text.write_text("some words to score")
    for command in (["logits", "abc"], ["perplexity", str(text)], ["generate", "abc"]):
        done = CliRunner().invoke(app, [*command, "-m", str(path), "--device", "cpu"])
        assert isinstance(done.exception, forge.NumericsError), done.output
        assert "Warning" not in done.output


def test_rope_tables_beyond_float32() -> None:
    rope = RopeConfig(style="neox", dim=4, base=1e4, magnitude=1e300, query_growth=1e300, original_context=4)
    found = RotaryEmbedding(rope, NUMPY)
    found.compute(6)
    assert np.isinf(found.cos_sin[3, :, 0]).all()
    assert found.query_scale is not None
    assert found.query_scale.tolist() == [1, 1, 1, 1, np.inf, np.inf]
