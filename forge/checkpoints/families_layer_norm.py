"""Families with LayerNorm, most of them of the years before 2024."""

from __future__ import annotations

from dataclasses import replace

from forge.checkpoints import edits, family_keys, keys
from forge.checkpoints.family import BASE_10_000, LAYER_EPS_5, LLAMA_NAMES, PAIRED, Family, names

_COHERE_KEYS = (*keys.PLAIN, keys.EPS, keys.rope_base)
_COHERE = Family(
    arch="command-r",
    keys=(
        *_COHERE_KEYS,
        keys.table("int context_length model_max_length max_position_embeddings"),
        keys.LOGIT_SCALE,
        keys.no_scaling,
    ),
    defaults={**LAYER_EPS_5, "rope_theta": 500_000.0, "logit_scale": 0.0625, "max_position_embeddings": 8192},
    is_tied=True,
)

WITH_LAYER_NORM: dict[str, Family] = {
    "phi": Family(
        arch="phi2",
        names=names("""
embed_tokens token_embd
final_layernorm output_norm
lm_head output
layers.#.input_layernorm blk.#.attn_norm
layers.#.self_attn.q_proj blk.#.attn_q
layers.#.self_attn.k_proj blk.#.attn_k
layers.#.self_attn.v_proj blk.#.attn_v
layers.#.self_attn.dense blk.#.attn_output
layers.#.mlp.fc1 blk.#.ffn_up
layers.#.mlp.fc2 blk.#.ffn_down
"""),
        keys=(*keys.PLAIN, keys.EPS, keys.wide_feed_forward("intermediate_size"), keys.rotated_share),
        defaults={**LAYER_EPS_5, "partial_rotary_factor": 0.5, "max_position_embeddings": 2048},
        expects={"qk_layernorm": (False,)},
    ),
    "gpt2": Family(
        arch="gpt2",
        names=names("""
wte token_embd
wpe position_embd
ln_f output_norm
lm_head output
h.#.ln_1 blk.#.attn_norm
h.#.attn.c_attn blk.#.attn_qkv
h.#.attn.c_proj blk.#.attn_output
h.#.ln_2 blk.#.ffn_norm
h.#.mlp.c_fc blk.#.ffn_up
h.#.mlp.c_proj blk.#.ffn_down
"""),
        edits=dict.fromkeys(("h.#.attn.c_attn", "h.#.attn.c_proj", "h.#.mlp.c_fc", "h.#.mlp.c_proj"), edits.transposed),
        keys=(keys.SIZES, keys.EPS, keys.wide_feed_forward("n_inner")),
        defaults={"layer_norm_epsilon": 1e-5, "n_positions": 1024},
        expects={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
        is_tied=True,
    ),
    "gpt_neox": Family(
        arch="gptneox",
        names=names("""
embed_in token_embd
final_layer_norm output_norm
embed_out output
layers.#.input_layernorm blk.#.attn_norm
layers.#.attention.query_key_value blk.#.attn_qkv
layers.#.attention.dense blk.#.attn_output
layers.#.post_attention_layernorm blk.#.ffn_norm
layers.#.mlp.dense_h_to_4h blk.#.ffn_up
layers.#.mlp.dense_4h_to_h blk.#.ffn_down
"""),
        edits={"layers.#.attention.query_key_value": edits.neox_qkv},
        keys=(keys.SIZES, keys.EPS, keys.rotated_share, keys.PARALLEL),
        defaults={"layer_norm_eps": 1e-5, "rotary_emb_base": 1e4, "rotary_pct": 0.25, "use_parallel_residual": True},
    ),
    "falcon": Family(
        arch="falcon",
        names=names("""
word_embeddings token_embd
ln_f output_norm
lm_head output
h.#.input_layernorm blk.#.attn_norm
h.#.ln_mlp blk.#.attn_norm
h.#.ln_attn blk.#.attn_norm_2
h.#.self_attention.query_key_value blk.#.attn_qkv
h.#.self_attention.dense blk.#.attn_output
h.#.mlp.dense_h_to_4h blk.#.ffn_up
h.#.mlp.dense_4h_to_h blk.#.ffn_down
"""),
        edits={"h.#.self_attention.query_key_value": edits.falcon_qkv},
        keys=(keys.SIZES, keys.EPS, keys.wide_feed_forward("ffn_hidden_size"), family_keys.falcon_heads),
        defaults={"layer_norm_epsilon": 1e-5, **BASE_10_000, "max_position_embeddings": 2048, "multi_query": True},
        expects={"alibi": (False,), "parallel_attn": (True,)},
        is_tied=True,
    ),
    "stablelm": Family(
        arch="stablelm",
        names=LLAMA_NAMES
        | names("""
layers.#.self_attn.q_layernorm.norms.* blk.#.attn_q_norm
layers.#.self_attn.k_layernorm.norms.* blk.#.attn_k_norm
"""),
        keys=(*keys.PLAIN, keys.EPS, keys.rotated_share, keys.PARALLEL),
        defaults={**LAYER_EPS_5, "partial_rotary_factor": 0.25, "use_parallel_residual": False},
    ),
    "starcoder2": Family(
        arch="starcoder2",
        names=LLAMA_NAMES
        | names("""
layers.#.mlp.c_fc blk.#.ffn_up
layers.#.mlp.c_proj blk.#.ffn_down
"""),
        keys=(*keys.LIKE_LLAMA, keys.stated_head_length),
        defaults={"norm_epsilon": 1e-5, **BASE_10_000, "max_position_embeddings": 4096},
        local_layers="all",
        is_tied=True,
    ),
    "cohere": _COHERE,
    "cohere2": replace(
        _COHERE,
        arch="cohere2",
        keys=(
            *_COHERE_KEYS,
            keys.head_length,
            keys.LOGIT_SCALE,
            keys.WINDOW,
            keys.VOCABULARY,
            keys.rotated_head,
            keys.no_scaling,
        ),
        defaults={**LAYER_EPS_5, "logit_scale": 0.0625, "sliding_window": 4096},
        local_layers=4,
        pattern="sliding_window_pattern",
    ),
    "olmo": Family(
        arch="olmo",
        edits=PAIRED,
        keys=(
            *keys.LIKE_LLAMA,
            keys.constant(attention__layer_norm_epsilon=keys.single(1e-5)),
            keys.table("float? attention.clamp_kqv clip_qkv"),
        ),
        defaults={**BASE_10_000, "max_position_embeddings": 2048},
    ),
}
