"""What a loaded model takes beside its weights: the memory of a step, and pages for the layers' state."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod

from forge import models
from forge.backend import Backend, host
from forge.config import EngineConfig, ModelConfig
from forge.engine.passes import LOGIT_BYTES, MAX_TOKENS
from forge.errors import OutOfMemoryError, ParameterError, UnsupportedError
from forge.formats.checkpoint import Checkpoint
from forge.ops.attention import MAX_HEAD_DIM, MAX_PREFILL_HEAD_DIM
from forge.state import budget
from forge.state.model_state import kinds_of
from forge.state.paged_kv import PagedKV

SHARED_TOKENS = 1 << 15
"""Positions in the KV cache where nobody says how many sequences are to have their whole context, at least."""
_SEQUENCE_TOKENS, _LEAST_SEQUENCE_TOKENS = 1024, 512
"""Positions of it for each of the sequences that may then run together, and how few may be left of them: where memory
is short there are fewer sequences."""
_CPU_SEQUENCES, _GPU_SEQUENCES = 64, 256
"""Most sequences that run together where nobody says how many: on a GPU fewer, if memory is short."""
_CPU_STEP_TOKENS, _GPU_STEP_TOKENS, _WINDOW_STEP_TOKENS = 512, 8192, 2048
"""Most tokens of a step where nobody says how many: on a CPU, on a GPU, and there with sliding windows, whose pages are
held for all tokens of a step."""
_CPU_STEP_BYTES = 256 << 20
_STEP_SHARE = 8
"""The activations of a GPU's step take one part of so many of what the weights leave: a wide model computes fewer
tokens at a time."""
_SEQUENCES_SHARE = 4
"""What `_sequence_bytes` says of all sequences, where nobody says how many run together, takes such a part."""
_USUAL_CONTEXT = 1 << 14
"""Tokens of a sequence for which both leave room where nobody says how many: they are halved until they do, or are the
least."""
_LEAST_STEP_TOKENS, _LEAST_SEQUENCES = 512, 16
_HALVINGS = 5
_SCRATCH_BYTES = 256 << 20
"""Beside activations: weights that are converted for BLAS, splits of sums, arrays of the step that the host uploads."""
_MAX_NUMBERS = 2**32 - 1
"""Numbers of an array that a step makes: kernels count them in 32 bits."""
_PARTIALS = 4
"""Split-K partials of a product in a captured step, typically."""
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


def plan_memory(file: Checkpoint, settings: EngineConfig, backend: Backend, adapters: int = 0) -> Plan:
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
    there = backend.free_bytes()
    free = int(there * settings.memory_fraction)
    spare = (there - free) // 2
    weights, on_host, converted = _weight_bytes(file, config, backend, settings.cpu_experts)
    weights += adapters
    if on_host > host.free_bytes():
        raise OutOfMemoryError(
            f"{file.path}: experts of {layers_text(settings.cpu_experts)} need {_gb(on_host)} of the host's memory "
            f"and {_gb(host.free_bytes())} are free",
            parameter="cpu_experts",
            hint="use a smaller cpu_experts, or free some memory",
        )
    if weights > free:
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
    goal, context = settings.context or min(wanted, _USUAL_CONTEXT), 0
    for halvings in range(_HALVINGS if backend.is_gpu else 1):
        step_tokens, sequences = _step_sizes(config, settings, backend, free - weights, halvings)
        step_bytes = _step_bytes(config, step_tokens, sequences) if backend.is_gpu else 0
        of_pass = min(MAX_TOKENS, step_tokens) * _token_bytes(config) + LOGIT_BYTES
        others = _SCRATCH_BYTES + of_pass + sequences * _sequence_bytes(config) if backend.is_gpu else 0
        room = max(free - weights - max(step_bytes + others - spare, 0), 0)
        kinds = state_kinds(config, wanted, size, max(step_tokens, sequences), itemsize)
        context = min(wanted, budget.longest_context(kinds, wanted, size, room))
        if context >= goal:
            break
    notes: tuple[str, ...] = ()
    if settings.cpu_experts and not backend.is_gpu:
        notes += (f"cpu_experts: {backend.device} has all weights in the host's memory",)
    if converted:
        notes += (f"weights: types without a kernel become float16 and take {_gb(weights)} in all: {converted}",)
    if wanted > config.context_length:
        notes += (f"context: {wanted} is longer than the {config.context_length} tokens the model was trained for",)
    if context < wanted:
        notes += (_cut(file, settings, kinds, context, wanted, room),)
    kinds = state_kinds(config, context, size, max(step_tokens, sequences), itemsize)
    shared_pages = None
    if settings.max_sequences is None:
        shared_pages = _shared_pages(kinds, size, sequences, room if backend.is_gpu else 0)
        if backend.is_gpu:
            sequences = min(sequences, max(shared_pages * size // _LEAST_SEQUENCE_TOKENS, 1))
    num_pages = budget.share_out(kinds, context, room, sequences, shared_pages)
    if (backend.is_gpu or len(kinds) > 1) and budget.bytes_of(kinds, num_pages) >= _REMARKABLE_BYTES:
        notes += (_cache_note(kinds, num_pages, context, size),)
    return Plan(context, sequences, step_tokens, step_bytes, kinds, num_pages, notes)


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
    config: ModelConfig, context: int, page_size: int, step_tokens: int = _CPU_STEP_TOKENS, itemsize: int = 4
) -> tuple[PagedKV, ...]:
    """The kinds of layer state of a model in an engine with sequences of `context` tokens; by default in float32."""
    return kinds_of(config, context=context, page_size=page_size, step_tokens=step_tokens, itemsize=itemsize)


def _shared_pages(kinds: tuple[PagedKV, ...], page_size: int, sequences: int, room: int) -> int:
    """Pages that sequences share: some for each, in no more than half the room, and no fewer than a few have."""
    most = max(room // 2 // sum(kind.page_bytes for kind in kinds), SHARED_TOKENS // page_size)
    return min(most, max(sequences * _SEQUENCE_TOKENS, SHARED_TOKENS) // page_size)


def _step_sizes(
    config: ModelConfig, settings: EngineConfig, backend: Backend, room: int, halvings: int
) -> tuple[int, int]:
    """Most tokens of a step, whose activations fit, and most sequences that run together. What nobody asked for is
    halved so often."""
    if not backend.is_gpu:
        most = max(_CPU_STEP_BYTES // _token_bytes(config), 1)
        return min(settings.max_step_tokens or _CPU_STEP_TOKENS, most), settings.max_sequences or _CPU_SEQUENCES
    usual = _WINDOW_STEP_TOKENS if any(config.layer_windows) else _GPU_STEP_TOKENS
    most = max(min(room // _STEP_SHARE // _token_bytes(config), _MAX_NUMBERS // _token_numbers(config)), 1)
    tokens = min(settings.max_step_tokens or max(usual >> halvings, _LEAST_STEP_TOKENS), most)
    most = max(room // _SEQUENCES_SHARE // _sequence_bytes(config), 1)
    return tokens, settings.max_sequences or min(max(_GPU_SEQUENCES >> halvings, _LEAST_SEQUENCES), most)


def _step_bytes(config: ModelConfig, tokens: int, sequences: int) -> int:
    """Bytes of what a step makes, at most: one of so many tokens, or one in which all sequences decode.

    That one makes split-K partials, and a penalized copy of its logits.
    """
    of_token, logits = _token_bytes(config), 4 * sequences * config.vocab_size
    return max(tokens * of_token + logits, sequences * (of_token + 4 * _PARTIALS * config.width) + 2 * logits)


def _token_bytes(config: ModelConfig) -> int:
    """Bytes of a token's activations where a step has the most of them.

    The stream, what is added to it and a kept operand, beside the larger of two: queries, keys, values and gates in
    float32 with the queries and the result of attention in float16, or gate and up in float32 with their product in
    float16. Beside these, what all layers have of a token as inputs of their own, with the two that they are made of.
    """
    heads = zip(config.layer_head_dims, config.layer_kv_heads, strict=True)
    attention = max(dim * (8 * config.num_heads + 8 * kv_heads) for dim, kv_heads in heads) + 6 * config.num_gates
    widest = max(attention, 10 * config.ffn_width)
    if experts := config.experts:  # logits; for each expert of a token both halves, activations and a result
        of_each = 10 * experts.width + 4 * config.width + 20
        widest = max(widest, 4 * experts.count + experts.used * of_each, 10 * experts.shared_width)
    return 16 * config.width + widest + 12 * config.num_layers * config.per_layer_width


def _token_numbers(config: ModelConfig) -> int:
    """Numbers that a token has in the largest array of a step: its queries, keys, values and gates, or gate and up, or
    those of its experts, or their results, or what all layers have of it as inputs of their own."""
    heads = zip(config.layer_head_dims, config.layer_kv_heads, strict=True)
    attention = max(dim * (config.num_heads + 2 * kv_heads) for dim, kv_heads in heads) + config.num_gates
    experts = config.experts
    of_experts = experts.used * max(2 * experts.width, config.width) if experts else 0
    of_layers = config.num_layers * config.per_layer_width
    return max(attention, 2 * config.ffn_width, of_experts, of_layers, config.width)


def _sequence_bytes(config: ModelConfig) -> int:
    """Bytes that each sequence takes beside its keys and values, and beside what steps make: its counts and biases in
    the sampler, and a penalized copy of its logits."""
    return 12 * config.vocab_size


def _cut(
    file: Checkpoint, settings: EngineConfig, kinds: tuple[PagedKV, ...], context: int, wanted: int, room: int
) -> str:
    """A remark on a shorter context than the model's. Raises OutOfMemoryError where somebody asked for it."""
    if context < 1:
        raise OutOfMemoryError(f"{file.path}: no memory is left beside the weights")
    if settings.context is not None:
        need = _gb(budget.bytes_of(kinds, budget.pages_of(kinds, wanted)))
        raise OutOfMemoryError(
            f"{file.path}: a context of {wanted} needs {need} of KV cache and {_gb(room)} are left beside the weights",
            parameter="context",
            hint=f"use context={context}",
        )
    return f"context: {context} of the model's {wanted} tokens, cut to fit {_gb(room)} of KV cache"


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


def _weight_bytes(
    file: Checkpoint, config: ModelConfig, backend: Backend, cpu_experts: int = 0
) -> tuple[int, int, str]:
    """Bytes that the weights take of a backend's memory, and of the host's, and which types are converted to float16
    for lack of a kernel. The memory of an integrated GPU is the host's."""
    tensors = {name: info for name, info in file.tensors.items() if _is_read(name, config)}
    if not backend.is_gpu:
        return 4 * sum(prod(info.shape) for info in tensors.values()), 0, ""
    total, experts = 0, models.expert_bytes(tensors)
    on_host = sum(size for layer, size in experts.items() if layer < cpu_experts)
    converted: set[str] = set()
    for name, info in tensors.items():
        kept = models.kept_type(info.type)
        if len(info.shape) < 2 or name.endswith((".bias", "ffn_gate_inp.weight")):
            total += 4 * prod(info.shape)
            continue
        total += models.kept_bytes(info)
        if kept is not info.type:
            converted |= {info.type.name} - {"F32", "BF16"}
    on_device = total - on_host * (not backend.is_integrated) + models.staging_bytes(experts, cpu_experts)
    return on_device, on_host, ", ".join(sorted(converted))


def _is_read(name: str, config: ModelConfig) -> bool:
    """Whether the model reads a tensor: not those of layers behind its own, which predict more tokens at once, nor keys
    and values of layers that have those of another."""
    found = re.match(r"blk\.(\d{1,6})\.(attn_[kv]\b)?", name)
    if not found:
        return True
    layer = int(found[1])
    return layer < config.num_layers and not (found[2] and config.layer_kv[layer] != layer)


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
