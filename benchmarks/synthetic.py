"""GGUF files of real models' shapes with random weights, for measuring speed where no weights are at hand.

python benchmarks/synthetic.py llama-3.2-1b|qwen3-30b-a3b|... [--type F16|Q4_K|Q4_K_M|MXFP4|...] OUT.gguf

`--tokenizer FOLDER` takes vocabulary, merges and chat template of a published model: its tokenizer.json, its
tokenizer_config.json and, where the template is not in that, its chat_template.jinja. The tiny shapes are for it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from forge.checkpoints.hf_tokenizer import read_tokenizer
from forge.checkpoints.recipes import has_more_bits
from forge.ops.quant import QuantTensor


@dataclass(frozen=True)
class Shape:
    """A model's sizes. ffn: F, of each expert where there are any. biases: The family has them in all matrices."""

    arch: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    dim: int
    ffn: int
    vocabulary: int
    experts: int = 0
    used: int = 0
    vectors: tuple[tuple[str, str], ...] = ()
    """Further vectors of a layer, and what they are as long as: heads, a head, the stream."""
    keys: tuple[tuple[str, float], ...] = ()
    """Further keys of the architecture."""
    has_biases: bool = False
    norms: tuple[str, str] = ("attn_norm", "ffn_norm")
    is_tied: bool = True
    """Whether the embedding is the output matrix too."""


_QWEN3: Any = {"vectors": (("attn_q_norm", "head"), ("attn_k_norm", "head")), "is_tied": False}
_GPT_OSS: Any = {
    "vectors": (("attn_sinks", "heads"),),
    "keys": (("attention.sliding_window", 128),),
    "has_biases": True,
    "norms": ("attn_norm", "post_attention_norm"),
    "is_tied": False,
}

SHAPES = {
    "llama-3.2-1b": Shape("llama", 16, 2048, 32, 8, 64, 8192, 128_256),
    "llama-3.1-8b": Shape("llama", 32, 4096, 32, 8, 128, 14_336, 128_256),
    "qwen3-30b-a3b": Shape("qwen3moe", 48, 2048, 32, 4, 128, 768, 151_936, 128, 8, **_QWEN3),
    "qwen3-tiny": Shape("qwen3moe", 2, 64, 4, 2, 16, 32, 151_936, 8, 2, **_QWEN3),
    "gpt-oss-20b": Shape("gpt-oss", 24, 2880, 64, 8, 64, 2880, 201_088, 32, 4, **_GPT_OSS),
    "gpt-oss-tiny": Shape("gpt-oss", 2, 64, 4, 2, 16, 32, 201_088, 8, 2, **_GPT_OSS),
}
_ROWS = 1024
"""Rows that are drawn; a matrix repeats them, which changes nothing about its speed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", default="F16", help="ggml type of the matrices, or Q4_K_M: llama.cpp's mixture")
    parser.add_argument("--tokenizer", type=Path, help="a folder with a published tokenizer.json")
    arguments = parser.parse_args()
    write(arguments.shape, arguments.type, arguments.out, arguments.tokenizer)


def write(name: str, mixture: str, out: Path, tokenizer: Path | None = None) -> None:
    """Write a model of this shape whose matrices have this type.

    In Q4_K_M the output matrix is Q6_K, as are the values' and the down projections of half the layers. In MXFP4
    experts have this type, and other matrices are Q8_0, as in gpt-oss' files.
    """
    shape, rng = SHAPES[name], np.random.default_rng(0)
    writer = gguf.GGUFWriter(out, shape.arch)
    _add_metadata(writer, shape)
    if tokenizer:
        _add_tokenizer(writer, shape, tokenizer)
    else:
        _add_tokens(writer, shape.vocabulary)

    def matrix(name: str, rows: int, cols: int, *, is_precise: bool = False, experts: int = 0) -> None:
        type_name = mixture
        if mixture == "Q4_K_M":
            type_name = "Q6_K" if is_precise else "Q4_K"
        elif mixture == "MXFP4":
            type_name = "MXFP4" if experts else "Q8_0"
        count = min(rows, _ROWS)
        repeat = (-(-rows // count), 1)
        if type_name == "F16":
            drawn = (rng.standard_normal((count, cols), np.float32) * cols**-0.5).astype(np.float16)
            kind = None
        else:
            drawn = QuantTensor.random(type_name, count, cols, rng, scale=1e-4).blocks  # activations stay small
            kind = gguf.GGMLQuantizationType[type_name]
        whole = np.tile(drawn, repeat)[:rows]
        if experts:
            whole = np.broadcast_to(whole, (experts, *whole.shape)).copy()
        writer.add_tensor(name, whole, raw_dtype=kind)

    def numbers(name: str, *shape: int, mean: float = 0.0) -> None:
        writer.add_tensor(name, (mean + 0.1 * rng.standard_normal(shape)).astype(np.float32))

    matrix("token_embd.weight", shape.vocabulary, shape.width, is_precise=shape.is_tied)
    if not shape.is_tied:
        matrix("output.weight", shape.vocabulary, shape.width, is_precise=True)
    for layer in range(shape.layers):
        is_precise = has_more_bits(layer, shape.layers)
        for part, rows, cols, experts in _matrices(shape):
            precise = is_precise and part in ("attn_v", "ffn_down", "ffn_down_exps")
            matrix(f"blk.{layer}.{part}.weight", rows, cols, is_precise=precise, experts=experts)
            if shape.has_biases:
                numbers(f"blk.{layer}.{part}.bias", *((experts,) if experts else ()), rows)
        if shape.experts:
            numbers(f"blk.{layer}.ffn_gate_inp.weight", shape.experts, shape.width)
            if shape.has_biases:
                numbers(f"blk.{layer}.ffn_gate_inp.bias", shape.experts)
        for part, size in (*((norm, "width") for norm in shape.norms), *shape.vectors):
            sizes = {"head": shape.dim, "heads": shape.heads, "width": shape.width}
            numbers(f"blk.{layer}.{part}.weight", sizes[size], mean=float(size != "heads"))
    numbers("output_norm.weight", shape.width, mean=1.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _matrices(shape: Shape) -> Iterator[tuple[str, int, int, int]]:
    """Names, rows, columns and experts of a layer's matrices."""
    width, dim, ffn = shape.width, shape.dim, shape.ffn
    for name, rows, cols in (
        ("attn_q", shape.heads * dim, width),
        ("attn_k", shape.kv_heads * dim, width),
        ("attn_v", shape.kv_heads * dim, width),
        ("attn_output", width, shape.heads * dim),
    ):
        yield name, rows, cols, 0
    for name, rows, cols in (("ffn_gate", ffn, width), ("ffn_up", ffn, width), ("ffn_down", width, ffn)):
        yield name + "_exps" * bool(shape.experts), rows, cols, shape.experts


def _add_metadata(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_block_count(shape.layers)
    writer.add_context_length(131_072)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.dim)
    writer.add_value_length(shape.dim)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.used)
        writer.add_expert_feed_forward_length(shape.ffn)
    for key, value in shape.keys:
        writer.add_uint32(f"{shape.arch}.{key}", int(value))


def _add_tokens(writer: gguf.GGUFWriter, count: int) -> None:
    """Add a vocabulary of Chinese characters, where none is at hand."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([chr(0x4E00 + i % 20_000) * (1 + i // 20_000) for i in range(count)])
    writer.add_token_types([gguf.TokenType.NORMAL] * count)
    writer.add_token_merges(["\u4e00 \u4e00"])  # a file must have one
    writer.add_eos_token_id(count - 1)


def _add_tokenizer(writer: gguf.GGUFWriter, shape: Shape, folder: Path) -> None:
    """Add a published tokenizer, as llama.cpp's converter does."""
    add: dict[type, Any] = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    add |= {str: writer.add_string, list: writer.add_array}
    for key, value in read_tokenizer(folder, {}, architecture=shape.arch, vocab_size=shape.vocabulary).items():
        plain = value.tolist() if isinstance(value, np.ndarray) else value
        add[type(plain)](key, plain)


if __name__ == "__main__":
    main()
