"""The decoder: a stack of attention and gated feed-forward blocks. Differences between families are data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from forge.backend import Backend
from forge.config import ModelConfig
from forge.models.arch import ARCHS
from forge.models.batch import Batch
from forge.models.layers import Embedding, Linear, Norm
from forge.models.rope import RopeTables, tables
from forge.models.weights import Weights
from forge.ops.activation import add, gelu, soft_cap
from forge.ops.attention import paged_attention
from forge.ops.decode_attention import decode_attention
from forge.ops.embed import take_rows
from forge.ops.kv_cache import take_slots
from forge.ops.rope import layernorm_heads, rope_append_kv
from forge.state.paged_kv import KVCache

Tap = Callable[[str, Any], None]
"""Called with the name and the array of each intermediate result. The array is lent: copy what you keep."""


class Block:
    """One layer. Attributes are named like the file's tensors; products of one input are stacked into one."""

    def __init__(self, weights: Weights, config: ModelConfig, index: int) -> None:
        self.index = index
        arch = ARCHS[config.arch]
        required = arch.layer.split()
        optional = arch.layer_optional.split()
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        width, ffn_width = config.width, config.ffn_width

        def name(tensor: str) -> str:
            return f"blk.{index}.{tensor}" if tensor.endswith(".bias") else f"blk.{index}.{tensor}.weight"

        def linear(tensors: dict[str, int], cols: int, joined: str | None = None) -> Linear:
            """The named matrices, by their rows, as one product; a bias if the family has it or this file brings it."""

            def stored(suffix: str) -> tuple[dict[str, int], str | None]:
                sizes = {name(tensor + suffix): size for tensor, size in tensors.items()}
                return sizes, name(joined + suffix) if joined else None

            matrix = weights.matrix(*stored(""), cols=cols)
            sizes, whole = stored(".bias")
            known = {tensor + ".bias" for tensor in tensors}
            is_there = any(weights.has(bias) for bias in (*sizes, whole) if bias)
            if known & set(required) or (known & set(optional) and is_there):
                return Linear(matrix, weights.vector(sizes, whole))
            return Linear(matrix)

        def has_norm(tensor: str) -> bool:
            return tensor in required or (tensor in optional and weights.has(f"blk.0.{tensor}.weight"))

        def norm(tensor: str) -> Norm:
            has_bias = f"{tensor}.bias" in (*required, *optional)
            bias = weights.vector({name(f"{tensor}.bias"): width}) if has_bias else None
            return Norm(config.norm, weights.vector({name(tensor): width}), bias, config.norm_eps)

        def norm_or_none(tensor: str) -> Norm | None:
            return norm(tensor) if has_norm(tensor) else None

        self.attn_norm = norm("attn_norm")
        self.attn_qkv = linear({"attn_q": queries, "attn_k": keys, "attn_v": keys}, width, "attn_qkv")
        self.attn_q_norm = self.attn_k_norm = self.head_norms = None
        if arch.norms_each_head and (has_norm("attn_q_norm") or has_norm("attn_k_norm")):
            counts = {"attn_q_norm": config.num_heads, "attn_k_norm": config.num_kv_heads}
            self.head_norms = [weights.heads(name(t), (count, config.head_dim)) for t, count in counts.items()]
        elif has_norm("attn_q_norm"):
            self.attn_q_norm = weights.vector({name("attn_q_norm"): config.head_dim})
            self.attn_k_norm = weights.vector({name("attn_k_norm"): config.head_dim})
        self.attn_output = linear({"attn_output": width}, queries)
        self.post_attention_norm = norm_or_none("post_attention_norm")
        self.ffn_norm = norm_or_none("ffn_norm")
        """None: attention and feed-forward have the same input."""
        gate = {"ffn_gate": ffn_width} if config.gated else {}
        self.ffn_gate_up = linear({**gate, "ffn_up": ffn_width}, width, "ffn_up")
        self.ffn_down = linear({"ffn_down": width}, ffn_width)
        self.post_ffw_norm = norm_or_none("post_ffw_norm")

        self.rope_index = config.layer_ropes[index]
        self.rope_style = config.ropes[self.rope_index].style
        self.window = config.layer_windows[index]
        self.scale, self.softcap = config.attention_scale, config.attention_softcap
        self.norm_eps = config.norm_eps
        self.activation, self.is_gated = config.activation, config.gated

    def linears(self) -> list[Linear]:
        return [self.attn_qkv, self.attn_output, self.ffn_gate_up, self.ffn_down]

    def __call__(
        self, x: Any, delta: Any, batch: Batch, rope: RopeTables, cache: KVCache, tap: Tap | None
    ) -> Any | None:
        """Advance the residual stream x (T, E) in place.

        A delta is what the block before has yet to add to x; what is returned is this block's. The product of one token
        adds to x itself, with no norm behind it, as does that of a prompt.
        """
        k_pages, v_pages = cache.k[self.index], cache.v[self.index]
        is_fused = batch.is_decode and tap is None
        are_few = is_fused and batch.logit_rows is None and len(x) > 1
        h = None
        if self.ffn_norm is None or self.head_norms:
            h = self.attn_norm(x, delta)  # (T, E)
            qkv, bias = self.attn_qkv(h), None
            if self.head_norms:
                layernorm_heads(qkv, *self.head_norms, self.norm_eps)
        else:
            qkv, bias = self.attn_qkv.product(x, self.attn_norm, delta, sliced=is_fused), self.attn_qkv.bias
        # qkv: (T, (H + 2G) * D)
        rope_inputs = qkv, bias, self.attn_q_norm, self.attn_k_norm, rope.rotations, rope.query_scale
        scores = self.scale, self.window, self.softcap
        if is_fused:
            cached = batch.lengths, batch.slots, k_pages, v_pages, batch.page_table
            attended = decode_attention(*rope_inputs, *cached, self.norm_eps, *scores, style=self.rope_style)
        else:
            appended = batch.positions, batch.slots, k_pages, v_pages
            q = rope_append_kv(*rope_inputs, *appended, self.norm_eps, style=self.rope_style)  # (T, H, D)
            if tap:
                tap(f"blk.{self.index}.attn_q", q)
                tap(f"blk.{self.index}.attn_k", take_slots(batch.slots, k_pages))  # (T, G, D)
            attended = paged_attention(q, k_pages, v_pages, batch.starts, batch.lengths, batch.page_table, *scores)
        attended = attended.reshape(len(x), -1)  # (T, H * D)
        delta = _delta(self.attn_output, attended, self.post_attention_norm, x, are_few and self.ffn_norm is not None)
        if self.ffn_norm is None:
            h = self.ffn_gate_up.gated(h, None, activation=self.activation)  # (T, F)
        elif self.is_gated:
            h = self.ffn_gate_up.gated(x, self.ffn_norm, delta, activation=self.activation)  # (T, F)
        else:
            h = gelu(self.ffn_gate_up(self.ffn_norm(x, delta)))  # (T, F)
        delta = _delta(self.ffn_down, h, self.post_ffw_norm, x, are_few)
        if tap:
            tap(f"blk.{self.index}", x if delta is None else add(x, delta))
        return delta


def _delta(product: Linear, h: Any, norm: Norm | None, x: Any, are_few: bool) -> Any | None:
    """A product (T, E) that is yet to be added to x, or None: it has been. That of few rows the next norm adds."""
    if norm is not None:
        return norm.of_residual(product(h))
    if are_few:
        return product.sliced(h)
    product(h, x)
    return None


class Decoder:
    """A model's weights and its forward pass."""

    def __init__(self, weights: Weights, config: ModelConfig, backend: Backend) -> None:
        self.config, self.backend = config, backend
        vocabulary, width = config.vocab_size, config.width
        table = weights.matrix({"token_embd.weight": vocabulary}, cols=width)
        self.token_embd = Embedding(table, config.embedding_scale)
        self.blk = [Block(weights, config, index) for index in range(config.num_layers)]
        bias = weights.vector({"output_norm.bias": width}) if config.norm == "layer" else None
        self.output_norm = Norm(config.norm, weights.vector({"output_norm.weight": width}), bias, config.norm_eps)
        tied = not weights.has("output.weight")
        self.output = Linear(table if tied else weights.matrix({"output.weight": vocabulary}, cols=width))
        self._rope_positions = 0
        self._rope_tables: list[RopeTables] = []

    def linears(self) -> Iterator[Linear]:
        """Every matrix product of a decode step, in order."""
        for block in self.blk:
            yield from block.linears()
        yield self.output

    def reserve(self, positions: int) -> None:
        """Make the RoPE tables reach so many positions; they grow by doubling."""
        if positions > self._rope_positions:
            positions = max(positions, 2 * self._rope_positions)
            self._rope_tables = [tables(rope, positions, self.backend) for rope in self.config.ropes]
            self._rope_positions = positions

    def __call__(self, batch: Batch, cache: KVCache, tap: Tap | None = None) -> Any:
        """float32 logits (R, V) of the batch's logit rows; keys and values of its T tokens go to the cache."""
        x, delta = self.hidden(batch, cache, tap)
        if batch.logit_rows is not None:
            x = take_rows(batch.logit_rows, x)  # (R, E)
            delta = None if delta is None else take_rows(batch.logit_rows, delta)
        logits = self.output.product(x, self.output_norm, delta)  # (R, V)
        return soft_cap(logits, self.config.final_softcap) if self.config.final_softcap else logits

    def hidden(self, batch: Batch, cache: KVCache, tap: Tap | None = None) -> tuple[Any, Any | None]:
        """The residual stream (T, E) behind the blocks, and what is yet to be added to it. No logits are computed."""
        x = self.token_embd(batch.ids)  # (T, E)
        if tap:
            tap("token_embd", x)
        delta = None
        for block in self.blk:
            delta = block(x, delta, batch, self._rope_tables[block.rope_index], cache, tap)
        return x, delta
