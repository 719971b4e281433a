"""Every op: importing this module fills `forge.ops.op.REGISTRY`."""

from forge.ops import (
    activation,
    attention,
    decode_attention,
    decode_state,
    embed,
    kv_cache,
    linear,
    logprobs,
    norm,
    penalties,
    rope,
    sampling,
)

__all__ = [
    "activation",
    "attention",
    "decode_attention",
    "decode_state",
    "embed",
    "kv_cache",
    "linear",
    "logprobs",
    "norm",
    "penalties",
    "rope",
    "sampling",
]
