"""What fails under a running engine: one clear line each time, and the same engine computes the same ids afterwards."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import forge
from forge.backend import sources
from forge.ops import matmul
from virtual_rocm import blas, runtime, tiny
from virtual_rocm.calls import failing
from virtual_rocm.runtime import DEVICE, OUT_OF_MEMORY

pytestmark = [pytest.mark.virtual_rocm, pytest.mark.slow]

ON = ("gfx942",)
MODEL = tiny.ARCH / "llama" / "model.gguf"
FEW = forge.SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
PROMPTS = [list(range(70)), [4]]  # the first in a product of many rows, by hipBLAS
BLAS_ROWS = 64
"""Products of more rows go to BLAS here, so that prompts need not be long."""
MANY = 1000
"""More than there are calls: a loop that gets here has not ended."""


def load() -> forge.LLM:
    settings = forge.EngineConfig(prefix_caching=False)  # the same prompts are computed again and again
    return forge.load(MODEL, device="hip", context=128, max_sequences=4, engine=settings)


def generate(llm: forge.LLM) -> list[list[int]]:
    return [completion.ids for completion in llm.generate(PROMPTS, FEW)]


@pytest.fixture(scope="module", autouse=True)
def blas_of_few_rows() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "MAX_ROWS", BLAS_ROWS)
        yield


@pytest.fixture(scope="module")
def wanted() -> list[list[int]]:
    with load() as llm:
        return generate(llm)


@pytest.fixture
def give_back(device: Any) -> Iterator[Callable[[], int]]:
    """Has the process give all memory back that it keeps for later; says how much is in use."""
    import cupy

    def give() -> int:
        gc.collect()
        device._scratch = None
        device._step_memory.release()
        device._staging.clear()
        cupy.get_default_memory_pool().free_all_blocks()
        cupy.get_default_pinned_memory_pool().free_all_blocks()
        return DEVICE.memory.used + DEVICE.pinned.used

    give()
    yield give
    give()


def outcome(call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call gives, or forge's error in one line."""
    try:
        return call(*arguments)
    except forge.ForgeError as error:
        text = f"{type(error).__name__}: {error}"
        assert "\n" not in text
        return text


OUT = re.compile(
    r"OutOfMemoryError: out of device memory: (allocating [\d,]+ bytes \(allocated so far: [\d,]+ bytes\)|"
    r"hipErrorOutOfMemory: out of memory, of the device or pinned of the host): use a smaller context or model"
)


@pytest.mark.parametrize("function", ["hipMalloc", "hipHostMalloc"])
def test_memory_that_ends_while_a_model_is_loaded(
    function: str, wanted: list[list[int]], give_back: Callable[[], int]
) -> None:
    for first in range(1, MANY):
        held = give_back()
        with failing(function, OUT_OF_MEMORY, first=first) as fault:
            llm = outcome(load)
        if not fault.met:
            break
        assert OUT.fullmatch(str(llm)), f"call {first}: {llm}"
        assert give_back() == held, f"after a failure of call {first} memory is in use"
    assert 3 < first < MANY - 1
    assert generate(llm) == wanted


@pytest.mark.parametrize("function", ["hipMalloc", "hipHostMalloc"])
def test_memory_that_ends_in_a_step(function: str, wanted: list[list[int]], give_back: Callable[[], int]) -> None:
    for first in range(1, MANY):
        llm = None
        give_back()
        llm = load()
        give_back()
        with failing(function, OUT_OF_MEMORY, first=first) as fault:
            found = outcome(generate, llm)
        if not fault.met:
            break
        assert OUT.fullmatch(str(found)), f"call {first}: {found}"
        assert generate(llm) == wanted, f"after a failure of call {first}"
    assert 3 < first < MANY - 1
    assert found == wanted


@pytest.mark.parametrize(
    ("function", "code", "least"),
    [
        ("hipModuleLaunchKernel", runtime.LAUNCH_FAILURE, 20),
        ("hipGraphLaunch", runtime.LAUNCH_FAILURE, 2),
        ("hipMemcpyAsync", runtime.INVALID_VALUE, 2),
        ("hipEventRecord", runtime.INVALID_HANDLE, 5),
        ("hipEventSynchronize", runtime.LAUNCH_FAILURE, 2),
        ("hipEventCreateWithFlags", runtime.UNKNOWN, 5),
        ("hipStreamSynchronize", runtime.LAUNCH_FAILURE, 0),
        ("hipGetDevice", runtime.NO_DEVICE, 50),
        ("hipSetDevice", runtime.NO_DEVICE, 5),
        ("hipblasGemmEx", blas.INTERNAL_ERROR, 5),
        ("hipblasSetStream", blas.INTERNAL_ERROR, 5),
    ],
)
def test_a_call_that_fails_in_the_middle_of_generation(
    function: str, code: int, least: int, wanted: list[list[int]]
) -> None:
    with load() as llm:
        assert generate(llm) == wanted  # steps are recorded now
        name = "HIPBLAS_STATUS_INTERNAL_ERROR" if code == blas.INTERNAL_ERROR else runtime.ERRORS[code][0]
        for first in range(1, MANY, 9 if least > 20 else 1):
            with failing(function, code, first=first, count=1) as fault:
                found = outcome(generate, llm)
            if not fault.met:
                break
            assert re.fullmatch(rf"DeviceError: the GPU failed: {name}(: .+)?", str(found)), f"call {first}: {found}"
            assert generate(llm) == wanted, f"after a failure of call {first}"
    assert least < first < MANY - 1
    assert found == wanted


def test_a_kernel_that_fails_on_the_device(wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Told of when the host next waits, as on CUDA; from then on every call fails, and every request, at once."""
    from virtual_rocm import execution

    with load() as llm:
        assert generate(llm) == wanted
        try:
            with monkeypatch.context() as patch:
                patch.setattr(execution.Kernel, "launch", lambda *_: "as if it had read beyond its memory")
                for _ in range(2):
                    assert outcome(generate, llm) == (
                        "DeviceError: the GPU failed: hipErrorLaunchFailure: unspecified launch failure"
                    )
        finally:
            DEVICE.broken = 0  # a new process would be needed
        assert generate(llm) == wanted


def test_a_kernel_that_does_not_compile(
    wanted: object, monkeypatch: pytest.MonkeyPatch, device: Any, gfx: str, tmp_path: Path
) -> None:
    """The parameters of the kernels were read before, from sources that were whole."""
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path))
    monkeypatch.setattr(device, "_modules", type(device._modules)(gfx))
    source = sources.source
    monkeypatch.setattr(
        sources,
        "source",
        lambda file: source(file).replace("const float *weight, // (E,)", "const floot *weight, // (E,)", 1),
    )
    line = 1 + next(
        i for i, text in enumerate((Path(forge.__file__).parent / "raw_kernels" / "norm.hip").read_text().splitlines())
        if "const float *weight, // (E,)" in text
    )  # fmt: skip
    assert re.fullmatch(
        rf"DeviceError: norm-\S+ does not compile for {gfx} with \S+/hipcc: norm\.hip:{line}: "
        r"unknown type name 'floot'.*: "
        r"'const floot \*weight, // \(E,\)'",
        outcome(load),
    )


def test_a_driver_call_of_ours_that_fails_raises_what_cupys_own_raise() -> None:
    from forge.backend.cupy_driver import check, errors

    check(0)
    with pytest.raises(RuntimeError, match=r"^hipErrorInvalidValue: invalid argument$"):  # the fallback's
        check(1)
    failed = r"^the GPU failed: hipErrorInvalidValue: invalid argument$"
    with pytest.raises(forge.DeviceError, match=failed), errors():
        check(1)
