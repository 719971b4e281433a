"""What a server is told at its start is checked then."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from forge.config import SamplingParams
from forge.errors import ParameterError
from forge.server.http import bind
from forge.server.settings import ServerSettings

SECONDS = [one.name for one in fields(ServerSettings) if one.name.endswith("_seconds")]


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), 1_000_001, 2e9], ids=str)
@pytest.mark.parametrize("name", SECONDS)
def test_a_time_that_cannot_be_kept_is_refused(name: str, value: float) -> None:
    limits: dict[str, Any] = {name: value}
    with pytest.raises(ParameterError, match=f"^{name} must be a number above 0, 1000000 at most, not {value}"):
        ServerSettings(model_name="any", **limits)


def test_the_longest_time_is_one_for_the_engine_and_for_the_kernel() -> None:
    times: dict[str, Any] = dict.fromkeys(SECONDS, 1e6)
    settings = ServerSettings(model_name="any", **times)
    assert SamplingParams(timeout=settings.request_seconds).timeout == 1e6
    bind("127.0.0.1", 0, settings.send_seconds).close()
