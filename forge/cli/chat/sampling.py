"""Sampling parameters as `/set` reads and shows them."""

from __future__ import annotations

import difflib
import json
from dataclasses import fields
from typing import Any

from forge.config import SamplingParams
from forge.errors import ParameterError

NAMES = [field.name for field in fields(SamplingParams) if field.name != "n"]


def value(name: str, text: str) -> Any:
    """The value of a text: JSON, none, or the text itself. Raises ParameterError for an unknown name."""
    check(name)
    if text.lower() == "none":
        return () if name in ("stop", "stop_token_ids") else {} if name == "logit_bias" else None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = text
    if name == "stop":
        return found if isinstance(found, str | list) else text
    if name == "stop_token_ids" and isinstance(found, int):
        return [found]
    if name == "logit_bias" and isinstance(found, dict):
        return {int(id) if id.isdecimal() and len(id) < 20 else id: bias for id, bias in found.items()}
    return found


def shown(params: SamplingParams, name: str = "") -> list[str]:
    """Lines that show one parameter, or all."""
    if name:
        check(name)
    return [f"{one} {_text(getattr(params, one))}" for one in ([name] if name else NAMES)]


def check(name: str) -> None:
    """Raises ParameterError, with the nearest name, for an unknown name."""
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, 1)
        raise ParameterError(
            f"{name!r:.100} is no parameter; {f'did you mean {near[0]}? ' if near else ''}/set shows them",
            parameter=name,
        )


def _text(value: Any) -> str:
    if value is None or value in ((), {}):
        return "none"
    return json.dumps(value, ensure_ascii=False)
