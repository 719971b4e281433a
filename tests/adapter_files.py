"""Random adapters of tiny models, as GGUF files, and the same merged into the weights of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf_files import write_gguf

from forge import LLM
from forge.formats import gguf
from forge.models.adapters import ADAPTED

Pairs = dict[str, tuple[np.ndarray, np.ndarray]]


def random_pairs(
    model: Path, *, seed: int, rank: int = 4, wants: Callable[[str], bool] = lambda name: True, size: float = 0.3
) -> Pairs:
    """A (C, K) and B (N, C) for the model's tensors that may have adapters."""
    rng, found = np.random.default_rng(seed), Pairs()
    with gguf.read(model) as file:
        for name, info in file.tensors.items():
            if ADAPTED.fullmatch(name) and len(info.shape) == 2 and wants(name):
                rows, cols = info.shape
                a = rng.normal(0, cols**-0.5, (rank, cols)).astype(np.float32)
                found[name] = a, rng.normal(0, size * rank**-0.5, (rows, rank)).astype(np.float32)
    return found


def write_adapter(path: Path, arch: str, pairs: Pairs, *, alpha: float = 8.0, **metadata: Any) -> Path:
    """A GGUF adapter, as llama.cpp's converter writes them."""
    keys: Mapping[str, Any] = {
        "general.architecture": arch,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
        **metadata,
    }
    tensors = {
        f"{name}.lora_{half}": array for name, both in pairs.items() for half, array in zip("ab", both, strict=True)
    }
    return write_gguf(path, keys, tensors)


def merge(llm: LLM, pairs: Pairs, alpha: float = 8.0) -> None:
    """Add each pair's product to the weights of a model on the CPU, which then has the adapter for all requests."""
    left = dict(pairs)
    for linear in llm.engine.runner.model.layer_linears():
        start = 0
        for name, rows in linear.parts.items():
            if name in left:
                a, b = left.pop(name)
                delta = alpha / len(a) * (b.astype(np.float64) @ a)
                linear.weight[start : start + rows] += delta.astype(np.float32)
            start += rows
    assert not left
