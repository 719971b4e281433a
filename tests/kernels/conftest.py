"""Kernels are compiled ahead: the tests of all cases would wait for one after the other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from threading import Event, Thread

import pytest
from harness import COMPILER, TILES, build

from forge.devtools.variants import case_variants

_MANY = 200
"""Tests from which on it pays."""


@pytest.fixture(scope="session", autouse=True)
def compiled_ahead(request: pytest.FixtureRequest) -> Iterator[None]:
    """By one more thread. Of two processes that test side by side one begins at the end."""
    stop = Event()
    step = -1 if os.environ.get("PYTEST_XDIST_WORKER") == "gw1" else 1

    def work() -> None:
        for variant in list(case_variants())[::step]:
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
