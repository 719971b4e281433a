"""Source text as trees, for tests that read the package's own source."""

from __future__ import annotations

import ast
from functools import cache


@cache
def tree_of(text: str) -> ast.Module:
    """Parsed once, however many tests walk it. Nobody changes it."""
    return ast.parse(text)
