"""The table of architectures: what a GGUF of each family holds, and what it leaves unsaid.

A family whose mixers and feed-forwards exist is one row here and no code. Names are GGUF's `general.architecture`.
"""

from __future__ import annotations

import re
from dataclasses import replace

from forge.models.family import (
    ATTENTION,
    ATTENTION_BIAS,
    BARE_ATTENTION,
    BARE_EXPERTS,
    BARE_FEED_FORWARD,
    EXPERTS,
    FEED_FORWARD,
    FEED_FORWARD_BIAS,
    PLAIN_WITH_BIAS,
    QK_NORM,
    QKV_BIAS,
    SHARED_EXPERT,
    Arch,
    Router,
    Sublayer,
)

_LLAMA = Arch(
    rope="interleaved",
    feed_forwards=(Sublayer("gated", FEED_FORWARD, FEED_FORWARD_BIAS),),
    experts=Sublayer("experts", EXPERTS),  # Mixtral
    global_every=1,
)

_GRANITE = Arch(
    rope="interleaved",
    feed_forwards=(Sublayer("gated", FEED_FORWARD, FEED_FORWARD_BIAS),),
    nope_key=True,
    has_multipliers=True,
    logit_scale="divisor",
    global_every=1,
)

ARCHS: dict[str, Arch] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,  # converters write llama
    "mistral3": _LLAMA,
    "qwen2": Arch(mixers=(Sublayer("attention", f"{ATTENTION} {QKV_BIAS}", "attn_output.bias"),), global_every=1),
    "qwen3": Arch(mixers=(Sublayer("attention", f"{ATTENTION} {QK_NORM}", ATTENTION_BIAS),), global_every=1),
    "qwen3moe": Arch(
        mixers=(Sublayer("attention", f"{ATTENTION} {QK_NORM}", ATTENTION_BIAS),),
        experts=Sublayer("experts", EXPERTS),
        global_every=1,
    ),
    "qwen2moe": Arch(
        mixers=(Sublayer("attention", f"{ATTENTION} {QKV_BIAS}", "attn_output.bias"),),
        experts=Sublayer("experts", f"{EXPERTS} {SHARED_EXPERT} ffn_gate_inp_shexp"),
        outer="output_norm output",
        outer_optional="",
        router=Router(renormalizes=False),
        global_every=1,
    ),
    "olmoe": Arch(
        mixers=(Sublayer("attention", f"{ATTENTION} {QK_NORM}"),),
        experts=Sublayer("experts", EXPERTS),
        router=Router(renormalizes=False),
        qk_norm="rms_whole",
        global_every=1,
    ),
    "glm4moe": Arch(
        mixers=(Sublayer("attention", ATTENTION, f"{ATTENTION_BIAS} {QK_NORM}"),),
        feed_forwards=(Sublayer("gated", f"ffn_norm=post_attention_norm {BARE_FEED_FORWARD}"),),
        experts=Sublayer("experts", f"ffn_norm=post_attention_norm {BARE_EXPERTS} exp_probs_b.bias", SHARED_EXPERT),
        router=Router(scores="sigmoid"),
        global_every=1,
    ),
    "minimax-m2": Arch(
        mixers=(Sublayer("attention", f"{ATTENTION} {QK_NORM}"),),
        experts=Sublayer("experts", f"{EXPERTS} exp_probs_b.bias"),
        outer="output_norm output",
        outer_optional="",
        router=Router(scores="sigmoid"),
        qk_norm="rms_whole",
        global_every=1,
    ),
    "gpt-oss": Arch(
        mixers=(Sublayer("attention", f"{ATTENTION} {ATTENTION_BIAS} attn_sinks"),),
        experts=Sublayer(
            "experts",
            f"ffn_norm=post_attention_norm {BARE_EXPERTS} ffn_gate_inp.bias ffn_gate_exps.bias ffn_up_exps.bias "
            "ffn_down_exps.bias",
        ),
        outer="output_norm output",
        outer_optional="",
        router=Router(activation="clamped_swiglu"),
        yarn_rounds=False,
        default_window=None,
        global_every=2,
    ),
    "gemma": Arch(activation="gelu", scales_embedding=True),
    "gemma2": Arch(
        mixers=(Sublayer("attention", f"{ATTENTION} post_attention_norm", ATTENTION_BIAS),),
        feed_forwards=(Sublayer("gated", f"{FEED_FORWARD} post_ffw_norm"),),
        activation="gelu",
        scales_embedding=True,
        default_window=4096,
        default_softcaps=(50.0, 30.0),
        global_every=2,
        width_scaled_layers=46,
    ),
    "gemma3": Arch(
        mixers=(Sublayer("attention", f"{ATTENTION} {QK_NORM} post_attention_norm", ATTENTION_BIAS),),
        feed_forwards=(Sublayer("gated", f"{FEED_FORWARD} post_ffw_norm"),),
        activation="gelu",
        scales_embedding=True,
        global_every=6,
        local_rope_base=10_000.0,
        width_scaled_layers=62,
    ),
    "gemma4": Arch(
        mixers=(
            Sublayer(
                "attention",
                "attn_norm attn_q attn_k attn_output attn_q_norm attn_k_norm post_attention_norm",
                "attn_v",
            ),
        ),
        feed_forwards=(Sublayer("gated", f"{FEED_FORWARD} post_ffw_norm"),),
        experts=Sublayer(
            "beside_experts",
            f"{FEED_FORWARD} post_ffw_norm post_ffw_norm_1 pre_ffw_norm_2 post_ffw_norm_2 {BARE_EXPERTS} "
            "ffn_gate_inp.scale",
            "ffn_down_exps.scale",
        ),
        router=Router(activation="gelu"),
        end=Sublayer("end", "", "inp_gate proj post_norm layer_output_scale"),
        outer_optional="output per_layer_token_embd per_layer_model_proj per_layer_proj_norm",
        activation="gelu",
        scales_embedding=True,
        attention_scale=1.0,
        norms_values=True,
        has_rope_factors=True,
        default_window=None,
        global_every=6,
        local_rope_base=10_000.0,
    ),
    "llama4": Arch(
        rope="interleaved",
        mixers=(Sublayer("attention", ATTENTION),),
        experts=Sublayer("experts", f"{EXPERTS} {SHARED_EXPERT}"),
        router=Router(scores="sigmoid", renormalizes=False, weighs_input=True),
        nope="global",
        nope_temperature=(0.1, 8192),
        norms_rotated_heads=True,
        unnormed_experts=128,  # Maverick
        default_window=8192,
        is_chunked=True,
        global_every=4,
    ),
    "muse-glimmer": Arch(
        rope="interleaved",
        mixers=(Sublayer("attention", f"{ATTENTION} {QK_NORM} attn_gate post_attention_norm"),),
        feed_forwards=(Sublayer("gated", f"{FEED_FORWARD} post_ffw_norm"),),
        outer="token_embd_norm=1 output_norm output",
        outer_optional="",
        nope="global",
        logit_scale="factor",
        post_norm_eps=1e-8,
        default_window=None,
        global_every=4,
        local_rope_base=0.0,
    ),
    "phi3": Arch(mixers=(Sublayer("attention", ATTENTION, QKV_BIAS),)),
    "stablelm": Arch(
        # StableLM 2 12B has no ffn_norm, but norms of q and k
        mixers=(Sublayer("attention", f"{ATTENTION} attn_norm.bias", f"{QKV_BIAS} {QK_NORM}"),),
        feed_forwards=(Sublayer("gated", BARE_FEED_FORWARD, "ffn_norm ffn_norm.bias"),),
        outer="output_norm output_norm.bias output",
        outer_optional="",
        parallel="without_ffn_norm",
        norm="layer",
        qk_norm="layer_head",
    ),
    "starcoder2": Arch(
        mixers=(Sublayer("attention", f"{ATTENTION} attn_norm.bias {ATTENTION_BIAS}"),),
        feed_forwards=(Sublayer("plain", f"ffn_norm ffn_norm.bias {PLAIN_WITH_BIAS}"),),
        outer="output_norm output_norm.bias",
        norm="layer",
        activation="gelu",
    ),
    "smollm3": Arch(rope="interleaved", nope_every=4, global_every=1),
    "granite": _GRANITE,
    "granitemoe": replace(_GRANITE, experts=Sublayer("experts", EXPERTS, SHARED_EXPERT)),
    "olmo": Arch(
        rope="interleaved",
        mixers=(Sublayer("attention", f"attn_norm=1 {BARE_ATTENTION}"),),
        feed_forwards=(Sublayer("gated", f"ffn_norm=1 {BARE_FEED_FORWARD}"),),
        outer="output_norm=1",
        norm="layer",
        global_every=1,
    ),
    "olmo2": Arch(  # and OLMo 3, with windows
        mixers=(Sublayer("attention", f"{BARE_ATTENTION} {QK_NORM} post_attention_norm"),),
        feed_forwards=(Sublayer("gated", f"{BARE_FEED_FORWARD} post_ffw_norm"),),
        reads_stream=True,
        outer="output_norm output",
        outer_optional="",
        qk_norm="rms_whole",
        global_every=4,
        local_rope_base=0.0,
    ),
    "exaone4": Arch(
        mixers=(Sublayer("attention", f"{BARE_ATTENTION} {QK_NORM} post_attention_norm"),),
        feed_forwards=(Sublayer("gated", f"{BARE_FEED_FORWARD} post_ffw_norm"),),
        reads_stream=True,
        nope="global",
        global_every=4,
    ),
    "command-r": Arch(
        rope="interleaved",
        mixers=(Sublayer("attention", ATTENTION, f"{QK_NORM} {ATTENTION_BIAS}"),),
        feed_forwards=(Sublayer("gated", BARE_FEED_FORWARD),),
        outer_optional="",
        norm="layer",
        parallel="always",
        qk_norm="layer_head",
        logit_scale="factor",
        global_every=1,
    ),
    "cohere2": Arch(
        rope="interleaved",
        mixers=(Sublayer("attention", ATTENTION),),
        feed_forwards=(Sublayer("gated", BARE_FEED_FORWARD),),
        outer_optional="",
        norm="layer",
        parallel="always",
        nope="global",
        logit_scale="factor",
        default_window=None,
        global_every=4,
    ),
    "glm4": Arch(
        rope="interleaved",
        mixers=(Sublayer("attention", f"{ATTENTION} post_attention_norm", QKV_BIAS),),
        feed_forwards=(Sublayer("gated", f"{FEED_FORWARD} post_ffw_norm"),),
        global_every=1,
    ),
    "seed_oss": Arch(
        feed_forwards=(Sublayer("gated", f"ffn_norm=post_attention_norm {BARE_FEED_FORWARD}"),),
        global_every=1,
    ),
    "ernie4_5": _LLAMA,
    "ernie4_5-moe": replace(_LLAMA, experts=Sublayer("experts", EXPERTS, f"exp_probs_b.bias {SHARED_EXPERT}")),
    "hunyuan-dense": Arch(
        mixers=(Sublayer("attention", f"{ATTENTION} {QK_NORM}", ATTENTION_BIAS),),
        qk_norm_after_rope=True,
        global_every=1,
    ),
    "apertus": Arch(
        mixers=(Sublayer("attention", f"{ATTENTION} {QK_NORM}", ATTENTION_BIAS),),
        feed_forwards=(Sublayer("plain", "ffn_norm ffn_up ffn_down"),),
        outer="output_norm output",
        outer_optional="",
        activation="xielu",
        global_every=1,
    ),
    "gpt2": Arch(
        mixers=(Sublayer("attention", f"{ATTENTION} attn_norm.bias {ATTENTION_BIAS}"),),
        feed_forwards=(Sublayer("plain", f"ffn_norm ffn_norm.bias {PLAIN_WITH_BIAS}"),),
        outer="position_embd output_norm output_norm.bias",
        nope="all",
        norm="layer",
        activation="gelu",
    ),
    "gptneox": Arch(
        mixers=(Sublayer("attention", f"{ATTENTION} attn_norm.bias {ATTENTION_BIAS}"),),
        feed_forwards=(Sublayer("plain", f"ffn_norm ffn_norm.bias {PLAIN_WITH_BIAS}"),),
        outer="output_norm output_norm.bias output",
        outer_optional="",
        parallel="key",
        norm="layer",
        activation="gelu_erf",
    ),
    "falcon": Arch(  # 40B and its like have a second norm, for attention
        mixers=(
            Sublayer(
                "attention",
                f"attn_norm=attn_norm_2|attn_norm attn_norm.bias=attn_norm_2.bias|attn_norm.bias {BARE_ATTENTION}",
                ATTENTION_BIAS,
            ),
        ),
        feed_forwards=(
            Sublayer(
                "plain", "ffn_norm=attn_norm ffn_norm.bias=attn_norm.bias ffn_up ffn_down", "ffn_up.bias ffn_down.bias"
            ),
        ),
        outer="output_norm output_norm.bias",
        parallel="always",
        norm="layer",
        activation="gelu_erf",
    ),
    "phi2": Arch(
        mixers=(Sublayer("attention", f"{ATTENTION} attn_norm.bias {ATTENTION_BIAS}"),),
        feed_forwards=(Sublayer("plain", PLAIN_WITH_BIAS),),
        outer="output_norm output_norm.bias output output.bias",
        parallel="always",
        norm="layer",
        activation="gelu",
    ),
}

UNUSED_TENSORS = re.compile(
    r"(blk\.\d+\.)?(rope_freqs|attn_rot_embd|attn\.rot_embd|rope_factors_(long|short))\.weight|(blk\.\d+\.)?(nextn|mtp)\..+"
)
"""Tensors that a file may hold beside its model's own: RoPE factors, rotation tables, multi-token-prediction layers."""
