"""Headers of usual models in usual types, made up: what they launch can be recorded without their files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from forge.formats.checkpoint import TensorInfo
from forge.formats.ggml import GGMLType, nbytes
from forge.formats.gguf import GGUF
from forge.formats.gguf_header import Header

_MODELS = (  # E, H, G, F, V of Llama 3.2 1B and 3.1 8B
    (2048, 32, 8, 8192, 128_256),
    (4096, 32, 8, 14_336, 128_256),
)
_MIXTURE, _EXPERTS = (2048, 32, 4, 768, 151_936), (128, 8)
"""The same of Qwen3 30B-A3B, for each of its experts, and how many of them there are and compute a token."""
_TYPES = (GGMLType.F16, GGMLType.Q8_0, GGMLType.Q6_K, GGMLType.Q4_K)
"""Types of matrices that most files have."""


def usual_models() -> Iterator[GGUF]:
    """Files of one layer, each with all matrices in one type."""
    for sizes in _MODELS:
        for type in _TYPES:
            yield _llama(type, *sizes)
    yield _llama(GGMLType.Q4_K, *_MIXTURE, experts=_EXPERTS)


def _llama(
    type: GGMLType,
    width: int,
    heads: int,
    kv_heads: int,
    ffn: int,
    vocabulary: int,
    experts: tuple[int, int] | None = None,
) -> GGUF:
    kv_width = kv_heads * width // heads
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.context_length": 131_072,
        "llama.embedding_length": width,
        "llama.feed_forward_length": ffn,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (vocabulary, width),
        "output": (vocabulary, width),
        "output_norm": (width,),
        "blk.0.attn_norm": (width,),
        "blk.0.attn_q": (width, width),
        "blk.0.attn_k": (kv_width, width),
        "blk.0.attn_v": (kv_width, width),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_norm": (width,),
    }
    matrices = {"ffn_gate": (ffn, width), "ffn_up": (ffn, width), "ffn_down": (width, ffn)}
    if experts is None:
        shapes |= {f"blk.0.{name}": shape for name, shape in matrices.items()}
    else:
        count, used = experts
        metadata |= {"llama.expert_count": count, "llama.expert_used_count": used}
        shapes |= {f"blk.0.{name}_exps": (count, *shape) for name, shape in matrices.items()}
        shapes["blk.0.ffn_gate_inp"] = (count, width)
    tensors = {}
    for name, shape in shapes.items():
        kept = GGMLType.F32 if len(shape) == 1 or name.endswith("ffn_gate_inp") else type
        tensors[f"{name}.weight"] = TensorInfo(f"{name}.weight", shape, kept, nbytes(kept, shape), 0)
    source: Any = SimpleNamespace(check_path=lambda: None, close=lambda: None)  # in the place of a file
    return GGUF([Header(Path(f"llama-{width}-{type.name}.gguf"), source, 3, metadata, tensors, 0)])
