"""The table of architectures: what a GGUF of each family holds, and what it leaves unsaid.

A family whose mixers and feed-forwards exist is one row here and no code. Names are GGUF's `general.architecture`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from forge.config import Activation, NormKind, RopeStyle, RouterScores

ExpertActivation = Literal["silu", "gelu", "clamped_swiglu", "relu2"]
"""silu and gelu of a gate times an up, gpt-oss' of both, and the square of an up where it is positive."""
SublayerKind = Literal["attention", "gated", "plain", "experts"]
"""attention is a mixer. Feed-forwards: gated, down(activation(gate(x)) * up(x)), plain, down(activation(up(x))), and
experts, a mixture of feed-forwards."""


@dataclass(frozen=True, slots=True)
class Sublayer:
    """One half of a layer, and its tensors in a file. A name without suffix is a weight."""

    kind: SublayerKind
    tensors: str
    """Tensors that every such layer has.

    In any family a file may hold q, k and v joined as attn_qkv (`--fuse-qkv` of llama.cpp's converter), and gate and up
    as an ffn_up of twice the rows (phi3's files)."""
    optional: str = ""
    """Tensors that such a layer may have. Norms are in all such layers of a file or in none. A feed-forward without
    ffn_norm reads the mixer's input."""


_ATTENTION = "attn_norm attn_q attn_k attn_v attn_output"
_FEED_FORWARD = "ffn_norm ffn_gate ffn_up ffn_down"
_QK_NORM = "attn_q_norm attn_k_norm"
_QKV_BIAS = "attn_q.bias attn_k.bias attn_v.bias"
_ATTENTION_BIAS = f"{_QKV_BIAS} attn_output.bias"

_WITH_BIASES = (Sublayer("attention", _ATTENTION, _ATTENTION_BIAS),)
_GATED = (Sublayer("gated", _FEED_FORWARD),)
_EXPERTS = "ffn_norm ffn_gate_inp ffn_gate_exps ffn_up_exps ffn_down_exps"
_SHARED_EXPERT = "ffn_gate_shexp ffn_up_shexp ffn_down_shexp"


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """How a family chooses experts, where its files do not say."""

    scores: RouterScores = "softmax"
    renormalizes: bool = True
    """The weights of the chosen experts are divided by their sum."""
    activation: ExpertActivation = "silu"
    weighs_input: bool = False
    """An expert's weight multiplies its input, not its result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """What all models of a family share."""

    rope: RopeStyle = "neox"
    """The pairing its checkpoints are converted for: Q and K of llama are permuted to interleaved pairs."""
    mixers: tuple[Sublayer, ...] = _WITH_BIASES
    """The layers' mixers in turn, repeated to the last layer: (other, other, other, attention) makes every fourth layer
    attention."""
    feed_forwards: tuple[Sublayer, ...] = _GATED
    """The layers' feed-forwards in turn, repeated, behind those of the first layers."""
    first_feed_forwards: tuple[Sublayer, ...] = ()
    """The feed-forwards of the first layers, one for each."""
    experts: Sublayer | None = None
    """The feed-forward of layers with experts, in models that have experts. None = the family has none."""
    router: Router = Router()
    norm: NormKind = "rms"
    activation: Activation = "silu"
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

    def layers(self, count: int, with_experts: Sequence[bool] = ()) -> list[tuple[Sublayer, Sublayer]]:
        """The mixer and the feed-forward of each of the layers. with_experts: Whether each layer has experts."""
        mixers = [self.mixers[index % len(self.mixers)] for index in range(count)]
        later = range(count - len(self.first_feed_forwards))
        repeated = [self.feed_forwards[index % len(self.feed_forwards)] for index in later]
        feed_forwards = [*self.first_feed_forwards[:count], *repeated]
        if self.experts is not None and with_experts:
            experts = self.experts
            feed_forwards = [experts if has else f for has, f in zip(with_experts, feed_forwards, strict=True)]
        return list(zip(mixers, feed_forwards, strict=True))


_LLAMA = Arch(
    rope="interleaved",
    feed_forwards=(Sublayer("gated", _FEED_FORWARD, "ffn_gate.bias ffn_up.bias ffn_down.bias"),),
    experts=Sublayer("experts", _EXPERTS),  # Mixtral
    global_every=1,
)

ARCHS: dict[str, Arch] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,  # converters write llama
    "mistral3": _LLAMA,
    "qwen2": Arch(mixers=(Sublayer("attention", f"{_ATTENTION} {_QKV_BIAS}", "attn_output.bias"),), global_every=1),
    "qwen3": Arch(mixers=(Sublayer("attention", f"{_ATTENTION} {_QK_NORM}", _ATTENTION_BIAS),), global_every=1),
    "qwen3moe": Arch(
        mixers=(Sublayer("attention", f"{_ATTENTION} {_QK_NORM}", _ATTENTION_BIAS),),
        experts=Sublayer("experts", _EXPERTS),
        global_every=1,
    ),
    "qwen2moe": Arch(
        mixers=(Sublayer("attention", f"{_ATTENTION} {_QKV_BIAS}", "attn_output.bias"),),
        experts=Sublayer("experts", f"{_EXPERTS} {_SHARED_EXPERT} ffn_gate_inp_shexp"),
        router=Router(renormalizes=False),
        global_every=1,
    ),
    "gemma": Arch(activation="gelu", scales_embedding=True),
    "gemma2": Arch(
        mixers=(Sublayer("attention", f"{_ATTENTION} post_attention_norm", _ATTENTION_BIAS),),
        feed_forwards=(Sublayer("gated", f"{_FEED_FORWARD} post_ffw_norm"),),
        activation="gelu",
        scales_embedding=True,
        default_window=4096,
        default_softcaps=(50.0, 30.0),
        global_every=2,
        width_scaled_layers=46,
    ),
    "gemma3": Arch(
        mixers=(Sublayer("attention", f"{_ATTENTION} {_QK_NORM} post_attention_norm", _ATTENTION_BIAS),),
        feed_forwards=(Sublayer("gated", f"{_FEED_FORWARD} post_ffw_norm"),),
        activation="gelu",
        scales_embedding=True,
        global_every=6,
        local_rope_base=10_000.0,
        width_scaled_layers=62,
    ),
    "phi3": Arch(mixers=(Sublayer("attention", _ATTENTION, _QKV_BIAS),)),
    "stablelm": Arch(
        # StableLM 2 12B has no ffn_norm, but norms of q and k
        mixers=(Sublayer("attention", f"{_ATTENTION} attn_norm.bias", f"{_QKV_BIAS} {_QK_NORM}"),),
        feed_forwards=(Sublayer("gated", "ffn_gate ffn_up ffn_down", "ffn_norm ffn_norm.bias"),),
        norm="layer",
        norms_each_head=True,
    ),
    "starcoder2": Arch(
        mixers=(Sublayer("attention", f"{_ATTENTION} attn_norm.bias {_ATTENTION_BIAS}"),),
        feed_forwards=(Sublayer("plain", "ffn_norm ffn_norm.bias ffn_up ffn_up.bias ffn_down ffn_down.bias"),),
        norm="layer",
        activation="gelu",
    ),
}

UNUSED_TENSORS = re.compile(
    r"(blk\.\d+\.)?(rope_freqs|attn_rot_embd|attn\.rot_embd|rope_factors_(long|short))\.weight|(blk\.\d+\.)?(nextn|mtp)\..+"
)
"""Tensors that a file may hold beside its model's own: RoPE factors, rotation tables, multi-token-prediction layers."""
