"""Commands run in this process or another, and what they print."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import write_gguf

from forge.cli import run
from forge.formats import gguf

ARCH = Path(__file__).parents[1] / "data" / "arch"
LLAMA = str(ARCH / "llama" / "model.gguf")
TEMPLATE = "{% for m in messages %}{{ m.role[0] + ':' + m.content + ' ' }}{% endfor %}"
Captured = pytest.CaptureFixture[str]


def start(*args: str, **options: Any) -> subprocess.Popen[bytes]:
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | options
    return subprocess.Popen([sys.executable, "-m", "forge", *args], **pipes)


def forge_process(*args: str, stdin: bytes = b"", **options: Any) -> tuple[int, bytes, bytes]:
    process = start(*args, **options)
    out, err = process.communicate(stdin, timeout=60)
    return process.returncode, out, err


def json_of(capsys: Captured, *args: str) -> Any:
    assert run([*args, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def failure(capsys: Captured, *args: str) -> tuple[int, str]:
    """The exit code and the one line of a command that fails, without the remarks before it."""
    code = run(args)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if not line.startswith("forge: device: ")]
    assert len(lines) == 1
    assert lines[0].startswith("forge: ")
    return code, lines[0]


def llama_metadata() -> dict[str, Any]:
    with gguf.read(LLAMA) as model:
        return {
            key: value if isinstance(value, bool | int | float | str | np.ndarray) else list(value)
            for key, value in model.metadata.items()
        }


def with_template(path: Path, template: str = TEMPLATE) -> str:
    """The tiny llama with a chat template of its own."""
    with gguf.read(LLAMA) as model:
        tensors = {name: model.load(name) for name in model.tensors}
    return str(write_gguf(path, llama_metadata() | {"tokenizer.chat_template": template}, tensors))
