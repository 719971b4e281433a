"""What forge knows of AMD GPUs by their names."""

from __future__ import annotations

import pytest

from forge.backend import amd


@pytest.mark.parametrize(
    ("arch", "reported", "units"),  # of MI100, MI210, MI300X, RX 5700 XT, 6900 XT, 7900 XTX, Strix Halo, 9070 XT
    [
        *(("gfx908", 120, 120), ("gfx90a", 104, 104), ("gfx942", 304, 304), ("gfx1010", 20, 40)),
        *(("gfx1030", 40, 80), ("gfx1100", 48, 96), ("gfx1151", 20, 40), ("gfx1201", 32, 64), ("gfx1250", 8, 8)),
    ],
)
def test_compute_units_are_counted_singly(
    arch: str, reported: int, units: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GPU_ENABLE_WGP_MODE", raising=False)
    assert amd.compute_units(arch, reported) == units
    for value in ("0", "false", "", " ", "off"):  # then HIP counts singly itself
        monkeypatch.setenv("GPU_ENABLE_WGP_MODE", value)
        assert amd.compute_units(arch, units) == units
    for value in ("1", "true", "2x"):
        monkeypatch.setenv("GPU_ENABLE_WGP_MODE", value)
        assert amd.compute_units(arch, reported) == units
