"""The attention mixer: each token reads the values of earlier tokens by what its query finds in their keys."""

from __future__ import annotations

from typing import Any

from forge.config import Hook
from forge.models.batch import Batch
from forge.models.layer_tensors import LayerTensors
from forge.models.layers import Linear
from forge.models.qkv_edits import QKVEdits
from forge.models.residual import ResidualStream
from forge.models.rope import RotaryEmbedding
from forge.ops.attention import AttentionSpec, paged_attention
from forge.ops.decode_attention import decode_attention
from forge.ops.kv_cache import take_slots
from forge.ops.rope import RopeArgs, rope_append_kv
from forge.state.model_state import ModelState


class Attention:
    """Causal attention of H query heads over G heads of cached keys and values.

    One product computes q, k and v. Attributes that hold weights are named like the file's tensors. Sources:
    arXiv:1706.03762, arXiv:2305.13245 (GQA).
    """

    def __init__(self, tensors: LayerTensors, ropes: list[RotaryEmbedding]) -> None:
        """ropes: The model's, as of `ModelConfig`."""
        config, self.index = tensors.config, tensors.index
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.attn_norm = tensors.norm_before("attn_norm")
        self.attn_qkv = tensors.linear({"attn_q": queries, "attn_k": keys, "attn_v": keys}, config.width, "attn_qkv")
        self.attn_qkv_bias: Any = None
        """float32 ((H + 2G) * D,), which the RoPE op adds; None where `attn_qkv` has the bias, or no bias exists."""
        self.attn_q_norm = self.attn_k_norm = None
        self.edits = QKVEdits(tensors, ropes)
        self.rope = self.edits.rope
        if not self.edits:
            self.attn_qkv_bias, self.attn_qkv.bias = self.attn_qkv.bias, None
        if not self.edits.norms and (tensors.has_norm("attn_q_norm") or tensors.has_norm("attn_k_norm")):
            self.attn_q_norm = tensors.vector("attn_q_norm", config.head_dim)
            self.attn_k_norm = tensors.vector("attn_k_norm", config.head_dim)
        self.attn_output = tensors.linear({"attn_output": config.width}, queries)
        self.post_attention_norm = tensors.norm("post_attention_norm")
        window = config.layer_windows[self.index]
        self.spec = AttentionSpec(config.attention_scale, window, config.attention_softcap, tensors.is_deterministic)
        self.norm_eps = config.norm_eps

    def linears(self) -> list[Linear]:
        """The layer's matrix products, in the order of their launches."""
        return [self.attn_qkv, self.attn_output]

    def __call__(self, stream: ResidualStream, batch: Batch, state: ModelState, hook: Hook | None) -> None:
        """Add the result to the stream, and keys and values of the batch's T tokens to the state."""
        kv, table = state[self.index]
        slot_mapping, page_table = batch.tables[table]
        # A hook sees what that op does not write, and it adds up in another order than the ops of prompts.
        is_one_op = batch.is_decode and hook is None and not self.spec.is_deterministic
        operand = stream.normed(self.attn_norm)  # (T, E)
        split_k = "allowed" if is_one_op and not self.edits else "never"
        qkv = self.attn_qkv(operand, split_k=split_k)  # (T, (H + 2G) * D)
        self.edits(qkv, batch)
        norms, tables, style = (self.attn_q_norm, self.attn_k_norm), self.rope, self.rope.config.style
        rope = RopeArgs(self.attn_qkv_bias, *norms, tables.cos_sin, tables.query_scale, self.norm_eps)
        if is_one_op:
            where = batch.lengths, slot_mapping, kv, page_table
            attended = decode_attention(qkv, rope, *where, self.spec, style=style)
        else:
            q = rope_append_kv(qkv, rope, batch.positions, slot_mapping, kv, style=style)  # (T, H, D)
            if hook:
                hook(f"blk.{self.index}.attn_q", q)
                hook(f"blk.{self.index}.attn_k", take_slots(slot_mapping, kv.k))  # (T, G, D)
            attended = paged_attention(q, kv, batch.starts, batch.lengths, page_table, self.spec)
        attended = attended.reshape(len(attended), -1)  # (T, H * D)
        stream.add(self.attn_output, attended, self.post_attention_norm)
