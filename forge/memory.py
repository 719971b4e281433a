"""`plan_memory`: what loading a model would take, before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from forge import backend as backends
from forge import models
from forge._files import model_name
from forge.backend import Backend
from forge.checkpoints import open_checkpoint
from forge.checkpoints.adapters import check_adapters, read_adapter
from forge.checkpoints.recipes import check_recipe
from forge.checkpoints.retyped import quantized
from forge.config import Dtype, EngineConfig, Progress
from forge.display import html_table, num_bytes, watched
from forge.errors import OutOfMemoryError
from forge.formats.checkpoint import Checkpoint
from forge.keywords import keywords
from forge.loading import check_settings, resolve, settings_of, with_loaded
from forge.planning import largest_fit, make_plan
from forge.planning.weights import weight_bytes
from forge.runtime import process


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What `forge.load` would take of a device's memory, in bytes. Where the model fits, `load` takes what this says.

    Attributes:
        model: The model's file or directory.
        device: The device and what it is, in words.
        fits: Whether `load` would succeed with these settings.
        problem: The message of the error that `load` would raise. None = it fits.
        weight_bytes: Weights and adapters: in their blocks on a GPU, as float32 on a CPU.
        kv_bytes: The KV cache: of all sequences that have room; where it does not fit, of one with the whole context.
        step_bytes: What a GPU keeps for its largest step. 0 on a CPU.
        host_bytes: Experts that `cpu_experts` leaves in the host's memory.
        free_bytes: What is free on the device now.
        usable_bytes: The part of it that `memory_fraction` lets weights and KV cache take.
        context: Most tokens of one sequence.
        max_context: The largest `context` that fits, up to the number of tokens that the model was trained for, or that
            was asked for if that is more. 0 = the weights alone do not fit.
        max_sequences: Most sequences that run together. 0 = it does not fit.
        notes: Remarks on what was decided, as `LLM.notes` has them.
    """

    model: Path
    device: str
    fits: bool
    problem: str | None
    weight_bytes: int
    kv_bytes: int
    step_bytes: int
    host_bytes: int
    free_bytes: int
    usable_bytes: int
    context: int
    max_context: int
    max_sequences: int
    notes: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Of the device's memory: weights, KV cache and steps."""
        return self.weight_bytes + self.kv_bytes + self.step_bytes

    def __repr__(self) -> str:
        verdict = "fits" if self.fits else "does not fit"
        return "\n".join([f"{model_name(self.model)} {verdict} {self.device}", *(f"{a}: {b}" for a, b in self._rows())])

    def _repr_html_(self) -> str:
        verdict = "fits" if self.fits else "does not fit"
        return html_table(f"{model_name(self.model)} {verdict} {self.device}", self._rows())

    def _rows(self) -> list[tuple[str, str]]:
        rows = [("weights", num_bytes(self.weight_bytes)), ("KV cache", num_bytes(self.kv_bytes))]
        rows += [("steps", num_bytes(self.step_bytes))] * bool(self.step_bytes)
        rows += [("in all", f"{num_bytes(self.total_bytes)} of {num_bytes(self.free_bytes)} free")]
        rows += [("in the host's memory", num_bytes(self.host_bytes))] * bool(self.host_bytes)
        rows += [("context", f"{self.context:,} tokens; {self.max_context:,} would fit")]
        rows += [("sequences", f"up to {self.max_sequences} together")] * bool(self.max_sequences)
        rows += [("problem", self.problem)] if self.problem else []
        return rows + [("note", note) for note in self.notes]


@keywords()
def plan_memory(
    model: str | os.PathLike[str],
    *,
    device: str = "auto",
    context: int | None = None,
    memory_fraction: float | None = None,
    cpu_experts: int | None = None,
    dtype: Dtype | None = None,
    max_sequences: int | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    quantize: str | None = None,
    engine: EngineConfig | None = None,
    progress: Progress | bool | None = None,
) -> MemoryPlan:
    """What loading a model would take of a device's memory, and whether it fits. Of its file the header is read alone.

    A model that is not there yet is fetched, as `load` does it.

    Args:
        model: As in `load`.
        device: As in `load`.
        context: As in `load`.
        memory_fraction: As in `load`.
        cpu_experts: As in `load`.
        dtype: As in `load`.
        max_sequences: As in `load`.
        adapters: As in `load`. They are read whole.
        quantize: As in `load`.
        engine: As in `load`.
        progress: As in `load`, for a model that is fetched.

    Raises:
        ForgeError: As `load`, but that too little memory is no error: `MemoryPlan.fits` says so.
    """
    shortcuts = {"context": context, "memory_fraction": memory_fraction, "cpu_experts": cpu_experts, "dtype": dtype}
    settings = settings_of(engine, shortcuts | {"max_sequences": max_sequences})
    backend = backends.select(device)
    check_settings(settings, None, backend)
    named = check_adapters(adapters)
    quantize = None if quantize is None else check_recipe(quantize)
    with watched(progress) as report:
        path = resolve(model, report)
    process.wait_for_closed()
    with open_checkpoint(path) as stored:
        file = quantized(stored, quantize, backend) if quantize else stored
        read = [read_adapter(each, file) for each in named.values()]
        extra = models.adapter_bytes(file, read, backend.dtype.itemsize)
        free = backend.free_bytes()
        try:
            plan = make_plan(file, settings, backend, extra)
        except OutOfMemoryError as error:
            return _too_large(file, settings, backend, extra, str(with_loaded(error, backend)))
        most = max(models.read_config(file).context_length, plan.context)
        return MemoryPlan(
            model=path,
            device=backend.device,
            fits=True,
            problem=None,
            weight_bytes=plan.weight_bytes,
            kv_bytes=plan.kv_bytes,
            step_bytes=plan.step_bytes,
            host_bytes=plan.host_bytes,
            free_bytes=free,
            usable_bytes=int(free * settings.memory_fraction),
            context=plan.context,
            max_context=max(largest_fit(file, settings, backend, most, extra)[0], plan.context),
            max_sequences=plan.max_sequences,
            notes=(*file.notes, *plan.notes),
        )


def _too_large(file: Checkpoint, settings: EngineConfig, backend: Backend, adapters: int, problem: str) -> MemoryPlan:
    """The plan of a model that does not fit: what it would need."""
    config = models.read_config(file, settings.context)
    weights, on_host, _ = weight_bytes(file, config, backend, settings.cpu_experts)
    wanted = settings.context or config.context_length
    most, kv_bytes = largest_fit(file, replace(settings, context=None), backend, wanted, adapters)
    free = backend.free_bytes()
    return MemoryPlan(
        model=file.path,
        device=backend.device,
        fits=False,
        problem=problem,
        weight_bytes=weights + adapters,
        kv_bytes=kv_bytes,
        step_bytes=0,
        host_bytes=on_host,
        free_bytes=free,
        usable_bytes=int(free * settings.memory_fraction),
        context=wanted,
        max_context=most,
        max_sequences=0,
        notes=file.notes,
    )
