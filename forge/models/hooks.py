"""Hooks: functions that see a model's intermediate results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Hook = Callable[[str, Any], None]
"""Called with the name and the array of each intermediate result. The array is lent: copy what you keep.

Names: token_embd; for each layer i blk.i.attn_q (T, H, D) and blk.i.attn_k (T, G, D), both rotated, and blk.i, the
residual stream (T, E) behind the layer.
"""
