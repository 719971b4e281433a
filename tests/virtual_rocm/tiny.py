"""Tiny models with matrices of a chosen type; with Q4_K they are as wide as a block."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf_files import U32, Blocks, Typed, write_gguf

from forge.formats import gguf
from forge.ops.quant import QuantTensor

ARCH = Path(__file__).parents[1] / "data" / "arch"
HEADS, KV_HEADS = 4, 1
WIDTHS = {"F16": 128, "Q4_K": 256}
_SEED, _SEED_OF_EXPERTS = 5, 2  # of the first few the ones with which greedy texts vary most
_LOGITS = 5.0
"""Standard deviation of the logits: of real models' size, so that few top-2 gaps are small."""


def write(family: str, type_name: str, path: Path) -> Path:
    """A random model with the metadata, tokenizer and tensor names of `tests/data/arch/<family>`, in other sizes."""
    has_experts = family.endswith("moe")
    rng = np.random.default_rng(_SEED_OF_EXPERTS if has_experts else _SEED)
    width = WIDTHS[type_name]
    dim = width // HEADS
    sizes = {
        "embedding_length": width,
        "feed_forward_length": width,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": dim,
        "attention.value_length": dim,
        "rope.dimension_count": dim,
    }
    if has_experts:
        sizes["expert_feed_forward_length"] = width
    rows = {"attn_k": KV_HEADS * dim, "attn_v": KV_HEADS * dim}
    with gguf.read(ARCH / family / "model.gguf") as file:
        metadata: dict[str, Any] = {
            key: value if isinstance(value, str | int | float | np.ndarray) else list(value)  # arrays of strings
            for key, value in file.metadata.items()
        }
        metadata.update({f"{family}.{key}": Typed(U32, value) for key, value in sizes.items()})
        shapes = {name: info.shape for name, info in file.tensors.items()}
    # Where the embedding is the output matrix too, a large one would have each token predict itself.
    embedding = 1.0 if "output.weight" in shapes else 0.25
    tensors: dict[str, Any] = {}
    for name, shape in shapes.items():
        part = name.removesuffix(".weight").rpartition(".")[2]
        if len(shape) == 1:
            size = dim if part in ("attn_q_norm", "attn_k_norm") else width
            mean = _LOGITS / embedding if part == "output_norm" else 1 / embedding if "post" in part else 1.0
            tensors[name] = rng.normal(mean, 0.1, size).astype(np.float32)
        elif part == "ffn_gate_inp":
            tensors[name] = rng.normal(0, 4 * width**-0.5, (shape[0], width)).astype(np.float32)
        elif len(shape) == 3:  # experts
            made = _matrix(type_name, (shape[0] * width, width), rng, 1.0)
            tensors[name] = replace(made, shape=(shape[0], width, width))
        else:
            count = shape[0] if part in ("output", "token_embd") else rows.get(part, width)
            tensors[name] = _matrix(type_name, (count, width), rng, embedding if part == "token_embd" else 1.0)
    return write_gguf(path, metadata, tensors)


def _matrix(type_name: str, shape: tuple[int, int], rng: np.random.Generator, scale: float) -> Any:
    """Of elements with mean 0 and standard deviation scale / sqrt(columns)."""
    rows, cols = shape
    scale *= cols**-0.5
    if type_name == "F16":
        return rng.normal(0, scale, shape).astype(np.float16)
    made = QuantTensor.random(type_name, rows, cols, rng)
    blocks = made.blocks.reshape(rows, -1, made.type.type_size)
    # Q4_K: a weight is d * scale * quant - least * minimum, with means 31.5 * 7.5 * d and 31.5 * least.
    d = rng.uniform(0.5, 1.5, blocks.shape[:2]) * scale / 250
    for offset, values in ((0, d), (2, 7.5 * d)):
        blocks[..., offset : offset + 2] = values.astype(np.float16)[..., None].view(np.uint8)
    return Blocks(made.type.value, shape, blocks.tobytes())
