"""The cases of every op: inputs at its edges, some with results computed by hand. One file for each file of `ops/`.

Verify, the tests of ops and kernels, and what counts kernel variants take them from here, by the op's name.
"""

from __future__ import annotations

from collections.abc import Sequence

import forge.ops  # noqa: F401  (fills the registry)
from forge.devtools.cases import (
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
from forge.devtools.cases.case import Case
from forge.ops.op import REGISTRY, Op

_FILES = (
    *(activation, attention, bfloat16, decode_attention, decode_state, embed, expert_fetch, experts, kv_cache, linear),
    *(logprobs, lora, norm, penalties, per_layer, qkv, quantize, rope, sampling),
)
CASES: dict[str, Sequence[Case]] = {name: cases for file in _FILES for name, cases in file.CASES.items()}


def all_cases() -> list[tuple[Op, Case]]:
    """Every case of every op, in the order in which ops are declared."""
    return [(op, case) for op in REGISTRY.values() for case in CASES[op.name]]
