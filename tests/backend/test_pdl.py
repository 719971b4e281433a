"""Launches by the driver's own call, as it finds them in memory: laid out after cuda.h."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from forge.backend import pdl, sources


def words(address: int, kind: Any, count: int) -> list[int]:
    return list((kind * count).from_address(address))


def test_the_driver_finds_what_was_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}

    def launch(config: Any, function: Any, pointers: Any, extra: Any) -> int:
        at = ctypes.addressof(config._obj)
        found["grid, block, LDS"] = words(at, ctypes.c_uint32, 7)
        found["stream, attributes"] = stream, attributes = words(at + 32, ctypes.c_uint64, 2)
        found["attribute count"] = words(at + 48, ctypes.c_uint32, 1)
        found["attribute"] = words(attributes, ctypes.c_uint32, 1) + words(attributes + 8, ctypes.c_uint32, 1)
        places = words(pointers.value, ctypes.c_uint64, 5)
        kinds = ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_float, ctypes.c_uint64
        found["values"] = [kind.from_address(place).value for kind, place in zip(kinds, places, strict=True)]
        found["function, extra"] = function.value, extra
        return stream  # whatever the driver says

    monkeypatch.setattr(pdl, "_driver", lambda: SimpleNamespace(cuLaunchKernelEx=launch))
    array = SimpleNamespace(data=SimpleNamespace(ptr=1 << 40))
    args = [array, None, np.uint32(7), np.float32(0.5), np.uint64(1 << 50)]
    packed = pdl.DependentLaunch(99, (3, 2, 1), 256, args, 98_304)
    for stream in (0, 719):
        assert packed(stream) == stream
        assert found["stream, attributes"][0] == stream
    assert found["grid, block, LDS"] == [3, 2, 1, 256, 1, 1, 98_304]
    assert found["attribute count"] == [1]
    assert found["attribute"] == [6, 1]  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, on
    assert found["values"] == [1 << 40, 0, 7, 0.5, 1 << 50]
    assert found["function, extra"] == (99, None)
    assert ctypes.sizeof(pdl._Attribute) == 72


def test_a_kernel_starts_early_if_it_waits_by_itself() -> None:
    starts = {
        name: sources.entry("decode_state", name, ()).uses_pdl
        for name in ("decode_inputs", "advance", "scatter", "clear")
    }
    assert starts == {"decode_inputs": False, "advance": True, "scatter": False, "clear": False}
    assert not sources.entry("embed", "embed", ()).uses_pdl  # the step's last that does not
    assert sources.entry("matmul_wgmma", "matmul_wgmma", (("BLOCK", 128), ("LDS_BYTES", 98_304))).lds_bytes == 98_304
    assert sources.entry("sample", "argmax", (("THREADS", 512),)).uses_pdl
