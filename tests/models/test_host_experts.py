"""Experts of a layer in the host's memory, and what the device holds of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from forge.backend import NUMPY
from forge.errors import OutOfMemoryError
from forge.models.host_experts import HostExperts
from forge.models.weights import STAGING_PADDING
from forge.ops.experts import Experts
from forge.ops.quant import Packed, QuantTensor, split

COUNT, WIDTH, INNER = 5, 32, 64


def packed(rows: int, cols: int, rng: np.random.Generator) -> Packed:
    drawn = QuantTensor.random("Q8_0", rows, cols, rng)
    return Packed(drawn.type, drawn.shape, *split(drawn.type, drawn.blocks))


def stored() -> Experts:
    """Gates of quantized blocks, ups and downs of float16."""
    rng = np.random.default_rng(0)
    ups, downs = (rng.standard_normal(shape).astype(np.float16) for shape in ((WIDTH, INNER), (INNER, WIDTH)))
    ups, downs = (np.concatenate([matrix + i for i in range(COUNT)]) for matrix in (ups, downs))
    return Experts(packed(COUNT * WIDTH, INNER, rng), ups, None, None, downs, None, COUNT)


def planes(experts: Experts) -> list[Any]:
    return [*(plane for plane in experts.gate.planes if plane is not None), experts.up, experts.down]


def test_the_chosen_experts_are_those_that_were_stored() -> None:
    experts = stored()
    size = sum(plane.nbytes for plane in planes(experts)) + STAGING_PADDING
    host = HostExperts(experts, 2, np.zeros(size // 4, np.uint32), NUMPY)
    host.fetch(np.array([[3, 1], [1, 0]], np.int32))
    for plane, fetched in zip(planes(experts), planes(host.fetched), strict=True):
        assert (fetched.shape, fetched.dtype) == (plane.shape, plane.dtype)
        of_each, found = plane.reshape(COUNT, -1), fetched.reshape(COUNT, -1)
        for expert in (0, 1, 3):
            np.testing.assert_array_equal(found[expert], of_each[expert])
        assert not found[[2, 4]].any()
    assert host.token_bytes == host.nbytes * 2 // COUNT


def test_memory_that_cannot_be_pinned_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(shape: tuple[int, ...], dtype: Any) -> Any:
        raise OutOfMemoryError("out of device memory: hipErrorOutOfMemory", parameter="context", hint="less")

    monkeypatch.setattr(NUMPY, "host_visible", refuse)
    with pytest.raises(OutOfMemoryError, match=r"^the host has no 0\.00 GB .* hipErrorOutOfMemory: use a smaller cpu_"):
        HostExperts(stored(), 2, np.zeros(1, np.uint32), NUMPY)
