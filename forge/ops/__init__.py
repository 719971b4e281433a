"""Every op: importing this module fills `forge.op.REGISTRY`."""

from forge.ops import (
    activation,
    attention,
    decode_attention,
    embed,
    linear,
    logprobs,
    norm,
    pages,
    rope,
    sampling,
    step,
)

__all__ = [
    "activation",
    "attention",
    "decode_attention",
    "embed",
    "linear",
    "logprobs",
    "norm",
    "pages",
    "rope",
    "sampling",
    "step",
]
