"""The table of Hugging Face's families, by the `model_type` of their config.json.

Facts: transformers' configuration and modeling files, and the classes of llama.cpp's converter.
"""

from __future__ import annotations

from forge.checkpoints.families_dense import DENSE
from forge.checkpoints.families_experts import WITH_EXPERTS
from forge.checkpoints.families_layer_norm import WITH_LAYER_NORM
from forge.checkpoints.family import Family

FAMILIES: dict[str, Family] = DENSE | WITH_EXPERTS | WITH_LAYER_NORM
