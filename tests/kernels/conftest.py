"""Kernels are compiled ahead: the tests of all cases would wait for one after the other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from threading import Event, Thread

import pytest
from harness import COMPILER, TILES, build

from forge.backend.sources import Variant
from forge.devtools.cases import all_cases
from forge.devtools.recorder import Recorder
from forge.devtools.verify import launch
from forge.errors import DeviceError

_MANY = 200
"""Tests from which on it pays."""


def launched(wave: int) -> list[Variant]:
    """What the cases of all ops launch on the harness with waves of this size."""
    device = Recorder()
    device.wave_size = wave
    launch(all_cases(), device)
    return device.variants


@pytest.fixture(scope="session", autouse=True)
def compiled_ahead(request: pytest.FixtureRequest) -> Iterator[None]:
    """By one more thread. Of processes that test side by side one takes the waves of 32, another those of 64."""
    stop = Event()
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    together = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    waves = [wave for place, wave in enumerate(TILES) if place % together == number]

    def work() -> None:
        launches = [(variant, wave) for wave in waves for variant in launched(wave)]
        for variant, wave in sorted(launches, key=lambda pair: pair[0].name):
            if stop.is_set():
                return
            with suppress(DeviceError):  # what does not compile fails in its own tests
                build(variant, TILES[wave], wave)

    thread = Thread(target=work, daemon=True)
    if waves and COMPILER and sum("test_harness.py" in item.nodeid for item in request.session.items) > _MANY:
        thread.start()
    yield
    stop.set()
    if thread.is_alive():
        thread.join()
