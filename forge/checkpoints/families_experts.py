"""Families whose layers have experts, or may have some."""

from __future__ import annotations

from dataclasses import replace

from forge.checkpoints import edits, extras, family_keys, keys
from forge.checkpoints.families_dense import ERNIE, GEMMA3, GRANITE, LLAMA, MISTRAL, QWEN2, QWEN3
from forge.checkpoints.family import (
    ATTENTION_NAMES,
    EPS_5,
    EPS_6,
    FEED_FORWARD_NAMES,
    LLAMA_NAMES,
    OUTER_NAMES,
    PAIRED,
    SANDWICHED_NAMES,
    Edits,
    Family,
    names,
)

_EXPERT_NAMES = names("""
layers.#.mlp.gate blk.#.ffn_gate_inp
layers.#.mlp.experts.*.gate_proj blk.#.ffn_gate_exps
layers.#.mlp.experts.*.up_proj blk.#.ffn_up_exps
layers.#.mlp.experts.*.down_proj blk.#.ffn_down_exps
layers.#.mlp.experts.gate_up_proj blk.#.ffn_gate_exps blk.#.ffn_up_exps
layers.#.mlp.experts.down_proj blk.#.ffn_down_exps
""")
_SHARED_EXPERT_NAMES = names("""
layers.#.mlp.shared_experts.gate_proj blk.#.ffn_gate_shexp
layers.#.mlp.shared_experts.up_proj blk.#.ffn_up_shexp
layers.#.mlp.shared_experts.down_proj blk.#.ffn_down_shexp
""")
_SPARSE_NAMES = names("""
layers.#.block_sparse_moe.gate blk.#.ffn_gate_inp
layers.#.block_sparse_moe.e_score_correction_bias blk.#.exp_probs_b.bias
layers.#.block_sparse_moe.experts.*.w1 blk.#.ffn_gate_exps
layers.#.block_sparse_moe.experts.*.w2 blk.#.ffn_down_exps
layers.#.block_sparse_moe.experts.*.w3 blk.#.ffn_up_exps
""")
_SPLIT_EXPERTS: Edits = {"layers.#.mlp.experts.gate_up_proj": edits.halves}
_QWEN_EXPERTS = {"decoder_sparse_step": (1,), "mlp_only_layers": ([],)}
_GRANITE_MOE = replace(
    GRANITE,
    arch="granitemoe",
    names=LLAMA_NAMES
    | names("""
layers.#.block_sparse_moe.router.layer blk.#.ffn_gate_inp
layers.#.block_sparse_moe.input_linear blk.#.ffn_gate_exps blk.#.ffn_up_exps
layers.#.block_sparse_moe.output_linear blk.#.ffn_down_exps
layers.#.shared_mlp.input_linear blk.#.ffn_gate_shexp blk.#.ffn_up_shexp
layers.#.shared_mlp.output_linear blk.#.ffn_down_shexp
"""),
    edits=PAIRED
    | {"layers.#.block_sparse_moe.input_linear": edits.halves, "layers.#.shared_mlp.input_linear": edits.halves},
    keys=(*GRANITE.keys, family_keys.shared_width),
    defaults=GRANITE.defaults,
)
_ERNIE_MOE = replace(
    ERNIE,
    arch="ernie4_5-moe",
    names=ERNIE.names
    | _EXPERT_NAMES
    | _SHARED_EXPERT_NAMES
    | names("layers.#.mlp.moe_statics.e_score_correction_bias blk.#.exp_probs_b.bias"),
    edits=ERNIE.edits | _SPLIT_EXPERTS,
    keys=(*keys.LIKE_LLAMA, keys.stated_head_length, keys.EXPERT_WIDTH, family_keys.ernie_experts),
    defaults={
        **EPS_5,
        "rope_theta": 500_000.0,
        "max_position_embeddings": 131072,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
    },
    expects={"moe_norm_min": (1e-12,)},
    unused=r"mtp_.*",
)
_NAMES_OF_GLM4_MOE = (
    OUTER_NAMES
    | ATTENTION_NAMES
    | FEED_FORWARD_NAMES
    | _EXPERT_NAMES
    | _SHARED_EXPERT_NAMES
    | names("""
layers.#.post_attention_layernorm blk.#.post_attention_norm
layers.#.mlp.gate.e_score_correction_bias blk.#.exp_probs_b.bias
layers.#.eh_proj blk.#.nextn.eh_proj
layers.#.embed_tokens blk.#.nextn.embed_tokens
layers.#.enorm blk.#.nextn.enorm
layers.#.hnorm blk.#.nextn.hnorm
layers.#.shared_head.head blk.#.nextn.shared_head_head
layers.#.shared_head.norm blk.#.nextn.shared_head_norm
""")
)
_GLM4_EXPERTS = {"n_shared_experts": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1}
_GPT_OSS_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}

WITH_EXPERTS: dict[str, Family] = {
    "mixtral": replace(
        MISTRAL,
        names=LLAMA_NAMES | _SPARSE_NAMES | _EXPERT_NAMES,
        edits=PAIRED | _SPLIT_EXPERTS,
        keys=(*keys.LIKE_LLAMA, keys.stated_head_length, keys.VOCABULARY, keys.rotated_head),
        defaults={**EPS_5, "rope_theta": 1e6},
    ),
    "qwen2_moe": replace(
        QWEN2,
        arch="qwen2moe",
        names=LLAMA_NAMES
        | _EXPERT_NAMES
        | names("""
layers.#.mlp.shared_expert.gate_proj blk.#.ffn_gate_shexp
layers.#.mlp.shared_expert.up_proj blk.#.ffn_up_shexp
layers.#.mlp.shared_expert.down_proj blk.#.ffn_down_shexp
layers.#.mlp.shared_expert_gate blk.#.ffn_gate_inp_shexp
"""),
        edits=_SPLIT_EXPERTS,
        keys=(
            *QWEN2.keys,
            keys.EXPERT_WIDTH,
            keys.table("int? expert_shared_feed_forward_length shared_expert_intermediate_size"),
        ),
        defaults={**QWEN2.defaults, "norm_topk_prob": False},
        expects=_QWEN_EXPERTS,
    ),
    "qwen3_moe": replace(
        QWEN3,
        arch="qwen3moe",
        names=LLAMA_NAMES | _EXPERT_NAMES,
        edits=_SPLIT_EXPERTS,
        keys=(*QWEN2.keys, keys.EXPERT_WIDTH),
        defaults={**QWEN2.defaults, "norm_topk_prob": False},
        expects=_QWEN_EXPERTS,
        local_layers="all",
    ),
    "gemma4_text": Family(
        arch="gemma4",
        names=SANDWICHED_NAMES
        | names("""
embed_tokens_per_layer per_layer_token_embd
per_layer_model_projection per_layer_model_proj
per_layer_projection_norm per_layer_proj_norm
layers.#.layer_scalar blk.#.layer_output_scale.weight
layers.#.per_layer_input_gate blk.#.inp_gate
layers.#.per_layer_projection blk.#.proj
layers.#.post_per_layer_input_norm blk.#.post_norm
layers.#.router.proj blk.#.ffn_gate_inp
layers.#.router.scale blk.#.ffn_gate_inp.scale
layers.#.router.per_expert_scale blk.#.ffn_down_exps.scale
layers.#.experts.gate_up_proj blk.#.ffn_gate_up_exps
layers.#.experts.down_proj blk.#.ffn_down_exps
layers.#.post_feedforward_layernorm_1 blk.#.post_ffw_norm_1
layers.#.post_feedforward_layernorm_2 blk.#.post_ffw_norm_2
layers.#.pre_feedforward_layernorm_2 blk.#.pre_ffw_norm_2
"""),
        extras=(extras.proportional_factors,),
        keys=(*GEMMA3.keys, keys.EXPERT_WIDTH, family_keys.gemma4),
        defaults={**EPS_6, "hidden_size_per_layer_input": 256, "head_dim": 256, "sliding_window": 512},
        local_layers=6,
        is_tied=True,
    ),
    "llama4_text": Family(
        arch="llama4",
        names=OUTER_NAMES
        | ATTENTION_NAMES
        | names("""
layers.#.post_attention_layernorm blk.#.ffn_norm
layers.#.feed_forward.gate_proj blk.#.ffn_gate
layers.#.feed_forward.up_proj blk.#.ffn_up
layers.#.feed_forward.down_proj blk.#.ffn_down
layers.#.feed_forward.router blk.#.ffn_gate_inp
layers.#.feed_forward.experts.gate_up_proj blk.#.ffn_gate_exps blk.#.ffn_up_exps
layers.#.feed_forward.experts.down_proj blk.#.ffn_down_exps
layers.#.feed_forward.shared_expert.gate_proj blk.#.ffn_gate_shexp
layers.#.feed_forward.shared_expert.up_proj blk.#.ffn_up_shexp
layers.#.feed_forward.shared_expert.down_proj blk.#.ffn_down_shexp
"""),
        edits={
            "layers.#.feed_forward.experts.gate_up_proj": edits.transposed_halves,
            "layers.#.feed_forward.experts.down_proj": edits.transposed,
        },
        extras=(extras.llama3_factors,),
        keys=(*LLAMA.keys, family_keys.llama4),
        defaults={
            **EPS_5,
            "rope_theta": 500_000.0,
            "max_position_embeddings": 131072,
            "head_dim": 128,
            "attention_chunk_size": 8192,
            "no_rope_layer_interval": 4,
        },
        local_layers=4,
        pattern="no_rope_layer_interval",
        window="attention_chunk_size",
    ),
    "granitemoe": _GRANITE_MOE,
    "granitemoeshared": _GRANITE_MOE,
    "olmoe": Family(
        arch="olmoe",
        names=LLAMA_NAMES | _EXPERT_NAMES,
        edits=_SPLIT_EXPERTS,
        defaults={**EPS_5, "norm_topk_prob": False, "max_position_embeddings": 4096},
        expects={"clip_qkv": ()},
    ),
    "glm4_moe": Family(
        arch="glm4moe",
        names=_NAMES_OF_GLM4_MOE,
        edits=_SPLIT_EXPERTS,
        keys=(
            *keys.LIKE_LLAMA,
            keys.stated_head_length,
            keys.EXPERT_WIDTH,
            keys.rotated_share,
            family_keys.glm4_experts,
        ),
        defaults={**EPS_5, "partial_rotary_factor": 0.5, "n_group": 1, "topk_group": 1, **_GLM4_EXPERTS},
    ),
    "gpt_oss": Family(
        arch="gpt-oss",
        names=OUTER_NAMES
        | ATTENTION_NAMES
        | names("""
layers.#.self_attn.sinks blk.#.attn_sinks.weight
layers.#.post_attention_layernorm blk.#.post_attention_norm
layers.#.mlp.router blk.#.ffn_gate_inp
layers.#.mlp.experts.gate_up_proj blk.#.ffn_gate_exps.weight blk.#.ffn_up_exps.weight
layers.#.mlp.experts.gate_up_proj_bias blk.#.ffn_gate_exps.bias blk.#.ffn_up_exps.bias
layers.#.mlp.experts.gate_up_proj_blocks blk.#.ffn_gate_exps.weight blk.#.ffn_up_exps.weight
layers.#.mlp.experts.down_proj blk.#.ffn_down_exps.weight
layers.#.mlp.experts.down_proj_bias blk.#.ffn_down_exps.bias
layers.#.mlp.experts.down_proj_blocks blk.#.ffn_down_exps.weight
"""),
        edits={
            "layers.#.mlp.experts.gate_up_proj": edits.transposed_alternate,
            "layers.#.mlp.experts.gate_up_proj_bias": edits.alternate_numbers,
            "layers.#.mlp.experts.gate_up_proj_blocks": edits.alternate,
            "layers.#.mlp.experts.down_proj": edits.transposed,
        },
        keys=(
            *keys.LIKE_LLAMA,
            keys.head_length,
            keys.WINDOW,
            keys.table("int expert_feed_forward_length intermediate_size"),
        ),
        defaults={
            **EPS_5,
            "rope_theta": 150_000.0,
            "rope_scaling": _GPT_OSS_YARN,
            "head_dim": 64,
            "sliding_window": 128,
            "max_position_embeddings": 131072,
        },
        expects={"swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
        local_layers=2,
    ),
    "ernie4_5_moe": _ERNIE_MOE,
    "minimax_m2": Family(
        arch="minimax-m2",
        names=LLAMA_NAMES | _SPARSE_NAMES,
        keys=(
            *keys.LIKE_LLAMA,
            keys.head_length,
            keys.rotated_share_or_dim,
            keys.table("int expert_feed_forward_length intermediate_size"),
        ),
        defaults={**EPS_6, "rope_theta": 5e6, "head_dim": 128},
        expects={"qk_norm_type": ("per_layer",)},
    ),
}
