"""The attention mixer: each token reads the values of earlier tokens by what its query finds in their keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from forge.config import ModelConfig
from forge.models.arch import ARCHS
from forge.models.attention_pattern import attend_by, patterns
from forge.models.batch import Batch
from forge.models.hooks import ACT, F32, Hook, Points, Shape, points_in
from forge.models.layer_tensors import LayerTensors
from forge.models.layers import Linear
from forge.models.qkv_edits import QKVEdits
from forge.models.residual import ResidualStream
from forge.models.rope import RotaryEmbedding
from forge.ops.activation import sigmoid_gate
from forge.ops.attention import MAX_HEAD_DIM, AttentionSpec, paged_attention
from forge.ops.decode_attention import decode_attention
from forge.ops.kv_cache import take_slots
from forge.ops.rope import RopeArgs, rope_append_kv, rope_queries
from forge.state.model_state import ModelState


def spec_of(config: ModelConfig, layer: int, sinks: Any, *, is_deterministic: bool = False) -> AttentionSpec:
    """How a layer makes weights of scores. sinks: float32 (H,) or None."""
    window = config.layer_windows[layer]
    is_chunked = ARCHS[config.arch].is_chunked and window > 0
    return AttentionSpec(config.attention_scale, window, config.attention_softcap, is_deterministic, sinks, is_chunked)


class Attention:
    """Causal attention of H query heads over G heads of cached keys and values.

    One product computes q, k and v, and gates of the results. A layer may have the keys for values, or read the keys
    and values of an earlier layer. The product is (T, C): C is (H + 2G) * D, (H + G) * D where keys are the values, and
    H * D where another layer's are read, and in each case as many more as there are gates. Attributes that hold weights
    are named like the file's tensors. Sources: arXiv:1706.03762, arXiv:2305.13245 (GQA).
    """

    def __init__(self, tensors: LayerTensors, ropes: list[RotaryEmbedding]) -> None:
        """ropes: The model's, as of `ModelConfig`."""
        config, self.index = tensors.config, tensors.index
        self.kv_layer = config.layer_kv[self.index]
        self.head_dim, self.kv_heads = config.layer_head_dims[self.index], config.layer_kv_heads[self.index]
        self.gates = config.num_gates if tensors.has("attn_gate") else 0
        self.attn_norm = tensors.norm_before("attn_norm")
        self.values_are_keys = False
        self.attn_qkv = self._load_qkv(tensors)
        if self.attn_norm is None:
            self.attn_qkv.factor = config.stream_scale
        self.attn_qkv_bias: Any = None
        """float32, for the RoPE op, which adds it; None where `attn_qkv` has the bias, or no bias exists."""
        self.attn_q_norm = self.attn_k_norm = self.attn_v_norm = None
        self.edits = QKVEdits(tensors, ropes)
        self.rope = self.edits.rope
        if not self.edits:
            # The RoPE op would be given the bias of the gates, which it does not add.
            assert not (self.gates and self.attn_qkv.bias is not None)
            self.attn_qkv_bias, self.attn_qkv.bias = self.attn_qkv.bias, None
        if not self.edits.norms and (tensors.has("attn_q_norm") or tensors.has("attn_k_norm")):
            self.attn_q_norm = tensors.vector("attn_q_norm", self.head_dim)
            if self.has_kv:
                self.attn_k_norm = tensors.vector("attn_k_norm", self.head_dim)
        if ARCHS[config.arch].norms_heads_of(config.num_experts) and self.rope.config.dim:
            self.attn_q_norm = self.attn_k_norm = tensors.ones(self.head_dim)
        if ARCHS[config.arch].norms_values:
            self.attn_v_norm = tensors.ones(self.head_dim)
        self.attn_output = tensors.linear({"attn_output": config.width}, config.num_heads * self.head_dim)
        self.post_attention_norm = tensors.norm_behind("post_attention_norm")
        sinks = tensors.row("attn_sinks", config.num_heads) if tensors.has("attn_sinks") else None
        self.spec = spec_of(config, self.index, sinks, is_deterministic=tensors.is_deterministic)
        self.norm_eps = config.norm_eps

    @property
    def has_kv(self) -> bool:
        """Whether the layer has keys and values of its own."""
        return self.kv_layer == self.index

    def _load_qkv(self, tensors: LayerTensors) -> Linear:
        config = tensors.config
        keys = config.layer_kv_heads[self.index] * self.head_dim
        rows = {"attn_q": config.num_heads * self.head_dim}
        if self.has_kv:
            is_joined = tensors.is_stored("attn_qkv")
            self.values_are_keys = not is_joined and not self._has_values(tensors)
            rows |= {"attn_k": keys} if self.values_are_keys else {"attn_k": keys, "attn_v": keys}
            if self.gates and is_joined:
                rows = {"attn_qkv": sum(rows.values())}
        else:  # files that were made of checkpoints with all matrices may have them
            for tensor in ("attn_k", "attn_v", "attn_k_norm"):
                tensors.ignore(tensor)
        if self.gates:
            return tensors.linear(rows | {"attn_gate": self.gates}, config.width)
        return tensors.linear(rows, config.width, "attn_qkv" if self.has_kv else None)

    def _has_values(self, tensors: LayerTensors) -> bool:
        """Whether the layer has a matrix for values: those with a window do, and the others if one of them does."""
        if tensors.is_required("attn_v") or tensors.config.layer_windows[self.index]:
            return True
        windows = tensors.config.layer_windows
        return any(not window and tensors.is_stored("attn_v", layer) for layer, window in enumerate(windows))

    def linears(self) -> list[Linear]:
        """The layer's matrix products, in the order of their launches."""
        return [self.attn_qkv, self.attn_output]

    def __call__(self, stream: ResidualStream, batch: Batch, state: ModelState, hook: Hook | None) -> None:
        """Add the result to the stream, and keys and values of the batch's T tokens to the state."""
        # A hook sees what that op does not write, and it adds up in another order than the ops of prompts.
        points = points_in(hook, f"blk.{self.index}.attn.")
        is_one_op = batch.is_decode and points is None and not self.spec.is_deterministic
        is_one_op = is_one_op and self.has_kv and self.head_dim <= MAX_HEAD_DIM
        operand = stream.normed(self.attn_norm)  # (T, E)
        if points:
            operand = points.operand("in", operand, self.attn_qkv.factor)
        split_k = "allowed" if is_one_op and not self.edits else "never"
        qkv = self.attn_qkv(operand, batch.adapters, split_k=split_k)  # (T, C)
        self.edits(qkv, batch)
        attended = self._decode(qkv, batch, state) if is_one_op else self._attend(qkv, batch, state, points)
        shape = attended.shape
        attended = attended.reshape(len(attended), -1)  # (T, H * D)
        if self.gates:
            attended = sigmoid_gate(attended, qkv, self.gates)
        if points:
            attended = points.at("heads", attended.reshape(shape)).reshape(attended.shape)
        stream.add(self.attn_output, attended, self.post_attention_norm, batch.adapters, points, "out")

    def points(self) -> dict[str, tuple[Shape, str]]:
        """Of hooks: what is read, what attention reads and its weights, what the second product reads, what is
        added."""
        width, inner = self.attn_output.weight.shape
        heads = inner // self.head_dim
        of_heads: tuple[Shape, str] = ("T", heads, self.head_dim), ACT
        of_keys: tuple[Shape, str] = ("T", self.kv_heads, self.head_dim), ACT
        own = {"k": of_keys, "v": of_keys} if self.has_kv else {}
        before: dict[str, tuple[Shape, str]] = {"in": (("T", width), ACT), "q": of_heads, **own}
        return before | {"pattern": ((heads, "T", "S"), F32), "heads": of_heads, "out": (("T", width), F32)}

    def _rope_args(self) -> RopeArgs:
        norms, tables = (self.attn_q_norm, self.attn_k_norm), (self.rope.cos_sin, self.rope.query_scale)
        args = RopeArgs(self.attn_qkv_bias, *norms, *tables, self.norm_eps)
        return replace(args, v_norm=self.attn_v_norm, values_are_keys=self.values_are_keys, rest=self.gates)

    def _decode(self, qkv: Any, batch: Batch, state: ModelState) -> Any:
        """The attended values (T, H, D) of one token of each sequence, in one launch."""
        kv, table = state[self.kv_layer]
        slot_mapping, page_table = batch.tables[table]
        where = batch.lengths, slot_mapping, kv, page_table
        return decode_attention(qkv, self._rope_args(), *where, self.spec, style=self.rope.config.style)

    def _attend(self, qkv: Any, batch: Batch, state: ModelState, points: Points | None) -> Any:
        """The attended values (T, H, D) of any batch."""
        kv, table = state[self.kv_layer]
        slot_mapping, page_table = batch.tables[table]
        rope, style = self._rope_args(), self.rope.config.style
        if self.has_kv:
            q = rope_append_kv(qkv, rope, batch.positions, slot_mapping, kv, style=style)  # (T, H, D)
        else:
            q = rope_queries(qkv.reshape(len(qkv), -1, self.head_dim), rope, batch.positions, style=style)
        if points:
            q = points.at("q", q)
            for name, pages in (("k", kv.k), ("v", kv.v)) if self.has_kv else ():
                if points.wants(name):
                    seen = take_slots(slot_mapping, pages)  # (T, G, D)
                    found = points.at(name, seen)
                    if found is not seen:
                        pages.reshape(-1, *pages.shape[2:])[slot_mapping] = found
        attended = paged_attention(q, kv, batch.starts, batch.lengths, page_table, self.spec)
        if points and points.wants("pattern"):
            weights = patterns(q, kv, batch, page_table, self.spec)
            found = points.at("pattern", weights)
            if found is not weights:
                attend_by(weights, found, attended, kv, batch, page_table, self.spec)
        return attended
