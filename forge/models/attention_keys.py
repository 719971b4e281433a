"""What a file's keys say of attention: heads, windows, rotary embeddings, and whose keys and values a layer reads."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from forge.config import RopeConfig
from forge.errors import FormatError, UnsupportedError
from forge.models.keys import Keys


class AttentionKeys(Keys):
    """Reads what attention needs."""

    def head_dims(self, windows: tuple[int, ...], default: int) -> tuple[int, ...]:
        """Numbers of a head in each layer: those with a window may have others."""
        dims, local = (
            {length: self.count(f"attention.{length}_length{kind}", usual) for length in ("key", "value")}
            for kind, usual in (("", default), ("_swa", self.count("attention.key_length", default)))
        )
        if dims["key"] != dims["value"] or local["key"] != local["value"]:
            raise UnsupportedError(f"{self.file.path}: keys and values of different lengths are not supported")
        return tuple(local["key"] if window else dims["key"] for window in windows)

    def attention_scale(self, width: float, head_dims: tuple[int, ...]) -> float:
        """The factor of scores. width: E / H."""
        scale = self.number("attention.scale", 0.0, minimum=0.0) or self.arch.attention_scale
        if scale is None and len(set(head_dims)) > 1:
            raise UnsupportedError(f"{self.file.path}: heads of several lengths and no attention scale")
        return scale or (width if self.layers == self.arch.width_scaled_layers else head_dims[0]) ** -0.5

    def layer_kv(self, layers: list[tuple[int, int, int]]) -> tuple[int, ...]:
        """The layer whose keys and values each layer reads: the last ones read those of the last layer like them that
        has some. Layers are alike that have the same window and heads."""
        own = self.layers - self.count("attention.shared_kv_layers", 0, minimum=0, maximum=self.layers - 1)
        found = list(range(own))
        for layer in range(own, self.layers):
            like = [earlier for earlier in range(own) if layers[earlier] == layers[layer]]
            if not like:
                raise FormatError(f"{self.file.path}: layer {layer} shares keys and values, and no layer is like it")
            found.append(like[-1])
        return tuple(found)

    def num_gates(self, heads: int, head_dims: tuple[int, ...]) -> int:
        """Gates of attention's results: one for each head, or for each number of it; 0 = none."""
        if not any("attn_gate" in mixer.tensors.split() for mixer in self.arch.mixers):
            return 0
        name = "blk.0.attn_gate.weight"
        found = self.file.tensor(name).shape
        if found[0] != heads and {found[0]} != {heads * dim for dim in head_dims}:
            raise FormatError(f"{self.file.path}: tensor {name!r} has {found[0]} rows for {heads} heads")
        return found[0]

    def windows(self) -> tuple[int, ...]:
        """Each layer's window or chunk, as of `ModelConfig.layer_windows`."""
        key = f"{self.name}.attention.sliding_window_pattern"
        least = int(self.arch.default_window is None)  # where a file has to name it, the family's layers have it
        window = self.count("attention.sliding_window", self.arch.default_window, minimum=least)
        pattern = self.file.metadata.get(key, self.arch.global_every)
        if isinstance(pattern, np.ndarray):  # per layer: is it local
            local = [bool(entry) for entry in self.per_layer(key, pattern, "biu")]
        else:
            every = self.file.get_int(key, self.arch.global_every)
            local = [not every or (layer + 1) % every != 0 for layer in range(self.layers)]
        return tuple(window if is_local else 0 for is_local in local)

    def ropes(
        self, head_dims: tuple[int, ...], windows: tuple[int, ...], trained: int, context: int
    ) -> tuple[tuple[RopeConfig, ...], tuple[int, ...]]:
        """The distinct RoPEs: of global layers, of windowed layers, and none; and which layer has which.

        Where q and k are normed behind the rotation, the last one is none.
        """
        of_global, of_local = (
            next((dim for dim, window in zip(head_dims, windows, strict=True) if bool(window) is local), head_dims[0])
            for local in (False, True)
        )
        dim = self.rope_dim("rope.dimension_count", of_global, of_global)
        local_dim = self.rope_dim("rope.dimension_count_swa", dim if of_local == of_global else of_local, of_local)
        base = self.number("rope.freq_base", 10_000.0, minimum=1.0)
        plain = RopeConfig(style=self.arch.rope, dim=dim, base=base)
        local = scaled = self.scaling(plain, trained, context)
        if self.arch.local_rope_base is not None:
            local_base = self.number("rope.freq_base_swa", self.arch.local_rope_base or base, minimum=1.0)
            local = replace(plain, base=local_base, dim=local_dim)
        none = replace(scaled, dim=0, factors=None, magnitude=1.0)
        if growth := self.arch.nope_temperature:
            scaled, local = (replace(rope, query_growth=0.0) for rope in (scaled, local))
            of_length = self.count("attention.temperature_length", growth[1])
            growing = self.number("attention.temperature_scale", growth[0])
            none = replace(none, query_growth=growing, original_context=of_length, query_offset=1)
        layers = [
            none if is_unrotated else local if window else scaled
            for window, is_unrotated in zip(windows, self.unrotated(windows), strict=True)
        ]
        for layer, (rope, head_dim) in enumerate(zip(layers, head_dims, strict=True)):
            if rope.dim > head_dim:
                raise FormatError(
                    f"{self.file.path}: layer {layer} rotates {rope.dim} numbers of heads that have {head_dim}"
                )
        distinct = tuple(dict.fromkeys(sorted(layers, key=(scaled, local, none).index)))
        indices = tuple(distinct.index(layer) for layer in layers)
        return (*distinct, none) if self.arch.qk_norm_after_rope else distinct, indices

    def rope_dim(self, key: str, default: int, head_dim: int) -> int:
        """Numbers of a head that rotate. Raises FormatError for an odd number, or for more than `head_dim`."""
        dim = self.count(key, default, maximum=head_dim)
        if dim % 2:
            raise FormatError(f"{self.file.path}: {self.name}.{key} is odd: {dim}")
        return dim

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
            yarn_rounds=self.arch.yarn_rounds,
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
        if self.arch.has_rope_factors:
            raise FormatError(f"{self.file.path}: tensor 'rope_freqs.weight' is missing")
        return None
