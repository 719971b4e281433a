"""ModelConfig from the key-values of a GGUF file."""

from __future__ import annotations

import math
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import numpy as np
import numpy.typing as npt

from forge.config import ExpertsConfig, ModelConfig, RopeConfig, RouterScores
from forge.errors import FormatError, UnsupportedError
from forge.formats.gguf import GGUF
from forge.models.arch import ARCHS
from forge.models.family import Arch
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
_MULTIPLIERS = ("embedding_scale", "residual_scale")
_MAX_LAYERS = 1024
_MAX_COUNT = 2**31 - 1
_MAX_TOKENS = 2**20
"""What the sampler's fixed-point sums hold."""
_SOFTMAX_OF_CHOSEN = 3
_ROUTER_SCORES: dict[int, RouterScores | None] = {0: None, 1: "softmax", 2: "sigmoid", _SOFTMAX_OF_CHOSEN: "softmax"}
"""By ggml's number of the gating function; 0 = the family's."""


def read_config(file: GGUF, context: int | None = None) -> ModelConfig:
    """The model's numbers, for a context of so many positions (None = the model's own).

    The context matters where a model has RoPE factors for short and for long contexts (longrope). Raises FormatError
    for a missing or impossible key and UnsupportedError for an architecture without a row in the table.
    """
    name = file.get_str("general.architecture")
    if name not in ARCHS:
        alike = ", ".join(get_close_matches(name, ARCHS, 5, 0.4)) or "none"
        raise UnsupportedError(
            f"{file.path}: architecture {name!r:.60} is not supported; of the {len(ARCHS)} that are, these have names "
            f"like it: {alike}"
        )
    return _Reader(file, name, ARCHS[name]).config(context)


class _Reader:
    """Reads keys below the architecture's prefix."""

    def __init__(self, file: GGUF, name: str, arch: Arch) -> None:
        self.file, self.name, self.arch = file, name, arch
        self.stored_layers = file.get_int(f"{name}.block_count", min=1, max=_MAX_LAYERS)
        """With those of multi-token prediction, which are not run."""
        prediction = file.get_int(f"{name}.nextn_predict_layers", 0, max=self.stored_layers - 1)
        self.layers = self.stored_layers - prediction

    def config(self, context: int | None) -> ModelConfig:
        file, arch = self.file, self.arch
        self.refuse_unknown()
        layers = self.layers
        width = self.count("embedding_length")
        heads = self.count("attention.head_count")
        head_dim = self.count("attention.key_length", width // heads)
        trained = self.count("context_length")
        windows = self.windows()
        ropes, layer_ropes = self.ropes(head_dim, windows, trained, context or trained)
        embedding = file.tensor("token_embd.weight").shape
        kv_heads = self.count("attention.head_count_kv", heads, maximum=heads)
        if self.count("attention.value_length", head_dim) != head_dim:
            raise UnsupportedError(f"{file.path}: keys and values of different lengths are not supported")
        if heads % kv_heads:
            raise FormatError(f"{file.path}: {heads} query heads cannot share {kv_heads} KV heads evenly")
        if len(embedding) != 2 or embedding[1] != width:
            raise FormatError(f"{file.path}: token_embd.weight has shape {embedding}, not (vocabulary, {width})")
        if embedding[0] > _MAX_TOKENS:
            raise UnsupportedError(f"{file.path}: a vocabulary of {embedding[0]} is over the limit of {_MAX_TOKENS}")
        experts = self.experts()
        epsilon = "layer_norm_rms_epsilon" if arch.norm == "rms" else "layer_norm_epsilon"
        scaled = width / heads if layers == arch.width_scaled_layers else head_dim
        return ModelConfig(
            arch=self.name,
            num_layers=layers,
            width=width,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            ffn_width=self.count("feed_forward_length", minimum=int(experts is None)),
            vocab_size=embedding[0],
            context_length=trained,
            norm=arch.norm,
            norm_eps=self.number(f"attention.{epsilon}", minimum=0.0),
            activation=arch.activation,
            attention_scale=self.number("attention.scale", 0.0, minimum=0.0) or scaled**-0.5,
            ropes=ropes,
            layer_ropes=layer_ropes,
            layer_windows=windows,
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
        for key, neutral in _NEUTRAL.items():
            value = self.file.metadata.get(f"{self.name}.{key}", neutral)
            if np.any(np.asarray(value) != neutral):
                shown = value.tolist() if isinstance(value, np.ndarray) else value
                raise UnsupportedError(f"{self.file.path}: {self.name}.{key} = {shown!r:.60} is not supported")
        activation = self.file.get_str(f"{self.name}.hidden_activation", "")
        if activation and self.arch.activation not in _ACTIVATIONS.get(activation, ()):
            raise UnsupportedError(f"{self.file.path}: activation {activation!r:.60} is not supported in {self.name}")

    def multipliers(self, width: int) -> dict[str, float]:
        """Factors of the embeddings, of results that are added to the stream, and of logits."""
        arch = self.arch
        scales = {"embedding_scale": math.sqrt(width) if arch.scales_embedding else 1.0}
        if arch.has_multipliers:
            scales = {key: self.number(key, 1.0, minimum=1e-6, maximum=1e6) for key in _MULTIPLIERS}
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
            case when:
                return when == "always"

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

    def count(self, key: str, default: int | None = None, *, minimum: int = 1, maximum: int = _MAX_COUNT) -> int:
        """A whole number; a file may give it per layer, then all layers must agree."""
        full = f"{self.name}.{key}"
        value = self.file.metadata.get(full)
        if not isinstance(value, np.ndarray):
            return self.file.get_int(full, default, min=minimum, max=maximum)
        entries = self.per_layer(full, value, "iu")
        if (entries != entries[0]).any():
            raise UnsupportedError(f"{self.file.path}: {full} differs between layers, which is not supported")
        if not minimum <= int(entries[0]) <= maximum:
            raise FormatError(f"{self.file.path}: key {full!r} should be from {minimum} to {maximum}, not {entries[0]}")
        return int(entries[0])

    def per_layer(self, key: str, entries: npt.NDArray[Any], kinds: str) -> npt.NDArray[Any]:
        """The entries of the layers that run; like llama.cpp, of an array with one for each layer in the file."""
        if entries.dtype.kind not in kinds:
            raise FormatError(f"{self.file.path}: key {key!r} should not hold {entries.dtype.name} numbers")
        if len(entries) != self.stored_layers:
            raise FormatError(
                f"{self.file.path}: key {key!r} has {len(entries)} entries for {self.stored_layers} layers"
            )
        return entries[: self.layers]

    def number(
        self, key: str, default: float | None = None, *, minimum: float = -math.inf, maximum: float = math.inf
    ) -> float:
        return self.file.get_float(f"{self.name}.{key}", default, min=minimum, max=maximum)

    def experts(self) -> ExpertsConfig | None:
        """The numbers of the mixture of experts; None in a dense model."""
        path, router = self.file.path, self.arch.router
        count = self.count("expert_count", 0, minimum=0)
        if count == 0:
            return None
        if self.arch.experts is None:
            raise UnsupportedError(f"{path}: experts of architecture {self.name!r} are not supported")
        used, groups = (
            self.count("expert_used_count", maximum=count),
            self.count("expert_group_count", 0, minimum=0) or 1,
        )
        limits = (count, MAX_EXPERTS, "experts"), (used, MAX_USED, "experts of a token"), (groups, MAX_GROUPS, "groups")
        for number, most, what in limits:
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
            scale=self.number("expert_weights_scale", 0.0) or 1.0,
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
        step = self.count("interleave_moe_layer_step", 1)
        return tuple(layer >= dense and (layer + 1) % step == 0 for layer in range(self.layers))

    def inner_of(self, tensor: str) -> int:
        """The inner dimension of a matrix in the first layer that has it; 0 where none has it."""
        names = (f"blk.{layer}.{tensor}.weight" for layer in range(self.layers))
        return next((self.file.tensors[name].shape[-1] for name in names if name in self.file.tensors), 0)

    def flag(self, key: str, default: bool) -> bool:
        """A truth value, which a file may give as a number."""
        value = self.file.metadata.get(f"{self.name}.{key}", default)
        if not isinstance(value, int | float):
            raise FormatError(f"{self.file.path}: key '{self.name}.{key}' should be a truth value")
        return bool(value)

    def windows(self) -> tuple[int, ...]:
        """Each layer's window."""
        key = f"{self.name}.attention.sliding_window_pattern"
        window = self.count("attention.sliding_window", self.arch.default_window, minimum=0)
        pattern = self.file.metadata.get(key, self.arch.global_every)
        if isinstance(pattern, np.ndarray):  # per layer: is it local
            local = [bool(entry) for entry in self.per_layer(key, pattern, "biu")]
        else:
            every = self.file.get_int(key, self.arch.global_every)
            local = [not every or (layer + 1) % every != 0 for layer in range(self.layers)]
        return tuple(window if is_local else 0 for is_local in local)

    def ropes(
        self, head_dim: int, windows: tuple[int, ...], trained: int, context: int
    ) -> tuple[tuple[RopeConfig, ...], tuple[int, ...]]:
        """The distinct RoPEs: of global layers, of windowed layers, and none; and which layer has which.

        Where q and k are normed behind the rotation, the last one is none.
        """
        dim = self.count("rope.dimension_count", head_dim, maximum=head_dim)
        if dim % 2:
            raise FormatError(f"{self.file.path}: {self.name}.rope.dimension_count is odd: {dim}")
        base = self.number("rope.freq_base", 10_000.0, minimum=1.0)
        plain = RopeConfig(style=self.arch.rope, dim=dim, base=base)
        local = scaled = self.scaling(plain, trained, context)
        if self.arch.local_rope_base is not None:
            local_base = self.number("rope.freq_base_swa", self.arch.local_rope_base or base, minimum=1.0)
            local = replace(plain, base=local_base)
        none = replace(scaled, dim=0, factors=None, magnitude=1.0)
        layers = [
            none if is_unrotated else local if window else scaled
            for window, is_unrotated in zip(windows, self.unrotated(windows), strict=True)
        ]
        distinct = tuple(dict.fromkeys(sorted(layers, key=(scaled, local, none).index)))
        indices = tuple(distinct.index(layer) for layer in layers)
        return (*distinct, none) if self.arch.qk_norm_after_rope else distinct, indices

    def unrotated(self, windows: tuple[int, ...]) -> list[bool]:
        """Whether each layer is without RoPE."""
        arch, every = self.arch, self.arch.nope_every
        is_without = arch.nope == "all" or (arch.nope_key and not self.flag("rope.scaling.finetuned", True))
        is_global = arch.nope == "global" and any(windows)
        return [
            is_without or (is_global and not window) or (every > 0 and (layer + 1) % every == 0)
            for layer, window in enumerate(windows)
        ]

    def scaling(self, plain: RopeConfig, trained: int, context: int) -> RopeConfig:
        """RoPE scaled as the file says: linear, YaRN, or by a tensor of factors (llama3, longrope)."""
        original = self.count("rope.scaling.original_context_length", trained)
        kind = self.file.get_str(f"{self.name}.rope.scaling.type", "linear")
        factor = self.number("rope.scaling.factor", 0.0) or self.number("rope.scale_linear", 0.0) or 1.0
        if not 1e-3 <= factor <= 1e6:
            raise FormatError(f"{self.file.path}: {self.name}.rope.scaling.factor is impossible: {factor}")
        factors = self.factors(plain.dim, "long" if context > original else "short")
        scaled = replace(
            plain,
            factors=factors,
            magnitude=self.number("rope.scaling.attn_factor", 1.0),
            original_context=original,
            query_growth=self.number("attention.temperature_scale", 0.0),
        )
        if kind in ("none", "longrope"):
            return scaled
        if kind == "linear":
            return replace(scaled, frequency_scale=1.0 / factor)
        if kind != "yarn":
            raise UnsupportedError(f"{self.file.path}: RoPE scaling {kind!r:.60} is not supported")
        if plain.base <= 1.0:
            raise FormatError(f"{self.file.path}: YaRN needs {self.name}.rope.freq_base above 1, not {plain.base}")
        # log_multiplier is the share of the magnitude that the attention scale has already
        growth = 0.1 * math.log(max(factor, 1.0))
        magnitude = (growth + 1.0) / (growth * self.number("rope.scaling.yarn_log_multiplier", 0.0, minimum=0.0) + 1.0)
        return replace(
            scaled,
            frequency_scale=1.0 / factor,
            magnitude=self.number("rope.scaling.yarn_attn_factor", scaled.magnitude * magnitude),
            yarn_betas=(
                self.number("rope.scaling.yarn_beta_fast", 32.0, minimum=1e-6, maximum=1e6),
                self.number("rope.scaling.yarn_beta_slow", 1.0, minimum=1e-6, maximum=1e6),
            ),
        )

    def factors(self, dim: int, length: str) -> tuple[float, ...] | None:
        """Divisors of the frequencies: one tensor (llama3), or the one for short or long contexts (longrope)."""
        for name in ("rope_freqs.weight", f"rope_factors_{length}.weight"):
            if name in self.file.tensors:
                fits = self.file.tensors[name].shape == (dim // 2,)
                values = self.file.load(name) if fits else np.empty(0)
                if not fits or not np.isfinite(values).all() or (values <= 0).any():
                    raise FormatError(f"{self.file.path}: tensor {name!r} should be {dim // 2} positive numbers")
                return tuple(float(value) for value in values)
        return None
