"""What a model's weights take."""

from __future__ import annotations

import re
from math import prod

from forge import models
from forge.backend import Backend
from forge.config import ModelConfig
from forge.formats.checkpoint import Checkpoint


def weight_bytes(file: Checkpoint, config: ModelConfig, backend: Backend, cpu_experts: int = 0) -> tuple[int, int, str]:
    """Bytes that the weights take of a backend's memory, and of the host's, and which types are converted to float16
    for lack of a kernel. The memory of an integrated GPU is the host's."""
    tensors = {name: info for name, info in file.tensors.items() if _is_read(name, config)}
    if not backend.is_gpu:
        return 4 * sum(prod(info.shape) for info in tensors.values()), 0, ""
    total, experts = 0, models.expert_bytes(tensors)
    on_host = sum(size for layer, size in experts.items() if layer < cpu_experts)
    converted: set[str] = set()
    for name, info in tensors.items():
        kept = models.kept_type(info.type)
        if len(info.shape) < 2 or name.endswith((".bias", "ffn_gate_inp.weight")):
            total += 4 * prod(info.shape)
            continue
        total += models.kept_bytes(info)
        if kept is not info.type:
            converted |= {info.type.name} - {"F32", "BF16"}
    on_device = total - on_host * (not backend.is_integrated) + models.staging_bytes(experts, cpu_experts)
    return on_device, on_host, ", ".join(sorted(converted))


def _is_read(name: str, config: ModelConfig) -> bool:
    """Whether the model reads a tensor: not those of layers behind its own, which predict more tokens at once, nor keys
    and values of layers that have those of another."""
    found = re.match(r"blk\.(\d{1,6})\.(attn_[kv]\b)?", name)
    if not found:
        return True
    layer = int(found[1])
    return layer < config.num_layers and not (found[2] and config.layer_kv[layer] != layer)
