"""The kernels of one GPU as CuPy's modules: compiled at run time, or taken from a store of compiled kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import cupy as cp
from cupy_backends.cuda.libs import nvrtc

from forge.backend import code_objects, compilers, kernel_cache, sources
from forge.backend.cupy_driver import IS_HIP, one_line
from forge.config import Progress
from forge.errors import DeviceError

_FLAGS = ("-std=c++17",)
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute
_ATTRIBUTES = {"registers": 4, "local bytes (spills)": 3, "shared bytes": 1}
"""CUfunction_attribute of what a kernel takes. Registers and local memory are a thread's, shared memory a block's."""


class Modules:
    """The compiled variants of one GPU, each loaded when it is first asked for."""

    def __init__(self, arch: str) -> None:
        self._arch = arch
        self._modules: dict[sources.Variant, Any] = {}
        self._functions: dict[sources.Entry, Any] = {}

    @property
    def loaded(self) -> list[sources.Variant]:
        """The variants that are loaded."""
        return list(self._modules)

    def function(self, entry: sources.Entry) -> Any:
        """CuPy's function of a kernel, ready to be launched."""
        function = self._functions.get(entry)
        if function is None:
            function = self._module(entry.variant).get_function(entry.function)
            if entry.lds_bytes and not IS_HIP:  # the driver refuses more than 48 KB where nobody has asked for it
                cp.cuda.driver.funcSetAttribute(pointer(function), _MAX_DYNAMIC_SHARED_SIZE_BYTES, entry.lds_bytes)
            self._functions[entry] = function
        return function

    def resources(self, entry: sources.Entry) -> dict[str, int]:
        """See `GPU.resources`."""
        if IS_HIP:
            return code_objects.resources(kernel_cache.obtain(entry.variant, self._arch))[entry.function]
        function = pointer(self.function(entry))
        taken = {name: cp.cuda.driver.funcGetAttribute(number, function) for name, number in _ATTRIBUTES.items()}
        return {**taken, "shared bytes": taken["shared bytes"] + entry.lds_bytes}

    def build(
        self,
        variants: Iterable[sources.Variant],
        on_device: Callable[[], AbstractContextManager[None]],
        progress: Progress | None,
    ) -> None:
        """Compile in parallel the variants that are not loaded yet. Threads load them within `on_device`."""

        def build(variant: sources.Variant) -> None:
            with on_device():
                self._module(variant)

        missing = [variant for variant in variants if variant not in self._modules]
        compilers.compile_all(build, missing, progress)

    def _module(self, variant: sources.Variant) -> Any:
        module = self._modules.get(variant)
        if module is None:
            if IS_HIP:
                module = self._loaded(variant, kernel_cache.obtain(variant, self._arch))
            else:
                target = sources.target(variant.file) or self._arch
                module = self._loaded(variant, kernel_cache.kept(variant, target, lambda: _nvrtc(variant, target)))
            self._modules[variant] = module
        return module

    def _loaded(self, variant: sources.Variant, code: bytes) -> Any:
        """A module of verified bytes. RawModule(path=) would read the file again."""
        module = cp.cuda.Module()
        try:
            module.load(code)
        except (cp.cuda.driver.CUDADriverError, cp.cuda.runtime.CUDARuntimeError) as error:
            raise DeviceError(
                f"{variant.name}: the driver refuses its code object for {self._arch}: {one_line(error)}"
            ) from None
        return module


def _nvrtc(variant: sources.Variant, target: str) -> bytes:
    """A variant's code for a target, such as sm_90a. CuPy compiles something for each set of -D values before it looks
    into its own cache, and knows no features of one architecture."""
    program = nvrtc.createProgram(sources.source(variant.file), f"{variant.file}.hip", (), ())
    try:
        nvrtc.compileProgram(program, (f"-arch={target}", "-ftz=true", *_FLAGS, *variant.options))
        return bytes(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError:
        log = nvrtc.getProgramLog(program)
        raise compilers.refused(f"{variant.name} does not compile for {target}", log, variant) from None
    finally:
        nvrtc.destroyProgram(program)


def pointer(function: Any) -> int:
    """The driver's function."""
    return int(function.ptr)


def block_of(entry: sources.Entry) -> tuple[int, int, int, int]:
    """A block's threads, and the LDS that a launch allots: none on HIP, where kernels declare all that they have."""
    return entry.threads, 1, 1, 0 if IS_HIP else entry.lds_bytes
