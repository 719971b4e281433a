"""The table of architectures: what a GGUF of each family holds, and what it leaves unsaid.

A family that is attention + gated feed-forward is one row here and no code. Names are GGUF's `general.architecture`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from forge.config import Activation, NormKind, RopeStyle


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """What all models of a family share."""

    rope: RopeStyle
    """The pairing its checkpoints are converted for: Q and K of llama are permuted to interleaved pairs."""
    layer: str
    """Tensors that every layer has; a name without suffix is a weight.

    In any family a file may hold q, k and v joined as attn_qkv (`--fuse-qkv` of llama.cpp's converter), and gate and up
    as an ffn_up of twice the rows (phi3's files)."""
    layer_optional: str = ""
    """Tensors that a layer may have. Norms are in all layers of a file or in none: without ffn_norm, attention and
    feed-forward have the same input."""
    norm: NormKind = "rms"
    activation: Activation = "silu"
    gated: bool = True
    norms_each_head: bool = False
    """Norms of q and k are LayerNorms with weights of each head's own, not one RMS norm for all heads."""
    scales_embedding: bool = False
    """Embeddings are multiplied by sqrt(E)."""
    default_window: int = 0
    """Sliding window where the file names none; 0 = none."""
    default_softcaps: tuple[float, float] = (0.0, 0.0)
    """Soft caps of scores and of logits where the file names none; 0 = none."""
    global_every: int = 0
    """With a window: every Nth layer attends to everything; 0 = every layer has the window; 1 = no layer has it."""
    local_rope_base: float | None = None
    """RoPE base of windowed layers where the file names none, without RoPE scaling; None = as in global layers."""
    width_scaled_layers: int | None = None
    """The model of this many layers scales scores by sqrt(E/H), not by sqrt(D)."""


_ATTENTION = "attn_norm attn_q attn_k attn_v attn_output"
_FEED_FORWARD = "ffn_norm ffn_gate ffn_up ffn_down"
_QK_NORM = "attn_q_norm attn_k_norm"
_POST_NORM = "post_attention_norm post_ffw_norm"
_QKV_BIAS = "attn_q.bias attn_k.bias attn_v.bias"
_ATTENTION_BIAS = f"{_QKV_BIAS} attn_output.bias"
_BIASES = f"{_ATTENTION_BIAS} ffn_gate.bias ffn_up.bias ffn_down.bias"

_LLAMA = Arch(rope="interleaved", layer=f"{_ATTENTION} {_FEED_FORWARD}", layer_optional=_BIASES, global_every=1)

ARCHS: dict[str, Arch] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,  # converters write llama
    "mistral3": _LLAMA,
    "qwen2": Arch(
        rope="neox",
        layer=f"{_ATTENTION} {_QKV_BIAS} {_FEED_FORWARD}",
        layer_optional="attn_output.bias",
        global_every=1,
    ),
    "qwen3": Arch(
        rope="neox", layer=f"{_ATTENTION} {_QK_NORM} {_FEED_FORWARD}", layer_optional=_ATTENTION_BIAS, global_every=1
    ),
    "gemma": Arch(
        rope="neox",
        layer=f"{_ATTENTION} {_FEED_FORWARD}",
        layer_optional=_ATTENTION_BIAS,
        activation="gelu",
        scales_embedding=True,
    ),
    "gemma2": Arch(
        rope="neox",
        layer=f"{_ATTENTION} {_FEED_FORWARD} {_POST_NORM}",
        layer_optional=_ATTENTION_BIAS,
        activation="gelu",
        scales_embedding=True,
        default_window=4096,
        default_softcaps=(50.0, 30.0),
        global_every=2,
        width_scaled_layers=46,
    ),
    "gemma3": Arch(
        rope="neox",
        layer=f"{_ATTENTION} {_QK_NORM} {_FEED_FORWARD} {_POST_NORM}",
        layer_optional=_ATTENTION_BIAS,
        activation="gelu",
        scales_embedding=True,
        global_every=6,
        local_rope_base=10_000.0,
        width_scaled_layers=62,
    ),
    "phi3": Arch(rope="neox", layer=f"{_ATTENTION} {_FEED_FORWARD}", layer_optional=_QKV_BIAS),
    "stablelm": Arch(
        rope="neox",
        layer=f"{_ATTENTION} attn_norm.bias ffn_gate ffn_up ffn_down",
        # StableLM 2 12B has no ffn_norm, but norms of q and k
        layer_optional=f"{_QKV_BIAS} ffn_norm ffn_norm.bias {_QK_NORM}",
        norm="layer",
        norms_each_head=True,
    ),
    "starcoder2": Arch(
        rope="neox",
        layer=f"{_ATTENTION} attn_norm.bias {_QKV_BIAS} attn_output.bias "
        "ffn_norm ffn_norm.bias ffn_up ffn_up.bias ffn_down ffn_down.bias",
        norm="layer",
        activation="gelu",
        gated=False,
    ),
}

UNUSED_TENSORS = re.compile(
    r"(blk\.\d+\.)?(rope_freqs|attn_rot_embd|attn\.rot_embd|rope_factors_(long|short))\.weight|(blk\.\d+\.)?(nextn|mtp)\..+"
)
"""Tensors that a file may hold beside its model's own: RoPE factors, rotation tables, multi-token-prediction layers."""
