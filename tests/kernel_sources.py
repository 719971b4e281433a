"""Kernels whose source a test replaces."""

from __future__ import annotations

import pytest

from forge.backend import sources


def replace_source(monkeypatch: pytest.MonkeyPatch, file: str, text: str) -> None:
    """A kernel file has this source, with the prelude. Other files keep theirs: a thread of the tests compiles them
    meanwhile, and what it reads of them is kept."""
    source = sources.source
    monkeypatch.setattr(sources, "source", lambda name: text if name == file else source(name))
