"""Every op: importing this module fills `forge.ops.op.REGISTRY`."""

from forge.ops import (  # noqa: F401
    activation,
    attention,
    bfloat16,
    decode_attention,
    decode_state,
    embed,
    expert_fetch,
    experts,
    kv_cache,
    linear,
    logprobs,
    lora,
    norm,
    penalties,
    per_layer,
    qkv,
    quantize,
    rope,
    sampling,
)
