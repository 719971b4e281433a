"""Tensor maps as the driver is asked for them, laid out after cuda.h."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from forge.backend import tensor_maps
from forge.errors import DeviceError


def test_the_driver_is_asked_once_for_each_array(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def encode(to: Any, *args: Any) -> int:
        assert to.value % 64 == 0
        asked.append(tuple(list(arg) if hasattr(arg, "_length_") else getattr(arg, "value", arg) for arg in args))
        return 0

    monkeypatch.setattr(tensor_maps, "_driver", lambda: SimpleNamespace(cuTensorMapEncodeTiled=encode))
    maps = tensor_maps.TensorMaps(np.array)
    first = maps.of(1 << 40, (10, 16, 8, 128), 16)
    assert first.shape == (16,)
    assert first.dtype == np.uint64
    assert maps.of(1 << 40, (10, 16, 8, 128), 16) is first
    assert maps.of(1 << 41, (10, 16, 8, 128), 16) is not first
    float16, no, swizzle_128b, l2_128b, zeros = 6, 0, 3, 2, 0
    sizes, strides, box, steps = [128, 8, 160], [256, 2048], [64, 1, 16], [1, 1, 1]
    assert asked[0] == (float16, 3, 1 << 40, sizes, strides, box, steps, no, swizzle_128b, l2_128b, zeros)
    assert len(asked) == 2


def test_the_maps_that_were_used_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_maps, "encode", lambda address, *_: np.full(16, address, np.uint64))
    monkeypatch.setattr(tensor_maps, "_MAX_MAPS", 3)
    maps, made = tensor_maps.TensorMaps(np.array), list[int]()

    def of(address: int) -> None:
        before = list(maps._made)
        assert (maps.of(address, (1, 2, 1, 64), 64) == address).all()
        made.extend([address] * ((address, (1, 2, 1, 64), 64) not in before))

    for address in (1, 2, 3, 1, 4, 1, 3, 2, 4):
        of(address)
    assert made == [1, 2, 3, 4, 2, 4]
    assert len(maps._made) == 3


def test_what_the_driver_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_maps, "_driver", lambda: SimpleNamespace(cuTensorMapEncodeTiled=lambda *args: 1))
    with pytest.raises(DeviceError, match=r"no tensor map of \(1, 4, 1, 64\) for boxes of 512: CUresult 1"):
        tensor_maps.encode(1 << 40, (1, 4, 1, 64), 512)
