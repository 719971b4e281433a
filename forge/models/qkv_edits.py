"""What some families do to the product of queries, keys and values beyond what the RoPE op does."""

from __future__ import annotations

from typing import Any

from forge.models.arch import ARCHS
from forge.models.batch import Batch
from forge.models.layer_tensors import LayerTensors
from forge.models.rope import RotaryEmbedding
from forge.ops.qkv import clamp, rmsnorm_whole, rotate_heads
from forge.ops.rope import layernorm_heads


class QKVEdits:
    """Edits of the QKV product in place, a launch each: it is cut, its q and k are normed or rotated.

    The product is (T, C), as of `Attention`.

    norms: Weights of norms of q and k that the RoPE op does not have: of each head's LayerNorm, (H, D) and (G, D), or
    of the RMS norm of all heads together, (H * D,) and (G * D,).
    """

    def __init__(self, tensors: LayerTensors, ropes: list[RotaryEmbedding]) -> None:
        """ropes: The model's, as of `ModelConfig`."""
        rope = ropes[tensors.config.layer_ropes[tensors.index]]
        config, arch = tensors.config, ARCHS[tensors.config.arch]
        heads, index = config.num_heads, tensors.index
        kv_heads, dim = config.layer_kv_heads[index], config.layer_head_dims[index]
        self.head_dim, self.norm_eps, self.clamp = dim, config.norm_eps, config.qkv_clamp
        self.norms: tuple[Any, Any] | None = None
        has_norms = tensors.has("attn_q_norm") or tensors.has("attn_k_norm")
        self.norms_heads = arch.qk_norm == "layer_head"
        if has_norms and self.norms_heads:
            self.norms = tensors.heads("attn_q_norm", heads), tensors.heads("attn_k_norm", kv_heads)
        elif has_norms and arch.qk_norm == "rms_whole":
            self.norms = tensors.vector("attn_q_norm", heads * dim), tensors.vector("attn_k_norm", kv_heads * dim)
        self.rotated_heads = heads + kv_heads
        self.rotation = rope if has_norms and arch.qk_norm_after_rope else None
        """The rotation, where norms of q and k come behind it. They commute but for the weights."""
        self.rope = ropes[-1] if self.rotation else rope
        """The rotation that is left to the RoPE op."""

    def __bool__(self) -> bool:
        return bool(self.norms or self.clamp or self.rotation)

    def __call__(self, qkv: Any, batch: Batch) -> None:
        """qkv: float32 (T, C), biases added."""
        if self.clamp:
            clamp(qkv, self.clamp)
        if self.norms:
            (layernorm_heads if self.norms_heads else rmsnorm_whole)(qkv, *self.norms, self.norm_eps)
        if self.rotation:
            where = self.rotation.cos_sin, batch.positions
            rotate_heads(qkv, *where, self.rotated_heads, self.head_dim, style=self.rotation.config.style)
