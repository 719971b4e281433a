"""Passes for embeddings in the engine's process."""

from __future__ import annotations

from multiprocessing import Pipe

import numpy as np
from tiny_models import assert_idle, tiny_llm

from forge.server.engine_process import EngineServer


def test_an_embedding_that_nobody_waits_for_any_more_ends() -> None:
    llm = tiny_llm("llama")
    ours, theirs = Pipe()
    with ours, theirs:
        server = EngineServer(llm, theirs)
        for number in range(1, 9):
            server._handle("embed", number, ([number] * 60, "mean"))
        for number in range(1, 9):
            server._handle("cancel", number, None)
        found = llm.embed([5] * 60)  # behind all of them
        assert not server._outlets
    assert_idle(llm)
    np.testing.assert_array_equal(found, tiny_llm("llama").embed([5] * 60))
