"""What a row of the table of architectures says: the layers' sublayers, their tensors, and what files leave unsaid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from forge.config import Activation, NormKind, RopeStyle, RouterScores

BARE_ATTENTION = "attn_q attn_k attn_v attn_output"
ATTENTION = f"attn_norm {BARE_ATTENTION}"
QK_NORM = "attn_q_norm attn_k_norm"
QKV_BIAS = "attn_q.bias attn_k.bias attn_v.bias"
ATTENTION_BIAS = f"{QKV_BIAS} attn_output.bias"
FEED_FORWARD = "ffn_norm ffn_gate ffn_up ffn_down"
BARE_FEED_FORWARD = "ffn_gate ffn_up ffn_down"
FEED_FORWARD_BIAS = "ffn_gate.bias ffn_up.bias ffn_down.bias"
BARE_EXPERTS = "ffn_gate_inp ffn_gate_exps ffn_up_exps ffn_down_exps"
EXPERTS = f"ffn_norm {BARE_EXPERTS}"
SHARED_EXPERT = "ffn_gate_shexp ffn_up_shexp ffn_down_shexp"
PLAIN_WITH_BIAS = "ffn_up ffn_up.bias ffn_down ffn_down.bias"

ExpertActivation = Literal["silu", "gelu", "clamped_swiglu", "relu2"]
"""silu and gelu of a gate times an up, gpt-oss' of both, and the square of an up where it is positive."""
SublayerKind = Literal["attention", "gated", "plain", "experts", "beside_experts", "end", "outer"]
"""attention is a mixer. Feed-forwards: gated, down(activation(gate(x)) * up(x)), plain, down(activation(up(x))),
experts, a mixture of feed-forwards, and beside_experts, a gated one and a mixture. end is what comes behind both in a
layer, outer what lies outside of layers."""
QKNorm = Literal["rms_head", "layer_head", "rms_whole"]
"""Norms of q and k: RMS of each head with one weight for all (D,), LayerNorm of each head with weights of its own
(H, D), or RMS of all heads together (H * D,)."""


@dataclass(frozen=True, slots=True)
class Sublayer:
    """One half of a layer, and its tensors in a file. A name without suffix is a weight.

    ffn_norm=post_attention_norm: The file has ffn_norm under another name; of several names, divided by |, under the
    first one that is there. attn_norm=1: The file has no such tensor, and its numbers are ones.
    """

    kind: SublayerKind
    tensors: str
    """Tensors that every such layer has. Where attn_v is optional, the layers without a window may all have the keys
    for values.

    In any family a file may hold q, k and v joined as attn_qkv (`--fuse-qkv` of llama.cpp's converter), and gate and up
    as an ffn_up of twice the rows (phi3's files)."""
    optional: str = ""
    """Tensors that such a layer may have. All such layers of a file have one or none does."""


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

    outer: str = "output_norm"
    """Tensors outside of layers that every file has, beside token_embd: as of a `Sublayer`. position_embd holds learned
    positions."""
    outer_optional: str = "output"
    """Tensors outside of layers that a file may have. Without output the embedding is the output's matrix."""
    rope: RopeStyle = "neox"
    """The pairing its checkpoints are converted for: Q and K of llama are permuted to interleaved pairs."""
    nope: Literal["none", "global", "all"] = "none"
    """Layers without rotation: those without a window of a model that has one, or all."""
    nope_temperature: tuple[float, int] | None = None
    """In layers without rotation queries grow with the position p, by 1 + b * ln(1 + floor((p + 1) / n)), which Llama 4
    calls attention temperature tuning: b and n where the file names none; None = they do not."""
    nope_every: int = 0
    """Every Nth layer is without rotation; 0 = none is."""
    has_rope_factors: bool = False
    """Every file has rope_freqs, which divide the frequencies."""
    nope_key: bool = False
    """A file says with rope.scaling.finetuned = false that no layer has a rotation."""
    mixers: tuple[Sublayer, ...] = (Sublayer("attention", ATTENTION, ATTENTION_BIAS),)
    """The layers' mixers in turn, repeated to the last layer: (other, other, other, attention) makes every fourth layer
    attention."""
    feed_forwards: tuple[Sublayer, ...] = (Sublayer("gated", FEED_FORWARD),)
    """The layers' feed-forwards in turn, repeated."""
    experts: Sublayer | None = None
    """The feed-forward of layers with experts, in models that have experts. None = the family has none."""
    router: Router = Router()
    end: Sublayer | None = None
    """What comes behind mixer and feed-forward in all layers; None = nothing."""
    norm: NormKind = "rms"
    activation: Activation = "silu"
    parallel: Literal["never", "always", "key", "without_ffn_norm"] = "never"
    """When attention and feed-forward both read the stream before the layer: by use_parallel_residual of the file, or
    where layers have no ffn_norm. Without a ffn_norm both read the same operand."""
    qk_norm: QKNorm = "rms_head"
    qk_norm_after_rope: bool = False
    scales_embedding: bool = False
    """Embeddings are multiplied by sqrt(E)."""
    has_multipliers: bool = False
    """Files have embedding_scale and residual_scale."""
    logit_scale: Literal["none", "factor", "divisor"] = "none"
    """What logit_scale of the file is to the logits."""
    default_window: int | None = 0
    """Sliding window where the file names none; 0 = none; None = the file has to name it."""
    default_softcaps: tuple[float, float] = (0.0, 0.0)
    """Soft caps of scores and of logits where the file names none; 0 = none."""
    is_chunked: bool = False
    """Windows are chunks: a query sees the positions of its own."""
    global_every: int = 0
    """With a window: every Nth layer attends to everything; 0 = every layer has the window; 1 = no layer has it."""
    yarn_rounds: bool = True
    """As of `RopeConfig`."""
    local_rope_base: float | None = None
    """RoPE base of windowed layers where the file names none, without RoPE scaling; 0 = the base of global layers;
    None = their base and scaling."""
    attention_scale: float | None = None
    """Factor of scores where the file names none; None = D**-0.5."""
    reads_stream: bool = False
    """Mixers and feed-forwards read the residual stream without a norm, and have norms of their results."""
    norms_rotated_heads: bool = False
    """Queries and keys of layers with a rotation have an RMS norm without weights."""
    unnormed_experts: int = 0
    """The model of this many experts has no such norms. No key of a file tells."""
    norms_values: bool = False
    """Values have an RMS norm without weights."""
    post_norm_eps: float | None = None
    """Epsilon of norms behind mixers and feed-forwards; None = that of all norms."""
    width_scaled_layers: int | None = None
    """The model of this many layers scales scores by sqrt(E/H), not by sqrt(D)."""

    def norms_heads_of(self, num_experts: int) -> bool:
        """Whether a model of so many experts `norms_rotated_heads`."""
        return self.norms_rotated_heads and not 0 < num_experts == self.unnormed_experts

    def layers(self, count: int, with_experts: Sequence[bool] = ()) -> list[tuple[Sublayer, Sublayer]]:
        """The mixer and the feed-forward of each of the layers. with_experts: Whether each layer has experts."""
        mixers = [self.mixers[index % len(self.mixers)] for index in range(count)]
        feed_forwards = [self.feed_forwards[index % len(self.feed_forwards)] for index in range(count)]
        if self.experts is not None and with_experts:
            experts = self.experts
            feed_forwards = [experts if has else f for has, f in zip(with_experts, feed_forwards, strict=True)]
        return list(zip(mixers, feed_forwards, strict=True))
