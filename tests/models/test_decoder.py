"""What a decoder computes once for many steps."""

from __future__ import annotations

import pytest
from tiny_models import tiny_llm

from forge.models.rope import RotaryEmbedding


def test_rope_tables_double_so_that_few_steps_compute_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llm("llama").engine.runner.model
    sizes: list[int] = []
    compute = RotaryEmbedding.compute

    def counted(self: RotaryEmbedding, positions: int) -> None:
        sizes.append(positions)
        compute(self, positions)

    monkeypatch.setattr(RotaryEmbedding, "compute", counted)
    for positions in range(1, 40):
        model.reserve(positions)
        assert len(model.layers[0][0].rope.cos_sin) >= positions
    assert sizes == [1, 2, 4, 8, 16, 32, 64]
