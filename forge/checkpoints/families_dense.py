"""Families with RMS norms and gated feed-forwards, without experts."""

from __future__ import annotations

from dataclasses import replace

from forge.checkpoints import edits, extras, family_keys, keys
from forge.checkpoints.family import (
    ATTENTION_NAMES,
    EPS_5,
    EPS_6,
    LLAMA_NAMES,
    NORMS_BEHIND,
    OUTER_NAMES,
    PAIRED,
    SANDWICHED_NAMES,
    Family,
    names,
)

LLAMA = Family(
    arch="llama",
    edits=PAIRED,
    extras=(extras.llama3_factors,),
    keys=(*keys.LIKE_LLAMA, keys.head_length, keys.VOCABULARY, keys.rotated_head),
    defaults=EPS_6,
)
MISTRAL = replace(LLAMA, local_layers="all", defaults={**EPS_6, "sliding_window": 4096})
_MINISTRAL = replace(
    LLAMA,
    arch="mistral3",
    keys=(*LLAMA.keys, family_keys.ministral),
    local_layers="all",
    defaults={"rms_norm_eps": 1e-5},
)
_QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
QWEN2 = Family(
    arch="qwen2",
    keys=(*keys.LIKE_LLAMA, keys.stated_head_length),
    defaults={**EPS_6, **_QWEN_WINDOWS},
    local_layers="listed",
)
QWEN3 = replace(
    QWEN2,
    arch="qwen3",
    keys=(*keys.LIKE_LLAMA, keys.head_length),
    defaults={**QWEN2.defaults, "head_dim": 128},
)
_GEMMA_KEYS = (*keys.PLAIN, keys.EPS, keys.head_length)
_GEMMA_DEFAULTS = {**EPS_6, "max_position_embeddings": 8192, "head_dim": 256}
GEMMA3 = Family(
    arch="gemma3",
    names=SANDWICHED_NAMES,
    norms_less_one=".*norm",
    keys=(*keys.LIKE_LLAMA, keys.head_length, keys.WINDOW, keys.FINAL_SOFTCAP),
    defaults={
        **EPS_6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
    },
    expects={"attn_logit_softcapping": ()},
    local_layers=6,
    pattern="sliding_window_pattern",
    scales_scores=True,
    is_tied=True,
)
_MULTIPLIERS = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")
GRANITE = Family(
    arch="granite",
    edits=PAIRED,
    extras=(extras.llama3_factors,),
    keys=(*keys.LIKE_LLAMA, keys.VOCABULARY, keys.rotated_head, keys.GRANITE),
    defaults={**EPS_6, **dict.fromkeys(_MULTIPLIERS, 1.0)},
)
_OLMO2 = Family(
    arch="olmo2",
    names=NORMS_BEHIND,
    keys=(*keys.LIKE_LLAMA, keys.local_pattern),
    defaults={**EPS_5, "max_position_embeddings": 2048},
)
ERNIE = Family(
    arch="ernie4_5",
    names=LLAMA_NAMES
    | names("""
layers.#.self_attn.qkv_proj blk.#.attn_q blk.#.attn_k blk.#.attn_v
layers.#.mlp.up_gate_proj blk.#.ffn_gate blk.#.ffn_up
"""),
    edits={"layers.#.self_attn.qkv_proj": edits.qkv_rows, "layers.#.mlp.up_gate_proj": edits.halves},
    keys=(*keys.LIKE_LLAMA, keys.head_length),
    defaults={**EPS_5, "rope_theta": 500_000.0, "max_position_embeddings": 131072, "head_dim": 128},
    is_tied=True,
)

DENSE: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "ministral3": _MINISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": Family(
        arch="gemma",
        norms_less_one=".*norm",
        keys=_GEMMA_KEYS,
        defaults=_GEMMA_DEFAULTS,
        expects={"use_bidirectional_attention": (False,)},
        is_tied=True,
    ),
    "gemma2": Family(
        arch="gemma2",
        names=SANDWICHED_NAMES,
        norms_less_one=".*norm",
        keys=(*_GEMMA_KEYS, keys.WINDOW, keys.FINAL_SOFTCAP, keys.SOFTCAP),
        defaults={
            **_GEMMA_DEFAULTS,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        expects={"use_bidirectional_attention": (False,)},
        local_layers=2,
        scales_scores=True,
        is_tied=True,
    ),
    "gemma3_text": GEMMA3,
    "muse_glimmer_text": Family(
        arch="muse-glimmer",
        names=SANDWICHED_NAMES | names("layers.#.self_attn.gate_proj blk.#.attn_gate"),
        edits=PAIRED,
        extras=(extras.norms_of_heads,),
        norms_less_one="attn_norm|ffn_norm|post_attention_norm|post_ffw_norm",
        keys=(
            *keys.PLAIN,
            keys.EPS,
            keys.rope_base,
            keys.head_length,
            keys.FINAL_SOFTCAP,
            keys.table("float logit_scale output_multiplier"),
            keys.local_pattern,
        ),
        defaults=EPS_5,
        expects={"post_norm_eps": (1e-8,)},
        local_layers=4,
    ),
    "phi3": Family(
        arch="phi3",
        names=LLAMA_NAMES
        | names("""
layers.#.self_attn.qkv_proj blk.#.attn_qkv
layers.#.mlp.gate_up_proj blk.#.ffn_up
"""),
        extras=(extras.longrope_factors,),
        keys=(*keys.PLAIN, keys.EPS, keys.rope_base, keys.rotated_share, family_keys.phi3_scaling),
        defaults={**EPS_5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
        local_layers="all",
    ),
    "granite": GRANITE,
    "olmo2": _OLMO2,
    "olmo3": replace(
        _OLMO2,
        defaults={**_OLMO2.defaults, "rope_theta": 500_000.0, "sliding_window": 4096},
        local_layers=4,
    ),
    "glm4": Family(
        arch="glm4",
        names=LLAMA_NAMES
        | names("""
layers.#.post_self_attn_layernorm blk.#.post_attention_norm
layers.#.post_mlp_layernorm blk.#.post_ffw_norm
layers.#.mlp.gate_up_proj blk.#.ffn_up
"""),
        keys=(*keys.LIKE_LLAMA, keys.head_length, keys.rotated_share),
        defaults={**EPS_5, "rms_norm_eps": 1.5625e-07, "partial_rotary_factor": 0.5, "head_dim": 128},
    ),
    "ernie4_5": ERNIE,
    "smollm3": Family(
        arch="smollm3",
        edits=PAIRED,
        extras=(extras.llama3_factors,),
        keys=(*keys.LIKE_LLAMA, keys.stated_head_length, keys.VOCABULARY, keys.rotated_head),
        defaults={**EPS_6, "rope_theta": 2e6, "no_rope_layer_interval": 4, "use_sliding_window": False},
        local_layers="unrotated",
        is_tied=True,
    ),
    "exaone4": Family(
        arch="exaone4",
        names=NORMS_BEHIND,
        extras=(extras.llama3_factors,),
        keys=(*keys.LIKE_LLAMA, keys.stated_head_length, keys.VOCABULARY, keys.local_pattern),
        defaults={**EPS_5, "sliding_window": 4096},
        local_layers=4,
        pattern="sliding_window_pattern",
    ),
    "seed_oss": Family(
        arch="seed_oss",
        names=LLAMA_NAMES | names("layers.#.post_attention_layernorm blk.#.post_attention_norm"),
        keys=(*keys.LIKE_LLAMA, keys.head_length),
        defaults={**EPS_6, "head_dim": 128},
    ),
    "hunyuan_v1_dense": Family(
        arch="hunyuan-dense",
        names=LLAMA_NAMES
        | names("""
layers.#.self_attn.query_layernorm blk.#.attn_q_norm
layers.#.self_attn.key_layernorm blk.#.attn_k_norm
"""),
        keys=(*keys.LIKE_LLAMA, keys.stated_head_length, family_keys.hunyuan),
        defaults=EPS_5,
    ),
    "apertus": Family(
        arch="apertus",
        names=OUTER_NAMES
        | ATTENTION_NAMES
        | names("""
layers.#.attention_layernorm blk.#.attn_norm
layers.#.feedforward_layernorm blk.#.ffn_norm
layers.#.mlp.up_proj blk.#.ffn_up
layers.#.mlp.down_proj blk.#.ffn_down
"""),
        extras=(extras.llama3_factors,),
        keys=(*keys.LIKE_LLAMA, keys.stated_head_length, keys.VOCABULARY, keys.rotated_head, family_keys.xielu),
        defaults={**EPS_5, "rope_theta": 12e6, "max_position_embeddings": 65536},
        unused=r"layers\.\d+\.mlp\.act_fn\..*",
    ),
}
