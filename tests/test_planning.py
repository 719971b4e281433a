"""A GPU's steps make what the plan said at load and no more, however long a prompt is and whatever runs beside it."""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import finalize

import numpy as np
import pytest

from forge import SamplingParams, loading, models, planning
from forge.backend import NUMPY
from forge.config import EngineConfig
from forge.devtools.recorder import Recorded, Recorder
from forge.devtools.usual import usual_models
from forge.devtools.variants import HeaderWeights
from forge.engine import Engine
from forge.errors import OutOfMemoryError, UnsupportedError
from forge.formats.gguf import GGUF
from forge.formats.gguf_header import Header
from forge.models.rope import RotaryEmbedding
from forge.planning import Plan, make_plan

GB = 10**9
LONG = 131_000


class Counting(Recorder):
    """A GPU of so many bytes that runs nothing, and counts those of its arrays."""

    def __init__(self, total: int) -> None:
        super().__init__("gfx942")
        self.total, self.live, self.peak = total, 0, 0
        self.made_by_steps: list[int] = []
        """The most bytes that each step had at one time, beside what was there before."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
        self.live += size
        self.peak = max(self.peak, self.live)
        finalize(memory, self._freed, size)
        array = np.ndarray(shape, dtype, memory).view(Recorded)
        array.device = self
        return array

    def _freed(self, size: int) -> None:
        self.live -= size

    def free_bytes(self) -> int:
        return self.total - self.live

    def recorder(self) -> Callable[..., Any]:
        def run(inputs: object, step: Callable[[], Any]) -> Any:
            before = self.peak = self.live
            result = step()
            self.made_by_steps.append(self.peak - before)
            return result

        return run


@pytest.fixture(autouse=True)
def rope_tables_without_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a long context take a second to compute, and nothing here runs."""

    def compute(rope: RotaryEmbedding, positions: int) -> None:
        rope.cos_sin = rope._backend.empty((positions, rope.config.dim // 2, 2), np.float32)

    monkeypatch.setattr(RotaryEmbedding, "compute", compute)


def loaded(number: int, total: int, settings: EngineConfig) -> tuple[Counting, Plan, Engine]:
    """One of the usual models on a GPU of so many bytes: 0 to 3 have 1B's widths, 4 to 7 8B's."""
    device = Counting(total)
    file = list(usual_models())[number]
    plan = make_plan(file, settings, device)
    decoder = models.build(file, models.read_config(file, plan.context), device, None, HeaderWeights)
    runner = loading.build_runner(decoder, plan, settings, device)
    return device, plan, Engine(runner, end_ids=frozenset(), max_step_tokens=plan.max_step_tokens)


@pytest.mark.parametrize(
    ("number", "total"),
    [
        (4, 141 * GB),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in ((0, 141 * GB), (5, 141 * GB), (7, 24 * GB), (7, 8 * GB))
        ),
    ],
    ids=["8B F16 on 141 GB", "1B F16 on 141 GB", "8B Q8_0 on 141 GB", "8B Q4_K on 24 GB", "8B Q4_K on 8 GB"],
)
def test_a_prompt_that_fills_the_context_beside_many_others_takes_what_was_planned(number: int, total: int) -> None:
    device, plan, engine = loaded(number, total, EngineConfig(context=LONG + 72))
    assert device.live < 0.9 * total
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    for count in range(plan.max_sequences - 1):
        engine.add([1] * (1 + count % 200), params)
    engine.add([2] * LONG, params)
    after_load = device.live
    while engine.has_work and len(device.made_by_steps) < 40:
        engine.step()
    largest = max(device.made_by_steps)
    assert plan.step_bytes / 3 < largest <= plan.step_bytes
    kept = device.live - after_load  # buffers of the pipeline, scratch, and what captured steps keep here: nothing
    assert 0 <= kept < GB // 2


@pytest.mark.parametrize(
    ("total", "sequences", "step_tokens"),
    [(141 * GB, 256, 8192), (24 * GB, 256, 8192), (8 * GB, 256, 3881)],
)
def test_defaults_follow_the_memory(total: int, sequences: int, step_tokens: int) -> None:
    """Of a model of one layer with 8B's widths in Q4_K."""
    _, plan, _ = loaded(7, total, EngineConfig(context=8192))
    assert (plan.max_sequences, plan.max_step_tokens) == (sequences, step_tokens)


def whole(number: int, layers: int) -> GGUF:
    """A usual model with so many layers."""
    file = list(usual_models())[number]
    tensors = {
        name.replace("blk.0.", f"blk.{layer}."): info
        for name, info in file.tensors.items()
        for layer in range(layers if name.startswith("blk.") else 1)
    }
    source: Any = SimpleNamespace(check_path=lambda: None, close=lambda: None)
    metadata = {**file.metadata, "llama.block_count": layers}
    return GGUF([Header(Path("usual.gguf"), source, 3, metadata, tensors, 0)])


SMALL = [(7, 32, 8), (6, 32, 10), (5, 32, 12), (5, 32, 16), (7, 80, 16), (4, 32, 24)]
"""Models with 8B's widths and their layers on GPUs of so many GB, 0.5 of which are not free: most is weights."""


@pytest.mark.parametrize(("number", "layers", "size"), SMALL)
def test_a_small_gpu_keeps_most_of_what_weights_leave_for_a_context(number: int, layers: int, size: int) -> None:
    """Steps and sequences are fewer there. A context that somebody asks for is not refused for the sake of them."""
    free, file = size * GB - GB // 2, whole(number, layers)
    weights = sum(info.nbytes for info in file.tensors.values())
    token_bytes = 2 * layers * 8 * 128 * 2  # keys and values of 8 heads of 128, float16
    left = int(0.9 * free) - weights
    plan = make_plan(file, EngineConfig(), Counting(free))
    assert plan.context * token_bytes >= min(0.7 * left, 2**14 * token_bytes)
    assert plan.num_pages[0] * 64 >= plan.context
    assert plan.max_step_tokens >= 512
    assert plan.max_sequences >= 16
    taken = weights + (plan.num_pages[0] + 1) * 64 * token_bytes
    assert taken <= 0.9 * free
    assert taken + plan.step_bytes < 0.95 * free
    asked = make_plan(file, EngineConfig(context=plan.context), Counting(free))
    assert (asked.context, asked.max_step_tokens >= 512) == (plan.context, True)


def mixture(layers: int) -> tuple[GGUF, int, int]:
    """One with 30B-A3B's widths in Q4_K: the file, bytes of all tensors, and of a layer's experts."""
    *earlier, _ = usual_models()
    file = whole(len(earlier), layers)
    sizes = {name: info.nbytes for name, info in file.tensors.items()}
    return file, sum(sizes.values()), sum(size for name, size in sizes.items() if re.match(r"blk\.0\..*_exps\.", name))


def test_experts_in_the_hosts_memory_leave_the_room_of_one_layer_on_the_device() -> None:
    file, all_bytes, of_layer = mixture(48)
    device, config = Recorder("gfx1100"), models.read_config(file)
    for count, there in ((1, 1), (10, 10), (48, 48), (99, 48)):
        on_device, on_host, _ = planning.weight_bytes(file, config, device, count)
        assert on_host == there * of_layer
        assert 0 <= on_device - (all_bytes - on_host + of_layer) < 8192
    assert planning.weight_bytes(file, config, device, 0) == (all_bytes, 0, "")
    device.is_integrated = True  # its memory is the host's
    assert 0 <= planning.weight_bytes(file, config, device, 10)[0] - (all_bytes + of_layer) < 8192


def test_a_mixture_that_does_not_fit_is_told_how_many_layers_experts_would_have_to_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planning.host, "free_bytes", lambda: 32 * GB)
    file, all_bytes, of_layer = mixture(48)
    assert all_bytes > 16 * GB
    with pytest.raises(OutOfMemoryError, match=r"need 1\d\.\d\d GB and 1\d.* or use cpu_experts=\d+: experts") as said:
        make_plan(file, EngineConfig(), Counting(16 * GB))
    assert said.value.parameter == "memory_fraction"
    least = int(str(said.value).split("cpu_experts=")[1].split(":")[0])
    assert make_plan(file, EngineConfig(cpu_experts=least), Counting(16 * GB)).context >= 1 << 14
    assert make_plan(file, EngineConfig(cpu_experts=least - 1), Counting(16 * GB)).context < 1 << 14
    assert 0 <= least * of_layer - (all_bytes + of_layer - 0.9 * 16 * GB) < 3 * GB  # of which are KV cache and a step
    with pytest.raises(OutOfMemoryError, match=r"a context of 99000 needs .*use context=\d+, or use cpu_experts=\d+: "):
        make_plan(file, EngineConfig(context=99_000, cpu_experts=least), Counting(16 * GB))
    with pytest.raises(OutOfMemoryError, match=r"larger memory_fraction$"):  # nothing would help
        make_plan(file, EngineConfig(), Counting(2 * GB))
    monkeypatch.setattr(planning.host, "free_bytes", lambda: 3 * GB)
    with pytest.raises(
        OutOfMemoryError, match=r"experts of 40 layers need \d+\.\d\d GB of the host's memory and 3\.00 GB"
    ):
        make_plan(file, EngineConfig(cpu_experts=40), Counting(16 * GB))


def test_what_is_given_wins() -> None:
    settings = EngineConfig(context=8192, max_sequences=300, max_step_tokens=1000)
    _, plan, engine = loaded(7, 24 * GB, settings)
    assert (plan.max_sequences, plan.max_step_tokens) == (300, 1000)
    assert (engine.scheduler.max_sequences, engine.scheduler.max_step_tokens) == (300, 1000)


def test_what_a_model_reads_is_planned_in_the_blocks_of_its_file() -> None:
    """And the router in float32, as its file has it; without layers behind the model's own, and without keys and values
    of layers that have those of another."""
    *_, mixture = usual_models()
    assert "blk.0.ffn_gate_exps.weight" in mixture.tensors
    stored = sum(info.nbytes for info in mixture.tensors.values())
    config = models.read_config(mixture)
    assert planning.weight_bytes(mixture, config, Recorder("gfx1100")) == (stored, 0, "")
    behind = {f"blk.1.{name}": mixture.tensors["blk.0.attn_k.weight"] for name in ("attn_k.weight", "ffn_up.weight")}
    mixture.tensors = {**mixture.tensors, **behind}  # of a layer behind the model's own
    assert planning.weight_bytes(mixture, config, Recorder("gfx1100")) == (stored, 0, "")
    of_another = replace(config, layer_kv=(-1,))
    without = stored - sum(mixture.tensors[f"blk.0.attn_{name}.weight"].nbytes for name in "kv")
    assert planning.weight_bytes(mixture, of_another, Recorder("gfx1100")) == (without, 0, "")


def test_heads_without_a_deterministic_kernel_are_refused_before_anything_is_loaded() -> None:
    file, *_ = usual_models()
    file.metadata = {**file.metadata, "llama.attention.key_length": 320, "llama.attention.value_length": 320}
    assert make_plan(file, EngineConfig(), Recorder("gfx942")).context
    settings = EngineConfig(deterministic=True)
    assert make_plan(file, settings, NUMPY).context
    with pytest.raises(UnsupportedError, match="heads of 320 numbers have no deterministic kernel: 256 is") as caught:
        make_plan(file, settings, Recorder("gfx942"))
    assert caught.value.parameter == "deterministic"
    file.metadata = {**file.metadata, "llama.attention.key_length": 514, "llama.attention.value_length": 514}
    with pytest.raises(UnsupportedError, match=f"{file.path}: heads of 514 numbers have no kernel: 512 is") as caught:
        make_plan(file, EngineConfig(), Recorder("gfx942"))
    assert caught.value.parameter == "device"


def test_steps_are_as_long_as_kernels_can_count_the_numbers_of() -> None:
    """Whatever is asked for, where memory is for more: 8 experts of 2,048 numbers each for a token here."""
    *_, mixture = usual_models()
    plan = make_plan(mixture, EngineConfig(max_step_tokens=1 << 20), Recorder("gfx942"))
    assert plan.max_step_tokens == (2**32 - 1) // (8 * 2048)
