"""libhiprtc: clang 19 with the options that `hiprtcInternal.cpp` of ROCm/clr gives it, for the current GPU.

forge has nothing compiled here. CuPy has its own kernels, which no test is to launch.
"""

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Callable
from ctypes import c_char_p, c_int, c_size_t, c_void_p
from itertools import count
from pathlib import Path
from typing import Any

from virtual_rocm.calls import Failure, provided
from virtual_rocm.libraries import CACHE
from virtual_rocm.runtime import ARCHS, current

INVALID_PROGRAM, COMPILATION, NAME_EXPRESSION = 5, 6, 10  # hiprtcResult
_DEFAULTS = ("-O3", "-mcumode", "-std=c++14")
_OFFLINE = ("--cuda-device-only", "--no-gpu-bundle-output", "-nogpuinc", "-nogpulib")
_BUILTINS = Path(__file__).with_name("hiprtc_builtins.h")


class Program:
    """A text, and what became of it."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.code = b""
        self.log = b""


_programs: dict[int, Program] = {}
_handles = count(0x10, 0x10)


def _get(program: int | None) -> Program:
    if program not in _programs:
        raise Failure(INVALID_PROGRAM)
    return _programs[program]


def hiprtcVersion(major: c_void_p, minor: c_void_p) -> c_int:
    for pointer, value in ((major, 7), (minor, 0)):
        ctypes.memmove(pointer, ctypes.byref(c_int(value)), 4)


def hiprtcCreateProgram(
    pointer: c_void_p, source: c_char_p, name: c_char_p, headers: c_int, texts: c_void_p, names: c_void_p
) -> c_int:
    handle = next(_handles)
    _programs[handle] = Program(source.decode())
    ctypes.memmove(pointer, ctypes.byref(c_void_p(handle)), 8)


def hiprtcDestroyProgram(pointer: c_void_p) -> c_int:
    handle = c_void_p.from_address(pointer).value
    _get(handle)
    del _programs[handle]


def hiprtcAddNameExpression(program: c_void_p, name: c_char_p) -> c_int:
    raise Failure(NAME_EXPRESSION)


def hiprtcGetLoweredName(program: c_void_p, name: c_char_p, pointer: c_void_p) -> c_int:
    raise Failure(NAME_EXPRESSION)


def hiprtcCompileProgram(program: c_void_p, number: c_int, options: c_void_p) -> c_int:
    import harness

    from virtual_rocm import execution

    wanted = _get(program)
    given = [ctypes.cast(options, ctypes.POINTER(c_char_p))[i].decode() for i in range(number)]
    command = [execution.tool("clang++-19"), "-x", "hip", *_OFFLINE, *_DEFAULTS, f"--offload-arch={ARCHS[current()]}"]
    command += ["-include", str(_BUILTINS), "-Wno-everything", "-fuse-cuid=none", *given]
    key = "\0".join([wanted.source, _BUILTINS.read_text(), *command])
    kept = CACHE / f"{hashlib.sha256(key.encode()).hexdigest()}.hsaco"
    with harness.alone(kept):
        if not kept.exists():
            source, code = kept.with_suffix(".hip"), kept.with_suffix(".scratch")
            source.write_text(wanted.source)
            environment = {**os.environ, "PATH": harness.TOOLS}
            done = subprocess.run([*command, str(source), "-o", str(code)], capture_output=True, env=environment)
            wanted.log = done.stderr
            source.unlink()
            if done.returncode:
                raise Failure(COMPILATION)
            code.replace(kept)
    wanted.code = kept.read_bytes()


def hiprtcGetCodeSize(program: c_void_p, pointer: c_void_p) -> c_int:
    ctypes.memmove(pointer, ctypes.byref(c_size_t(len(_get(program).code))), 8)


def hiprtcGetCode(program: c_void_p, pointer: c_void_p) -> c_int:
    code = _get(program).code
    ctypes.memmove(pointer, code, len(code))


def hiprtcGetProgramLogSize(program: c_void_p, pointer: c_void_p) -> c_int:
    ctypes.memmove(pointer, ctypes.byref(c_size_t(len(_get(program).log) + 1)), 8)


def hiprtcGetProgramLog(program: c_void_p, pointer: c_void_p) -> c_int:
    log = _get(program).log + b"\0"
    ctypes.memmove(pointer, log, len(log))


_texts = {
    0: ctypes.create_string_buffer(b"HIPRTC_SUCCESS"),
    COMPILATION: ctypes.create_string_buffer(b"HIPRTC_ERROR_COMPILATION"),
}
_other = ctypes.create_string_buffer(b"HIPRTC_ERROR")


def hiprtcGetErrorString(code: c_int) -> c_void_p:
    return ctypes.addressof(_texts.get(code, _other))


def functions() -> dict[str, Callable[..., Any]]:
    """All of them, by name."""
    return provided([value for name, value in globals().items() if name.startswith("hiprtc")])
