"""GGUF files of real models' shapes with random weights, for measuring speed where no weights are at hand.

python benchmarks/synthetic.py llama-3.2-1b [--type F16|Q4_K|Q4_K_M|...] OUT.gguf
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np

from forge.ops.quant import QuantTensor

SHAPES = {  # layers, E, H, G, D, F, V
    "llama-3.2-1b": (16, 2048, 32, 8, 64, 8192, 128_256),
    "llama-3.1-8b": (32, 4096, 32, 8, 128, 14_336, 128_256),
}
_ROWS = 1024
"""Rows that are drawn; a matrix repeats them, which changes nothing about its speed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", default="F16", help="ggml type of the matrices, or Q4_K_M: llama.cpp's mixture")
    arguments = parser.parse_args()
    write(arguments.shape, arguments.type, arguments.out)


def write(shape: str, mixture: str, out: Path) -> None:
    """Write a llama of this shape whose matrices have this type; the embedding is the output matrix too.

    In Q4_K_M that one is Q6_K, as are the values' and the down projections of half the layers.
    """
    layers, width, heads, kv_heads, dim, ffn, vocabulary = SHAPES[shape]
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(131_072)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([chr(0x4E00 + i % 20_000) * (1 + i // 20_000) for i in range(vocabulary)])
    writer.add_token_types([1] * vocabulary)
    writer.add_token_merges(["\u4e00 \u4e00"])  # a file must have one
    writer.add_eos_token_id(vocabulary - 1)

    def matrix(name: str, rows: int, cols: int, *, is_precise: bool = False) -> None:
        type_name = ("Q6_K" if is_precise else "Q4_K") if mixture == "Q4_K_M" else mixture
        count = min(rows, _ROWS)
        repeat = (-(-rows // count), 1)
        if type_name == "F16":
            drawn = (rng.standard_normal((count, cols), np.float32) * cols**-0.5).astype(np.float16)
            writer.add_tensor(name, np.tile(drawn, repeat)[:rows])
        else:
            quantized = QuantTensor.random(type_name, count, cols, rng, scale=1e-4)  # activations stay small
            kind = gguf.GGMLQuantizationType[type_name]
            writer.add_tensor(name, np.tile(quantized.blocks, repeat)[:rows], raw_dtype=kind)

    matrix("token_embd.weight", vocabulary, width, is_precise=True)
    for layer in range(layers):
        eighth = layers // 8
        is_precise = layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2
        for name, rows, cols in (
            ("attn_q", heads * dim, width),
            ("attn_k", kv_heads * dim, width),
            ("attn_v", kv_heads * dim, width),
            ("attn_output", width, heads * dim),
            ("ffn_gate", ffn, width),
            ("ffn_up", ffn, width),
            ("ffn_down", width, ffn),
        ):
            matrix(f"blk.{layer}.{name}.weight", rows, cols, is_precise=is_precise and name in ("attn_v", "ffn_down"))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(width, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
