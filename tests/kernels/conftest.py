"""Kernels are compiled ahead: the tests of all cases would wait for one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event, Thread

import pytest
from harness import COMPILER, TILES, build

from forge.devtools.variants import case_variants

_MANY = 200
"""Tests from which on it pays."""


@pytest.fixture(scope="session", autouse=True)
def compiled_ahead(request: pytest.FixtureRequest) -> Iterator[None]:
    """By one more thread."""
    stop = Event()

    def work() -> None:
        for variant in case_variants():
            for wave, tile in TILES.items():
                if stop.is_set():
                    return
                build(variant, tile, wave)

    thread = Thread(target=work, daemon=True)
    if COMPILER and sum("test_harness.py" in item.nodeid for item in request.session.items) > _MANY:
        thread.start()
    yield
    stop.set()
    if thread.is_alive():
        thread.join()
