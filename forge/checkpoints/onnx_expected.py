"""What each weight of a decoder reads, by the weights that a model has: for `onnx_wiring`.

A weight's role is GGUF's name without blk and with the layer behind it: "attn_q.0", "output_norm". A weight of joined
matrices is "attn_qkv.0".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from forge.config import ModelConfig
from forge.models.arch import ARCHS

Roles = frozenset[str]
_EXPERTS = ("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_up_exps")
_SHARED = ("ffn_gate_inp_shexp", "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")
_JOINED = ("attn_qkv", "ffn_gate_up")


class Expected:
    """What a model's weights read, by their roles and its numbers."""

    def __init__(self, roles: Iterable[str], numbers: ModelConfig) -> None:
        self.roles, self.numbers = frozenset(roles), numbers
        self.arch = ARCHS[numbers.arch]
        self.norm_before = "post_attention_norm" if self._is_renamed() else "ffn_norm"
        """The norm that feed-forwards read."""
        start = frozenset({"token_embd", *self._of("position_embd")})
        self.streams = [start]
        """Terms of the residual stream before each layer, and behind the last one."""
        self.middles: list[Roles] = []
        """Those before the feed-forward."""
        for layer in range(numbers.num_layers):
            behind = self._first(layer, "" if self._is_renamed() else "post_attention_norm", "attn_output")
            middle = self.streams[-1] | behind
            self.middles.append(middle)
            self.streams.append(middle | self._first(layer, "post_ffw_norm", "ffn_down", *_EXPERTS[3:4]))
        self.layers_with_attention = {f"{layer}" for layer in range(numbers.num_layers)}

    def source_of(self, role: str) -> list[Roles]:
        """What a weight may read. None in the list for one that is no decoder's."""
        kind, _, at = role.partition(".")
        if kind == "output_norm":
            return [self.streams[-1]]
        if kind == "output":
            return [self._of("output_norm") or self.streams[-1]]
        if not at.isdecimal() or int(at) >= self.numbers.num_layers:
            return []
        layer = int(at)
        stream, middle = self.streams[layer], self.middles[layer]
        if self.numbers.is_parallel:
            middle = stream
        of_queries = self._first(layer, "attn_norm_2", "attn_norm") or stream
        of_feed_forward = self._first(layer, self.norm_before) or (
            self._first(layer, "attn_norm") or stream if self.numbers.is_parallel else middle
        )
        match kind:
            case "attn_norm" | "attn_norm_2":
                return [stream]
            case "attn_q" | "attn_k" | "attn_v" | "attn_qkv" | "attn_gate":
                return [of_queries]
            case "attn_q_norm" | "attn_k_norm":
                return [self._first(layer, kind.removesuffix("_norm"), "attn_qkv")]
            case "attn_output":
                queries, keys, values = self._operands(layer)
                return [queries | keys | values | self._first(layer, "attn_gate")]
            case _ if kind == self.norm_before:
                return [middle]
            case "post_attention_norm":
                return [self._first(layer, "attn_output")]
            case "ffn_gate" | "ffn_up" | "ffn_gate_up" | "ffn_gate_inp" | "ffn_gate_inp_shexp":
                return [of_feed_forward]
            case "ffn_gate_exps" | "ffn_up_exps" | "ffn_gate_shexp" | "ffn_up_shexp" | "ffn_gate_up_exps":
                return [of_feed_forward]
            case "ffn_down":
                return [self._both(layer, "")]
            case "ffn_down_exps" | "ffn_down_shexp":
                return [self._both(layer, kind.removeprefix("ffn_down"))]
            case "post_ffw_norm":
                return [self._first(layer, "ffn_down")]
        return []

    def has_plain_norm(self, role: str) -> bool:
        """Whether a matrix reads the stream through a norm that has no weights."""
        kind, _, layer = role.partition(".")
        if self.arch.reads_stream or self.numbers.norm != "layer":
            return False
        if kind == "output":
            return not self._of("output_norm")
        if kind in ("attn_q", "attn_k", "attn_v", "attn_qkv"):
            return not self._first(int(layer), "attn_norm_2", "attn_norm")
        is_first = kind in ("ffn_gate", "ffn_up", "ffn_gate_up")
        return is_first and not self._first(int(layer), self.norm_before, *["attn_norm"] * self.numbers.is_parallel)

    def is_norm(self, role: str) -> bool:
        """Whether a weight is that of a norm, which no factor changes."""
        return role.partition(".")[0].endswith("norm") or "_norm_" in role

    def factor_of(self, terms: Iterable[str | int]) -> float:
        """What an operand of a sum is multiplied by."""
        kinds = [str(term).partition(".")[0] for term in terms]
        if kinds == ["token_embd"]:
            return self.numbers.embedding_scale
        return self.numbers.residual_scale if kinds in (["attn_output"], ["ffn_down"]) else 1.0

    def step_of(self, role: str) -> str:
        """What a matrix reads behind other weights is; "" for what it reads as it is."""
        kind, _, layer = role.partition(".")
        if kind == "attn_output":
            return "" if self._first(int(layer), "attn_gate") else "attended"
        return "activated" if kind.startswith("ffn_down") else ""

    def rotates(self, queries: Roles) -> bool | None:
        """Whether the layer of these queries rotates; None where norms come behind the rotation."""
        if self.arch.qk_norm_after_rope:
            return None
        (layer,) = self.layers_of(queries)
        return self.numbers.ropes[self.numbers.layer_ropes[int(layer)]].dim > 0

    def is_of_experts(self, role: str, found: Roles, wanted: Sequence[Roles]) -> bool:
        """Whether what is read differs from what is expected only in weights of mixtures of earlier sublayers."""
        if self.numbers.experts is None or not wanted:
            return False
        layers = range(self.numbers.num_layers)
        of_experts = {f"{kind}.{layer}" for kind in (*_EXPERTS, *_SHARED) for layer in layers} & self.roles
        kind, _, at = role.partition(".")
        if kind not in ("output_norm", "output"):
            last = int(at) - (kind not in (*_EXPERTS, *_SHARED))
            of_experts = {one for one in of_experts if int(one.partition(".")[2]) <= last}
        return any(one <= found <= one | of_experts for one in wanted)

    def scores(self, roles: Roles) -> tuple[Roles, Roles] | None:
        """Queries and keys of the layer whose they are; None where these are not the weights of both."""
        for layer in self.layers_of(roles):
            queries, keys, _ = self._operands(int(layer))
            if roles == queries | keys:
                return queries, keys
        return None

    def values(self, roles: Roles) -> str | None:
        """The layer whose values these are."""
        return next((layer for layer in self.layers_of(roles) if roles == self._operands(int(layer))[2]), None)

    def attention(self, roles: Sequence[Roles]) -> str | None:
        """The layer that has these queries, keys and values, or all of them joined in the first."""
        layers = self.layers_of(roles[0])
        if len(layers) != 1:
            return None
        (layer,) = layers
        operands = self._operands(int(layer))
        is_joined = not roles[1] and not roles[2] and len({*operands}) == 1 and roles[0] == operands[0]
        return layer if is_joined or tuple(roles) == operands else None

    def is_attention(self, roles: Roles) -> bool:
        return any(role.startswith(("attn_q", "attn_k", "attn_v")) for role in roles)

    def is_joined(self, roles: Roles) -> bool:
        """Whether these are one matrix of q, k and v, or of gate and up."""
        if len(roles) != 1:
            return False
        (role,) = roles
        kind, _, layer = role.partition(".")
        return kind in _JOINED or (kind == "ffn_up" and self._is_gated(layer) and f"ffn_gate.{layer}" not in self.roles)

    def is_up(self, roles: Roles) -> bool:
        """Whether these are the matrix whose result the activation of another one multiplies."""
        if len(roles) != 1:
            return False
        (role,) = roles
        return role.startswith("ffn_up") and role.replace("ffn_up", "ffn_gate") in self.roles

    def layers_of(self, roles: Roles) -> set[str]:
        return {role.partition(".")[2] for role in roles if "." in role}

    def _operands(self, layer: int) -> tuple[Roles, Roles, Roles]:
        """Queries, keys and values."""
        keys = self._first(layer, "attn_k_norm", "attn_k", "attn_qkv")
        values = self._first(layer, "attn_v", "attn_qkv") or keys
        return self._first(layer, "attn_q_norm", "attn_q", "attn_qkv"), keys, values

    def _both(self, layer: int, suffix: str) -> Roles:
        return frozenset({f"{kind}{suffix}.{layer}" for kind in ("ffn_gate", "ffn_up", "ffn_gate_up")}) & self.roles

    def _first(self, layer: int, *kinds: str) -> Roles:
        """The first of these weights that the layer has."""
        return next((frozenset({f"{kind}.{layer}"}) for kind in kinds if f"{kind}.{layer}" in self.roles), Roles())

    def _of(self, role: str) -> Roles:
        return frozenset({role}) & self.roles

    def _is_renamed(self) -> bool:
        return any("ffn_norm=post_attention_norm" in sublayer.tensors for sublayer in self.arch.feed_forwards)

    def _is_gated(self, layer: str) -> bool:
        kinds = self.arch.feed_forwards
        return layer.isdecimal() and kinds[int(layer) % len(kinds)].kind == "gated"
