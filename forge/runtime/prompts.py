"""What users pass as prompts and parameters, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Number
from typing import Any

import numpy as np

from forge.config import SamplingParams
from forge.errors import ParameterError


def sampling_params(params: SamplingParams | None, overrides: Mapping[str, Any]) -> SamplingParams:
    """The parameters with some of their fields overridden; ParameterError for a keyword that is no field."""
    if params is None:
        return SamplingParams(**overrides)
    if not isinstance(params, SamplingParams):
        raise ParameterError(f"params must be a SamplingParams, not a {type(params).__name__}", parameter="params")
    return replace(params, **overrides)


def is_single(prompt: Any, name: str = "prompt") -> bool:
    """One prompt: a string, or a list of ids that is not empty. name: the argument's, here and below."""
    if isinstance(prompt, str):
        return True
    items = items_of(prompt, name)
    return len(items) > 0 and isinstance(items[0], Number)


def prompts_of(prompt: Any, name: str = "prompt") -> tuple[list[Any], bool]:
    """The prompts of a call, and whether it gave one alone instead of a list of them."""
    single = is_single(prompt, name)
    return [prompt] if single else items_of(prompt, name), single


def items_of(prompt: Any, name: str = "prompt") -> list[Any]:
    """The members of a list, tuple or array."""
    is_array = isinstance(prompt, np.ndarray) and prompt.ndim > 0
    if not is_array and (isinstance(prompt, str | bytes | bytearray) or not isinstance(prompt, Sequence)):
        what = "a prompt" if name == "prompt" else name
        message = f"{what} must be a string or a list of token ids, not a {type(prompt).__name__}"
        raise ParameterError(message, parameter=name)
    return list(prompt)


def token_ids(prompt: Any) -> list[int]:
    """A prompt that is no string, as Python integers."""
    ids = items_of(prompt)
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, Integral):
            message = f"a prompt must be a string or a list of token ids, and one holds {token!r:.40}"
            raise ParameterError(message, parameter="prompt")
    return [int(token) for token in ids]
