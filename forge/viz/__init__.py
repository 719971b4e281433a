"""Pictures of what a model computes: numbers as NumPy arrays, HTML in a notebook, charts by matplotlib.

Each function returns an object that shows itself in a notebook. `plot` needs matplotlib: pip install 'forge-llm[viz]'.
"""

from __future__ import annotations

from forge.viz.attention import AttentionMaps as AttentionMaps
from forge.viz.attention import attention as attention
from forge.viz.lens import LogitLens as LogitLens
from forge.viz.lens import logit_lens as logit_lens
from forge.viz.norms import ActivationNorms as ActivationNorms
from forge.viz.norms import activation_norms as activation_norms
from forge.viz.surprise import TokenSurprise as TokenSurprise
from forge.viz.surprise import token_surprise as token_surprise

__all__ = [
    "ActivationNorms",
    "AttentionMaps",
    "LogitLens",
    "TokenSurprise",
    "activation_norms",
    "attention",
    "logit_lens",
    "token_surprise",
]
