"""Names in files are long if a stranger wants them to be: matching them takes a time that grows with their length."""

from __future__ import annotations

import importlib
import pkgutil
import re
import time

import forge.checkpoints
from forge.checkpoints import family, onnx_parameters
from forge.checkpoints.families import FAMILIES

MODULES = [f"forge.checkpoints.{found.name}" for found in pkgutil.iter_modules(forge.checkpoints.__path__)]
MODULES += ["forge.formats.gguf", "forge.formats.onnx_data", "forge.models.adapters", "forge.models.arch"]
SEARCHED = (family.UNUSED, onnx_parameters._OPERATION, onnx_parameters._FUSED)
NAMES = [
    *("a" * 20_000, "1" * 20_000, "a." * 10_000, "." * 20_000, "Conv" * 5000 + "-", ".Mul_1" * 3000 + "!"),
    *("model." * 3000 + "!", "vision_x." * 2500 + "\n", "layers.0." * 2500 + "\n", "_norm.weight" * 1500 + "\n"),
    *("attn.bias." * 2000, "mtp_" * 5000 + "\n", "lora_A.weight." * 1300, ".0.mlp.gate_proj.weight" * 2500 + "\n"),
]


def test_no_pattern_of_names_takes_quadratic_time() -> None:
    """A search for a tower's name among 60 kB took 4 s, among 20 kB half a second."""
    patterns = {
        pattern
        for name in MODULES
        for pattern in vars(importlib.import_module(name)).values()
        if isinstance(pattern, re.Pattern) and isinstance(pattern.pattern, str)
    }
    patterns |= {re.compile(text) for row in FAMILIES.values() for text in (row.unused, row.norms_less_one)}
    assert set(SEARCHED) < patterns
    ways = [(pattern, pattern.fullmatch) for pattern in patterns] + [(each, each.search) for each in SEARCHED]
    for pattern, way in ways:
        for name in NAMES:
            start = time.process_time()
            way(name)
            assert time.process_time() - start < 0.2, (pattern.pattern, name[:40])
