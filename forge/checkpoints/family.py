"""What the table of Hugging Face's families says of one: its names, its numbers, and what is done to its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from forge.checkpoints.edits import Edit, pair_keys, pair_queries
from forge.checkpoints.extras import Extra
from forge.checkpoints.keys import LIKE_LLAMA, Keys

Names = dict[str, str]
"""From a stored name to GGUF's. # is the number of a layer and * that of an expert, which are stacked. Without suffix
they are of weights and of biases; a name with one is of that alone. A tensor that becomes several has them apart by
blanks. Prefixes that differ between versions of transformers (`model.`, `transformer.`) are left out."""

Edits = dict[str, Edit]
"""By stored name, as of `Names`."""


def names(text: str) -> Names:
    """Lines of a stored name and GGUF's names."""
    return dict(line.split(maxsplit=1) for line in text.strip().splitlines())


OUTER_NAMES = names("""
embed_tokens token_embd
norm output_norm
lm_head output
""")
ATTENTION_NAMES = names("""
layers.#.input_layernorm blk.#.attn_norm
layers.#.self_attn.q_proj blk.#.attn_q
layers.#.self_attn.k_proj blk.#.attn_k
layers.#.self_attn.v_proj blk.#.attn_v
layers.#.self_attn.o_proj blk.#.attn_output
layers.#.self_attn.q_norm blk.#.attn_q_norm
layers.#.self_attn.k_norm blk.#.attn_k_norm
""")
FEED_FORWARD_NAMES = names("""
layers.#.post_attention_layernorm blk.#.ffn_norm
layers.#.mlp.gate_proj blk.#.ffn_gate
layers.#.mlp.up_proj blk.#.ffn_up
layers.#.mlp.down_proj blk.#.ffn_down
""")
LLAMA_NAMES: Names = OUTER_NAMES | ATTENTION_NAMES | FEED_FORWARD_NAMES

SANDWICHED_NAMES = (
    OUTER_NAMES
    | ATTENTION_NAMES
    | FEED_FORWARD_NAMES
    | names("""
layers.#.post_attention_layernorm blk.#.post_attention_norm
layers.#.pre_feedforward_layernorm blk.#.ffn_norm
layers.#.post_feedforward_layernorm blk.#.post_ffw_norm
""")
)
NORMS_BEHIND = {
    name: new for name, new in SANDWICHED_NAMES.items() if "input_layernorm" not in name and "pre_" not in name
}

UNUSED = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias)\Z"
    r"|(^|[._])(vision|audio|visual|projector|mm_projector|image_newline|view_seperator)([._]|\Z)"
)
"""Stored tensors that no text model reads: tables of rotations, masks, towers and projectors of images and sounds.
To be searched for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A row of the table."""

    arch: str
    """The row of `models.arch.ARCHS`."""
    names: Names = field(default_factory=lambda: LLAMA_NAMES)
    edits: Edits = field(default_factory=dict)
    """What is done to tensors, by stored name, as of `names`."""
    extras: tuple[Extra, ...] = ()
    norms_less_one: str = ""
    """GGUF's names of norms, without what is before the last dot, that are stored less one: a regular expression."""
    keys: tuple[Keys, ...] = LIKE_LLAMA
    """What the file says; of two that say the same, the later one counts."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What config.json may leave out, as transformers' configuration class has it."""
    expects: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Values that `models` computes with, of keys that change what a model computes and that GGUF has no key for."""
    local_layers: Literal["none", "all", "listed", "unrotated"] | int = "none"
    """Layers with a window where config.json has no layer_types: those from max_window_layers on for "listed", all but
    every Nth for a number. None has a window if use_sliding_window, of families that read it, is false."""
    pattern: str = ""
    """The key of that number; "" = files have none."""
    window: str = "sliding_window"
    """The key of the window."""
    scales_scores: bool = False
    """query_pre_attn_scalar is what the scores are divided by, squared."""
    is_tied: bool = False
    """Without tie_word_embeddings in config.json, the embedding is the output's matrix."""
    unused: str = ""
    """Further stored tensors that are not read: a regular expression."""


PAIRED: Edits = {"layers.#.self_attn.q_proj": pair_queries, "layers.#.self_attn.k_proj": pair_keys}
BASE_10_000 = {"rope_theta": 10_000.0}
EPS_6 = {"rms_norm_eps": 1e-6, **BASE_10_000}
EPS_5 = {"rms_norm_eps": 1e-5, **BASE_10_000}
LAYER_EPS_5 = {"layer_norm_eps": 1e-5, **BASE_10_000}
