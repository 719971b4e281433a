"""How large a step may be, and what it makes of arrays."""

from __future__ import annotations

from forge.backend import Backend
from forge.config import EngineConfig, ModelConfig

_CPU_SEQUENCES, _GPU_SEQUENCES = 64, 256
"""Most sequences that run together where nobody says how many: on a GPU fewer, if memory is short."""
CPU_STEP_TOKENS, _GPU_STEP_TOKENS, _WINDOW_STEP_TOKENS = 512, 8192, 2048
"""Most tokens of a step where nobody says how many: on a CPU, on a GPU, and there with sliding windows, whose pages are
held for all tokens of a step."""
_CPU_STEP_BYTES = 256 << 20
_STEP_SHARE = 8
"""The activations of a GPU's step take one part of so many of what the weights leave: a wide model computes fewer
tokens at a time."""
_SEQUENCES_SHARE = 4
"""What `sequence_bytes` says of all sequences, where nobody says how many run together, takes such a part."""
_LEAST_STEP_TOKENS, _LEAST_SEQUENCES = 512, 16
_MAX_NUMBERS = 2**32 - 1
"""Numbers of an array that a step makes: kernels count them in 32 bits."""
_PARTIALS = 4
"""Split-K partials of a product in a captured step, typically."""


def step_sizes(
    config: ModelConfig, settings: EngineConfig, backend: Backend, room: int, halvings: int
) -> tuple[int, int]:
    """Most tokens of a step, whose activations fit, and most sequences that run together. What nobody asked for is
    halved so often."""
    if not backend.is_gpu:
        most = max(_CPU_STEP_BYTES // token_bytes(config), 1)
        return min(settings.max_step_tokens or CPU_STEP_TOKENS, most), settings.max_sequences or _CPU_SEQUENCES
    usual = _WINDOW_STEP_TOKENS if any(config.layer_windows) else _GPU_STEP_TOKENS
    most = max(min(room // _STEP_SHARE // token_bytes(config), _MAX_NUMBERS // _token_numbers(config)), 1)
    tokens = min(settings.max_step_tokens or max(usual >> halvings, _LEAST_STEP_TOKENS), most)
    most = max(room // _SEQUENCES_SHARE // sequence_bytes(config), 1)
    return tokens, settings.max_sequences or min(max(_GPU_SEQUENCES >> halvings, _LEAST_SEQUENCES), most)


def bytes_of_step(config: ModelConfig, tokens: int, sequences: int) -> int:
    """Bytes of what a step makes, at most: one of so many tokens, or one in which all sequences decode.

    That one makes split-K partials, and a penalized copy of its logits.
    """
    of_token, logits = token_bytes(config), 4 * sequences * config.vocab_size
    return max(tokens * of_token + logits, sequences * (of_token + 4 * _PARTIALS * config.width) + 2 * logits)


def token_bytes(config: ModelConfig) -> int:
    """Bytes of a token's activations where a step has the most of them.

    The stream, what is added to it and a kept operand, beside the larger of two: queries, keys, values and gates in
    float32 with the queries and the result of attention in float16, or gate and up in float32 with their product in
    float16. Beside these, what all layers have of a token as inputs of their own, with the two that they are made of.
    """
    heads = zip(config.layer_head_dims, config.layer_kv_heads, strict=True)
    attention = max(dim * (8 * config.num_heads + 8 * kv_heads) for dim, kv_heads in heads) + 6 * config.num_gates
    widest = max(attention, 10 * config.ffn_width)
    if experts := config.experts:  # logits; for each expert of a token both halves, activations and a result
        of_each = 10 * experts.width + 4 * config.width + 20
        widest = max(widest, 4 * experts.count + experts.used * of_each, 10 * experts.shared_width)
    return 16 * config.width + widest + 12 * config.num_layers * config.per_layer_width


def _token_numbers(config: ModelConfig) -> int:
    """Numbers that a token has in the largest array of a step: its queries, keys, values and gates, or gate and up, or
    those of its experts, or their results, or what all layers have of it as inputs of their own."""
    heads = zip(config.layer_head_dims, config.layer_kv_heads, strict=True)
    attention = max(dim * (config.num_heads + 2 * kv_heads) for dim, kv_heads in heads) + config.num_gates
    experts = config.experts
    of_experts = experts.used * max(2 * experts.width, config.width) if experts else 0
    of_layers = config.num_layers * config.per_layer_width
    return max(attention, 2 * config.ffn_width, of_experts, of_layers, config.width)


def sequence_bytes(config: ModelConfig) -> int:
    """Bytes that each sequence takes beside its keys and values, and beside what steps make: its counts and biases in
    the sampler, and a penalized copy of its logits."""
    return 12 * config.vocab_size
