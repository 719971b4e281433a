"""ModelConfig from the key-values of a GGUF file."""

from __future__ import annotations

import math
from difflib import get_close_matches
from typing import Any

import numpy as np

from forge.config import ExpertsConfig, ModelConfig, RouterScores
from forge.errors import FormatError, UnsupportedError
from forge.formats.checkpoint import Checkpoint
from forge.formats.source import show
from forge.models.arch import ARCHS
from forge.models.attention_keys import AttentionKeys
from forge.ops.experts import MAX_EXPERTS, MAX_GROUPS, MAX_USED

_NEUTRAL: dict[str, Any] = {
    "attention.causal": True,
    "attention.max_alibi_bias": 0.0,
    "rope.dimension_sections": 0,
    "rope.scaling.alpha": 0.0,
}
"""Keys that change what a layer computes, in families without it: with the value that changes nothing."""
_ACTIVATIONS = {
    "silu": ("silu",),
    "gelu": ("gelu", "gelu_erf"),
    "gelu_new": ("gelu",),
    "gelu_pytorch_tanh": ("gelu",),
    "xielu": ("xielu",),
}
"""What a file may call the activations. Most say nothing."""
_OF_LAYER_ENDS = {"attention.shared_kv_layers": 0, "embedding_length_per_layer_input": 0}
_MULTIPLIERS = ("embedding_scale", "residual_scale")
_MAX_TOKENS = 2**20
"""What the sampler's fixed-point sums hold."""
_SOFTMAX_OF_CHOSEN = 3
_ROUTER_SCORES: dict[int, RouterScores | None] = {0: None, 1: "softmax", 2: "sigmoid", _SOFTMAX_OF_CHOSEN: "softmax"}
"""By ggml's number of the gating function; 0 = the family's."""


def read_config(file: Checkpoint, context: int | None = None) -> ModelConfig:
    """The model's numbers, for a context of so many positions (None = the model's own).

    The context matters where a model has RoPE factors for short and for long contexts (longrope). Raises FormatError
    for a missing or impossible key and UnsupportedError for an architecture without a row in the table.
    """
    if file.get_str("general.type", "model") == "adapter":
        raise FormatError(f"{file.path}: is an adapter, and no model: give its model, and this as adapter")
    name = file.get_str("general.architecture")
    if name not in ARCHS:
        alike = ", ".join(get_close_matches(name, ARCHS, 5, 0.4)) or "none"
        raise UnsupportedError(
            f"{file.path}: architecture {name!r:.60} is not supported; of the {len(ARCHS)} that are, these have names "
            f"like it: {alike}"
        )
    return _Reader(file, name, ARCHS[name]).config(context)


class _Reader(AttentionKeys):
    """Reads all of a model's numbers."""

    def config(self, context: int | None) -> ModelConfig:
        file, arch = self.file, self.arch
        self.refuse_unknown()
        layers = self.layers
        width = self.count("embedding_length")
        heads = self.count("attention.head_count")
        trained = self.count("context_length")
        windows = self.windows()
        head_dims = self.head_dims(windows, width // heads)
        ropes, layer_ropes = self.ropes(head_dims, windows, trained, context or trained)
        embedding = file.tensor("token_embd.weight").shape
        kv_heads = self.counts("attention.head_count_kv", heads, maximum=heads)
        for count in kv_heads:
            if heads % count:
                raise FormatError(f"{file.path}: {heads} query heads cannot share {count} KV heads evenly")
        if len(embedding) != 2 or embedding[1] != width:
            raise FormatError(f"{file.path}: token_embd.weight has shape {embedding}, not (vocabulary, {width})")
        if embedding[0] > _MAX_TOKENS:
            raise UnsupportedError(f"{file.path}: a vocabulary of {embedding[0]} is over the limit of {_MAX_TOKENS}")
        experts = self.experts()
        epsilon = "layer_norm_rms_epsilon" if arch.norm == "rms" else "layer_norm_epsilon"
        return ModelConfig(
            arch=self.name,
            num_layers=layers,
            width=width,
            num_heads=heads,
            layer_kv_heads=kv_heads,
            layer_head_dims=head_dims,
            layer_ffn_widths=self.counts("feed_forward_length", minimum=int(experts is None)),
            vocab_size=embedding[0],
            context_length=trained,
            norm=arch.norm,
            norm_eps=self.number(f"attention.{epsilon}", minimum=0.0),
            activation=arch.activation,
            attention_scale=self.attention_scale(width / heads, head_dims),
            ropes=ropes,
            layer_ropes=layer_ropes,
            layer_windows=windows,
            layer_kv=self.layer_kv(list(zip(windows, kv_heads, head_dims, strict=True))),
            per_layer_width=self.count("embedding_length_per_layer_input", 0, minimum=0),
            num_gates=self.num_gates(heads, head_dims),
            attention_softcap=self.number("attn_logit_softcapping", arch.default_softcaps[0], minimum=0.0),
            final_softcap=self.number("final_logit_softcapping", arch.default_softcaps[1], minimum=0.0),
            experts=experts,
            layer_experts=() if experts is None else self.layer_experts(),
            **self.multipliers(width),
            qkv_clamp=self.number("attention.clamp_kqv", 0.0, minimum=0.0),
            is_parallel=self.is_parallel(),
            has_learned_positions="position_embd" in arch.outer.split(),
            xielu=self.xielu() if arch.activation == "xielu" else (),
        )

    def refuse_unknown(self) -> None:
        """Raises UnsupportedError for what files may say and no layer here does."""
        for key, neutral in (_NEUTRAL if self.arch.end else _NEUTRAL | _OF_LAYER_ENDS).items():
            value = self.file.metadata.get(f"{self.name}.{key}", neutral)
            if not isinstance(value, bool | int | float | np.ndarray) or np.any(np.asarray(value) != neutral):
                raise UnsupportedError(f"{self.file.path}: {self.name}.{key} = {show(value)} is not supported")
        activation = self.file.get_str(f"{self.name}.hidden_activation", "")
        if activation and self.arch.activation not in _ACTIVATIONS.get(activation, ()):
            raise UnsupportedError(f"{self.file.path}: activation {activation!r:.60} is not supported in {self.name}")

    def multipliers(self, width: int) -> dict[str, float]:
        """Factors of the embeddings, of results that are added to the stream, and of logits."""
        arch = self.arch
        scales = {"embedding_scale": math.sqrt(width) if arch.scales_embedding else 1.0}
        if arch.has_multipliers:
            scales = {key: self.number(key, 1.0, minimum=1e-6, maximum=1e6) for key in _MULTIPLIERS}
            scales["stream_scale"] = scales["residual_scale"]  # what is added then needs no factor
        if arch.logit_scale != "none":
            scale = self.number("logit_scale", minimum=1e-6, maximum=1e6)
            scales["logit_scale"] = scale if arch.logit_scale == "factor" else 1.0 / scale
        return scales

    def is_parallel(self) -> bool:
        """Whether attention and feed-forward read the same stream."""
        match self.arch.parallel:
            case "key":
                return self.flag("use_parallel_residual", True)
            case "without_ffn_norm":
                return "blk.0.ffn_norm.weight" not in self.file.tensors
            case _:
                return self.arch.parallel == "always"

    def xielu(self) -> tuple[tuple[float, ...], ...]:
        """The four numbers of each layer's activation. A file may give one number for all layers."""
        columns = []
        for key in ("xielu.alpha_n", "xielu.alpha_p", "xielu.beta", "xielu.eps"):
            value = self.file.metadata.get(key)
            if isinstance(value, np.ndarray):
                columns.append([float(entry) for entry in self.per_layer(key, value, "f")])
            else:
                columns.append([self.file.get_float(key)] * self.layers)
        if not np.isfinite(columns).all():
            raise FormatError(f"{self.file.path}: keys 'xielu.*' should hold finite numbers")
        return tuple(zip(*columns, strict=True))

    def experts(self) -> ExpertsConfig | None:
        """The numbers of the mixture of experts; None in a dense model."""
        path, router = self.file.path, self.arch.router
        count = self.count("expert_count", 0, minimum=0)
        if count == 0:
            return None
        if self.arch.experts is None:
            raise UnsupportedError(f"{path}: experts of architecture {self.name!r} are not supported")
        used = self.count("expert_used_count", maximum=count)
        groups = self.count("expert_group_count", 0, minimum=0) or 1
        for number, most, what in (
            (count, MAX_EXPERTS, "experts"),
            (used, MAX_USED, "experts of a token"),
            (groups, MAX_GROUPS, "groups"),
        ):
            if number > most:
                raise UnsupportedError(f"{path}: {number} {what} are over the limit of {most}")
        width = self.count("expert_feed_forward_length", 0, minimum=0) or self.inner_of("ffn_down_exps")
        shared_width = self.inner_of("ffn_down_shexp")
        if shared_width:  # keys that say less are not there in each family
            stated = self.count("expert_shared_count", 0, minimum=0) * width
            shared_width = self.count("expert_shared_feed_forward_length", 0, minimum=0) or stated or shared_width
        gating = self.count("expert_gating_func", 0, minimum=0)
        if gating not in _ROUTER_SCORES:
            raise UnsupportedError(f"{path}: {self.name}.expert_gating_func {gating} is not supported")
        found = ExpertsConfig(
            count=count,
            used=used,
            width=width,
            shared_width=shared_width,
            scores=_ROUTER_SCORES[gating] or router.scores,
            renormalizes=gating == _SOFTMAX_OF_CHOSEN or self.flag("expert_weights_norm", router.renormalizes),
            scale=self.number("expert_weights_scale", 0.0, minimum=0.0, maximum=1e6) or 1.0,
            groups=groups,
            used_groups=self.count("expert_group_used_count", 0, minimum=0, maximum=groups) or groups,
        )
        if count % groups or found.used > count // groups * found.used_groups or (groups > 1 and count < 2 * groups):
            raise FormatError(
                f"{path}: {count} experts in {groups} groups, of which {found.used_groups} are chosen, cannot give "
                f"{found.used} experts"
            )
        return found

    def layer_experts(self) -> tuple[bool, ...]:
        """Whether the feed-forward of each layer has experts."""
        dense = self.count("leading_dense_block_count", 0, minimum=0)
        step = self.count("interleave_moe_layer_step", 1, minimum=0)  # 0 = no layer has
        return tuple(layer >= dense and step > 0 and (layer + 1) % step == 0 for layer in range(self.layers))

    def inner_of(self, tensor: str) -> int:
        """The inner dimension of a matrix in the first layer that has it; 0 where none has it."""
        names = (f"blk.{layer}.{tensor}.weight" for layer in range(self.layers))
        return next((self.file.tensors[name].shape[-1] for name in names if name in self.file.tensors), 0)
