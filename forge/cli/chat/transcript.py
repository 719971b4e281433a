"""Conversations in files: a JSON list of messages, as OpenAI's API takes them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from forge import _files
from forge.cli import output
from forge.errors import ForgeError

_MAX_BYTES = 1 << 26


def save(path: str, messages: list[dict[str, Any]], *, known: str | None) -> bool:
    """Write messages to a file. True if it replaced one. Raises ForgeError if the file exists and is not `known`."""
    target = _path(path)
    exists = os.path.lexists(target)
    if exists and (known is None or os.path.realpath(target) != os.path.realpath(_path(known))):
        raise ForgeError(f"{path}: exists already and holds something else: remove it, or choose another name")
    try:
        _files.replace(target, (json.dumps(messages, indent=2, ensure_ascii=False) + "\n").encode())
    except (OSError, ValueError) as error:
        raise ForgeError(f"{path}: cannot be written: {_files.reason(error)}") from None
    return exists


def load(path: str) -> list[dict[str, Any]]:
    """The messages of a file: a list, or an object with a list `messages`. Raises ForgeError for anything else."""
    try:
        found = json.loads(_files.read(_path(path), _MAX_BYTES))
    except UnicodeDecodeError:
        raise ForgeError(f"{path}: is not UTF-8 text") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ForgeError(f"{path}: cannot be read as a conversation: {_files.reason(error)}") from None
    if isinstance(found, dict):
        found = found.get("messages")
    if not isinstance(found, list) or not found:
        raise ForgeError(
            f'{path}: holds no messages: they are a JSON list such as [{{"role": "user", "content": "Hi"}}]'
        )
    for place, message in enumerate(found):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ForgeError(f"{path}: message {place + 1} is no object with a role")
    return found


def _path(path: str) -> Path:
    if path[:1] in ("'", '"') and path[-1:] == path[:1]:
        path = path[1:-1]
    if not path:
        raise ForgeError("a file's name is missing: /save FILE or /load FILE")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # no such user
        raise ForgeError(f"{output.printable(path)}: {error}") from None
