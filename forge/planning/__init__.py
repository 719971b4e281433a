"""What a loaded model takes beside its weights: the memory of a step, and pages for the layers' state."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

from forge import models
from forge.backend import Backend, host
from forge.config import EngineConfig, ModelConfig
from forge.engine.passes import LOGIT_BYTES, MAX_TOKENS
from forge.errors import OutOfMemoryError, ParameterError, UnsupportedError
from forge.formats.checkpoint import Checkpoint
from forge.ops.attention import MAX_HEAD_DIM, MAX_PREFILL_HEAD_DIM
from forge.planning.steps import CPU_STEP_TOKENS, bytes_of_step, sequence_bytes, step_sizes, token_bytes
from forge.planning.weights import weight_bytes
from forge.state import budget
from forge.state.model_state import kinds_of
from forge.state.paged_kv import PagedKV

SHARED_TOKENS = 1 << 15
"""Positions in the KV cache where nobody says how many sequences are to have their whole context, at least."""
_SEQUENCE_TOKENS, _LEAST_SEQUENCE_TOKENS = 1024, 512
"""Positions of it for each of the sequences that may then run together, and how few may be left of them: where memory
is short there are fewer sequences."""
_USUAL_CONTEXT = 1 << 14
"""Tokens of a sequence for which both leave room where nobody says how many: they are halved until they do, or are the
least."""
_HALVINGS = 5
_SCRATCH_BYTES = 256 << 20
"""Beside activations: weights that are converted for BLAS, splits of sums, arrays of the step that the host uploads."""
_REMARKABLE_BYTES = 10**9
"""A KV cache that takes so much of a GPU, or with sliding windows of a CPU's memory, is remarked on."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of what beside the weights takes memory."""

    context: int
    """Most tokens of one sequence."""
    max_sequences: int
    max_step_tokens: int
    step_bytes: int
    """What a GPU's step makes, at most: its activations, and the logits of its rows. Steps share this memory."""
    kinds: tuple[PagedKV, ...]
    """Kinds of layer state."""
    num_pages: tuple[int, ...]
    """Pages of each kind for all sequences, without the spare one."""
    notes: tuple[str, ...]
    weight_bytes: int
    """Weights and adapters, of the device's memory."""
    host_bytes: int
    """Experts that stay in the host's memory, where that is not the device's."""
    other_bytes: int
    """What a GPU's steps and sequences take beside `step_bytes` and pages, at most."""

    @property
    def kv_bytes(self) -> int:
        """Of all pages, the spare ones included."""
        return budget.bytes_of(self.kinds, self.num_pages)

    @property
    def device_bytes(self) -> int:
        """What a loaded model takes of the device's memory, and does not give back before it is closed."""
        return self.weight_bytes + self.kv_bytes + self.step_bytes


def make_plan(file: Checkpoint, settings: EngineConfig, backend: Backend, adapters: int = 0) -> Plan:
    """What fits beside the weights, and so many bytes of adapters. Raises OutOfMemoryError with the bytes needed and
    free, and what to change, `cpu_experts` where that helps, and UnsupportedError for heads without a kernel.

    Weights and KV cache take no more than `memory_fraction` of what is free, and with what steps make no more than half
    of the rest. Where nobody asked for room for so many sequences, one whole context is kept, and what others leave of
    a GPU's memory is left to them: a desktop, another model.
    """
    config = models.read_config(file, settings.context)
    _check_heads(file, config, settings, backend)
    if settings.cpu_experts and config.experts is None:
        raise ParameterError(
            f"{file.path}: the model has no experts", parameter="cpu_experts", hint="leave cpu_experts out"
        )
    try:
        return _planned(file, config, settings, backend, adapters)
    except OutOfMemoryError as error:
        if least := _least_cpu_experts(file, config, settings, backend, adapters):
            others = f"{error.hint}, or " if error.hint else ""
            hint = f"{others}use cpu_experts={least}: experts of {layers_text(least)} then stay in the host's memory"
            raise OutOfMemoryError(error.args[0], parameter=error.parameter, hint=hint) from None
        raise


def _planned(file: Checkpoint, config: ModelConfig, settings: EngineConfig, backend: Backend, adapters: int) -> Plan:
    """The plan for these settings alone. Raises OutOfMemoryError, and ParameterError for too long a context."""
    weights, on_host, converted = weight_bytes(file, config, backend, settings.cpu_experts)
    weights += adapters
    if on_host > host.free_bytes():
        raise OutOfMemoryError(
            f"{file.path}: experts of {layers_text(settings.cpu_experts)} need {_gb(on_host)} of the host's memory "
            f"and {_gb(host.free_bytes())} are free",
            parameter="cpu_experts",
            hint="use a smaller cpu_experts, or free some memory",
        )
    if weights > (free := int(backend.free_bytes() * settings.memory_fraction)):
        what = f"weights{' and adapters' if adapters else ''}"
        raise OutOfMemoryError(
            f"{file.path}: the {what} need {_gb(weights)}{'' if backend.is_gpu else ' as float32'} and "
            f"{_gb(free)} may be taken, {settings.memory_fraction:g} of what is free on {backend.device}",
            parameter="memory_fraction",
            hint="free some memory, use a smaller model, or a larger memory_fraction",
        )
    size, itemsize = settings.page_size, backend.dtype.itemsize
    wanted = settings.context or config.context_length
    if wanted > config.context_length and config.has_learned_positions:
        message = f"{file.path}: the model has learned {config.context_length} positions, fewer than {wanted}"
        raise ParameterError(message, parameter="context", hint=f"use context={config.context_length} or less")
    fit = _fit(config, settings, backend, weights, wanted, settings.context or min(wanted, _USUAL_CONTEXT))
    sequences, context = fit.sequences, fit.context
    notes: tuple[str, ...] = ()
    if settings.cpu_experts and not backend.is_gpu:
        notes += (f"cpu_experts: {backend.device} has all weights in the host's memory",)
    if converted:
        notes += (f"weights: types without a kernel become float16 and take {_gb(weights)} in all: {converted}",)
    if wanted > config.context_length:
        notes += (f"context: {wanted} is longer than the {config.context_length} tokens the model was trained for",)
    if context < wanted:
        notes += (_cut(file, settings, fit, wanted),)
    kinds = state_kinds(config, context, size, max(fit.step_tokens, sequences), itemsize)
    shared_pages = None
    if settings.max_sequences is None:
        shared_pages = _shared_pages(kinds, size, sequences, fit.room if backend.is_gpu else 0)
        if backend.is_gpu:
            sequences = min(sequences, max(shared_pages * size // _LEAST_SEQUENCE_TOKENS, 1))
    num_pages = budget.share_out(kinds, context, fit.room, sequences, shared_pages)
    if (backend.is_gpu or len(kinds) > 1) and budget.bytes_of(kinds, num_pages) >= _REMARKABLE_BYTES:
        notes += (_cache_note(kinds, num_pages, context, size),)
    taken = weights, on_host, fit.other_bytes
    return Plan(context, sequences, fit.step_tokens, fit.step_bytes, kinds, num_pages, notes, *taken)


class _Fit(NamedTuple):
    """Sizes of steps with which a context has room beside the weights."""

    step_tokens: int
    sequences: int
    step_bytes: int
    other_bytes: int
    room: int
    """Bytes that are left to the layers' state."""
    kinds: tuple[PagedKV, ...]
    """Those of a sequence as long as was wanted."""
    context: int
    """What fits of that."""


def _fit(config: ModelConfig, settings: EngineConfig, backend: Backend, weights: int, wanted: int, goal: int) -> _Fit:
    """Steps are made smaller until a context of `goal` tokens fits, or they are the least. Up to `wanted` may fit."""
    there, size = backend.free_bytes(), settings.page_size
    free = int(there * settings.memory_fraction)
    spare = (there - free) // 2
    for halvings in range(_HALVINGS if backend.is_gpu else 1):
        step_tokens, sequences = step_sizes(config, settings, backend, free - weights, halvings)
        step_bytes = bytes_of_step(config, step_tokens, sequences) if backend.is_gpu else 0
        of_pass = min(MAX_TOKENS, step_tokens) * token_bytes(config) + LOGIT_BYTES
        others = _SCRATCH_BYTES + of_pass + sequences * sequence_bytes(config) if backend.is_gpu else 0
        room = max(free - weights - max(step_bytes + others - spare, 0), 0)
        kinds = state_kinds(config, wanted, size, max(step_tokens, sequences), backend.dtype.itemsize)
        context = min(wanted, budget.longest_context(kinds, wanted, size, room))
        if context >= goal:
            break
    return _Fit(step_tokens, sequences, step_bytes, others, room, kinds, context)


def largest_fit(
    file: Checkpoint, settings: EngineConfig, backend: Backend, wanted: int, adapters: int = 0
) -> tuple[int, int]:
    """The most tokens, up to `wanted`, that `context` may ask for, and the bytes of KV cache of `wanted`."""
    config = models.read_config(file, wanted)
    weights, on_host, _ = weight_bytes(file, config, backend, settings.cpu_experts)
    weights += adapters
    fits = on_host <= host.free_bytes() and weights <= int(backend.free_bytes() * settings.memory_fraction)
    found = _fit(config, settings, backend, weights, wanted, wanted)
    return found.context * fits, budget.bytes_of(found.kinds, budget.pages_of(found.kinds, wanted))


def layers_text(count: int) -> str:
    """A number of layers with its noun."""
    return "1 layer" if count == 1 else f"{count} layers"


def _check_heads(file: Checkpoint, config: ModelConfig, settings: EngineConfig, backend: Backend) -> None:
    """Raises UnsupportedError for heads that no kernel holds, before anything is loaded."""
    if not backend.is_gpu or config.head_dim <= MAX_HEAD_DIM:
        return
    if settings.deterministic:
        raise UnsupportedError(
            f"{file.path}: heads of {config.head_dim} numbers have no deterministic kernel: {MAX_HEAD_DIM} is the most",
            parameter="deterministic",
            hint='use deterministic=False, or device="cpu"',
        )
    if config.head_dim > MAX_PREFILL_HEAD_DIM:
        message = f"{file.path}: heads of {config.head_dim} numbers have no kernel: {MAX_PREFILL_HEAD_DIM} is the most"
        raise UnsupportedError(message, parameter="device", hint='use device="cpu"')


def state_kinds(
    config: ModelConfig, context: int, page_size: int, step_tokens: int = CPU_STEP_TOKENS, itemsize: int = 4
) -> tuple[PagedKV, ...]:
    """The kinds of layer state of a model in an engine with sequences of `context` tokens; by default in float32."""
    return kinds_of(config, context=context, page_size=page_size, step_tokens=step_tokens, itemsize=itemsize)


def _shared_pages(kinds: tuple[PagedKV, ...], page_size: int, sequences: int, room: int) -> int:
    """Pages that sequences share: some for each, in no more than half the room, and no fewer than a few have."""
    most = max(room // 2 // sum(kind.page_bytes for kind in kinds), SHARED_TOKENS // page_size)
    return min(most, max(sequences * _SEQUENCE_TOKENS, SHARED_TOKENS) // page_size)


def _cut(file: Checkpoint, settings: EngineConfig, fit: _Fit, wanted: int) -> str:
    """A remark on a shorter context than the model's. Raises OutOfMemoryError where somebody asked for it."""
    if fit.context < 1:
        raise OutOfMemoryError(f"{file.path}: no memory is left beside the weights")
    if settings.context is not None:
        need = _gb(budget.bytes_of(fit.kinds, budget.pages_of(fit.kinds, wanted)))
        raise OutOfMemoryError(
            f"{file.path}: a context of {wanted} needs {need} of KV cache and {_gb(fit.room)} are left beside the "
            f"weights",
            parameter="context",
            hint=f"use context={fit.context}",
        )
    return f"context: {fit.context} of the model's {wanted} tokens, cut to fit {_gb(fit.room)} of KV cache"


def _cache_note(kinds: tuple[PagedKV, ...], num_pages: tuple[int, ...], context: int, page_size: int) -> str:
    """What the KV cache takes, and what a token or a sequence takes of it."""
    parts = []
    for kind, count in zip(kinds, num_pages, strict=True):
        taken = _gb(budget.bytes_of([kind], [count]))
        each = f"{kind.name}: {kind.num_pages(context) * kind.page_bytes / 1e6:,.1f} MB per sequence"
        if kind.token_bytes:
            each = f"{kind.token_bytes:,} bytes per token of context"
        parts.append(f"{count * page_size} tokens take {taken} ({each})")
    return f"KV cache: {', '.join(parts)}; a smaller context takes less"


def _least_cpu_experts(
    file: Checkpoint, config: ModelConfig, settings: EngineConfig, backend: Backend, adapters: int
) -> int:
    """The least `cpu_experts` above that of the settings with which the model has the context that it is to have; 0 =
    there is none."""
    if config.experts is None or not backend.is_gpu or backend.is_integrated:
        return 0
    goal = settings.context or min(config.context_length, _USUAL_CONTEXT)
    for count in range(settings.cpu_experts + 1, config.num_layers + 1):
        with suppress(OutOfMemoryError):
            if _planned(file, config, replace(settings, cpu_experts=count), backend, adapters).context >= goal:
                return count
    return 0


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
