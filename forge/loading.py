"""`load` and `load_tokenizer`: from a name to an LLM. A model that does not fit is an error before weights are read."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from forge import backend as backends
from forge import hub, models
from forge.backend import Backend, compilers
from forge.backend.threads import THREADS
from forge.config import Dtype, EngineConfig, ModelConfig, Progress, check_integer
from forge.display import Stopwatch, watched
from forge.engine import Engine, ModelRunner
from forge.errors import FormatError, OutOfMemoryError, ParameterError
from forge.formats import gguf
from forge.keywords import keywords
from forge.llm import LLM
from forge.runtime.encoder import PromptEncoder, choose_template
from forge.state import budget
from forge.state.model_state import ModelState, kinds_of
from forge.state.paged_kv import PagedKV
from forge.tokenizer import Tokenizer
from forge.tokenizer.chat import ChatTemplate

_SHARED_TOKENS = 1 << 15
"""Positions in the KV cache where nobody says how many sequences are to have their whole context: 64 of 512 tokens."""
_REMARKABLE_BYTES = 10**9
"""A KV cache that takes so much of a GPU is remarked on."""
_MAX_SEQUENCES = 64
"""Most sequences that run together where nobody says how many."""
_CPU_PREFILL_TOKENS = 64
"""Prompt tokens of a step beside others that decode, where nobody says how many. By benchmarks/mixed_steps.py, with
smollm2 and 8 that decode, such a step takes 2.3 times as long as one without (with 256 tokens 6.3 times), and prompts
cost a twentieth more than in steps of 256. In steps of 32 they cost a quarter more. A GPU's step of 512 tokens takes
milliseconds."""
_MAX_THREADS = 1024
_STEP_BYTES = 256 << 20
"""Memory for a step's activations: a model with very wide layers computes fewer tokens at a time."""


@keywords()
def load(
    model: str | os.PathLike[str] = hub.DEFAULT_MODEL,
    *,
    device: str = "auto",
    context: int | None = None,
    memory_fraction: float | None = None,
    dtype: Dtype | None = None,
    max_sequences: int | None = None,
    threads: int | None = None,
    chat_template: str | os.PathLike[str] | None = None,
    graphs: bool | int | None = None,
    engine: EngineConfig | None = None,
    progress: Progress | bool | None = None,
) -> LLM:
    """Load a model.

    `context`, `memory_fraction`, `dtype`, `max_sequences` and `graphs` are fields of `EngineConfig`: None = the field
    of `engine`.

    Args:
        model: A name (`forge pull --help` lists them), a path, `hf:owner/repo[:QUANT]`,
            `hf:owner/repo[@revision]/file.gguf`, or an address of the Hugging Face Hub.
        device: "auto", "cpu", "hip", "cuda", or "hip:1" for the second GPU.
        context: Most tokens of one sequence, prompt and completion. By default the model's, cut to what fits.
        memory_fraction: Share of the free memory that weights and KV cache may take. By default 0.9.
        dtype: Precision of matrix inputs, "f32" or "f16". By default what the device does best.
        max_sequences: Most sequences that run together, each with room for its whole context as far as memory goes;
            further ones wait. By default up to 64 that share room for one whole context, or 32,768 tokens if that is
            more: if they need more together, the youngest wait. Layers with a window then have room for as many whole
            contexts, and for more while they take no more memory than the other layers.
        threads: Threads of the CPU, for NumPy's matrix products and for loading. They are one number for the whole
            process: the last load's. None = as many as this process may use cores, less those that other processes
            keep busy, looked at once a second.
        chat_template: The name of one of the model's templates, or a Jinja file to use instead.
        graphs: Whether decode steps on a GPU are replayed as graphs. N = yes, and every Nth replay is compared with its
            launches: from a difference on there are no graphs. By default as the variable FORGE_GRAPHS says: 0, 1,
            check:N.
        engine: All settings of the engine, those without a keyword too. A keyword beside it sets a field that it leaves
            at its default.
        progress: Called with a stage, how much of it is done, and its total or None. None = bars on a terminal and in
            a notebook; False = no progress.

    Raises:
        ForgeError: A child of it names what is wrong: an unknown name, a damaged file, too little memory.
    """
    shortcuts = {"context": context, "memory_fraction": memory_fraction, "dtype": dtype}
    settings = _settings(engine, shortcuts | {"max_sequences": max_sequences, "graphs": graphs})
    graphs = _graphs() if settings.graphs is None else settings.graphs  # before anything is fetched
    check_integer("threads", threads, 1, _MAX_THREADS, optional=True)
    watch = Stopwatch()
    backend = backends.select(device)
    watch.lap("device")
    if settings.dtype == "f32" and backend.is_gpu:
        raise ParameterError(
            f"dtype f32 is for the CPU: {backend.device} computes in f16",
            parameter="dtype",
            hint='use dtype="f16", or device="cpu" for f32',
        )
    if chat_template is not None and not isinstance(chat_template, str | os.PathLike):
        raise ParameterError(
            f"chat_template must be a name or a path, not a {type(chat_template).__name__}", parameter="chat_template"
        )
    THREADS.use(None if threads is None else int(threads))  # NumPy's integers too
    with watched(progress) as report:
        path = _resolve(model, report)
        watch.lap("file")
        started = time.perf_counter()
        running, tokenizer, template, notes = _assembled(path, settings, graphs, backend, chat_template, report, watch)
    if untested := compilers.untested(backend.arch):
        notes = (f"device: {untested}", *notes)
    if settings.dtype == "f16" and not backend.is_gpu:
        notes = (f"dtype: {backend.device} computes in float32; f16 is for GPUs", *notes)
    if device == "auto":
        notes = (f"device: {backend.device}; auto: {backends.explain()}", *notes)
    load_ms = 1000 * (time.perf_counter() - started)
    return LLM(running, tokenizer, template, path=path, notes=notes, load_parts=watch.parts, load_ms=load_ms)


def _assembled(
    path: Path,
    settings: EngineConfig,
    graphs: bool | int,
    backend: Backend,
    chat_template: str | os.PathLike[str] | None,
    report: Progress | None,
    watch: Stopwatch,
) -> tuple[Engine, Tokenizer, ChatTemplate | None, tuple[str, ...]]:
    """The parts of an LLM from a file, ready to run, and remarks on what was decided for them."""
    with gguf.read(path) as file:
        plan = plan_memory(file, settings, backend, is_shared=settings.max_sequences is None)
        config = models.read_config(file, plan.context)
        watch.lap("header")
        tokenizer = Tokenizer.from_metadata(file.metadata, source=str(path))
        if tokenizer.vocab_size != config.vocab_size:
            raise FormatError(
                f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding {config.vocab_size} rows"
            )
        template = choose_template(chat_template, tokenizer, str(path))
        watch.lap("tokenizer")
        decoder = models.build(file, config, backend, report, is_deterministic=settings.deterministic)
    watch.lap("weights")
    runner = build_runner(decoder, plan, settings, backend, graphs)
    engine = Engine(
        runner,
        end_ids=tokenizer.eog_ids,
        max_step_tokens=plan.max_step_tokens,
        max_prefill_tokens=settings.max_prefill_tokens or (None if backend.is_gpu else _CPU_PREFILL_TOKENS),
        prefix_caching=settings.prefix_caching,
    )
    watch.lap("KV cache")
    engine.warm_up(report, watch.lap)
    return engine, tokenizer, template, plan.notes


@keywords()
def load_tokenizer(model: str | os.PathLike[str], *, progress: Progress | bool | None = None) -> Tokenizer:
    """The tokenizer of a model alone.

    Args:
        model: As in `load`. A GGUF file may hold no tensors.
        progress: As in `load`.

    Raises:
        ForgeError: A child of it names what is wrong: an unknown name, a damaged file, an unknown kind of tokenizer.
    """
    with watched(progress) as report:
        path = _resolve(model, report)
    with gguf.read(path) as file:
        return Tokenizer.from_metadata(file.metadata, source=str(path))


def load_encoder(path: Path, name: str, chat_template: str | os.PathLike[str] | None = None) -> PromptEncoder:
    """What turns prompts and conversations into ids, without the model. Its context is the file's own.

    path: A GGUF file. name: The model's, in errors about a prompt. chat_template: As in `load`.
    """
    with gguf.read(path) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata, source=str(path))
        context = models.read_config(file, None).context_length
    return PromptEncoder(tokenizer, choose_template(chat_template, tokenizer, name), context, name)


def _settings(engine: EngineConfig | None, given: Mapping[str, Any]) -> EngineConfig:
    """The settings of an engine, with the keywords of `load` that are not None."""
    if engine is not None and not isinstance(engine, EngineConfig):
        raise ParameterError(f"engine must be an EngineConfig, not a {type(engine).__name__}", parameter="engine")
    default = EngineConfig()
    settings = replace(engine or default, **{name: value for name, value in given.items() if value is not None})
    for name in given if engine is not None else ():
        chosen, found = getattr(engine, name), getattr(settings, name)
        if chosen not in (getattr(default, name), found):
            raise ParameterError(
                f"{name} is {found} as a keyword and {chosen} in engine", parameter=name, hint="give one of them"
            )
    return settings


def _graphs() -> bool | int:
    """What FORGE_GRAPHS asks for. Raises ParameterError for another value."""
    value = os.environ.get("FORGE_GRAPHS") or "1"
    if value in ("0", "1"):
        return value == "1"
    if match := re.fullmatch(r"check:([1-9][0-9]{0,8})", value):
        return int(match[1])
    raise ParameterError(
        f"FORGE_GRAPHS must be 0 (kernels are launched one by one), 1, or check:N (every Nth replay is compared), "
        f"not {value!r:.60}",
        parameter="graphs",
    )


def build_runner(
    decoder: models.Decoder, plan: Plan, settings: EngineConfig, backend: Backend, graphs: bool | int = True
) -> ModelRunner:
    """What runs a model's steps on a backend, with memory for the sequences that the plan has room for."""
    return ModelRunner(
        decoder,
        ModelState(plan.kinds, plan.num_pages, settings.page_size, backend),
        backend,
        context=plan.context,
        max_sequences=settings.max_sequences or _MAX_SEQUENCES,
        graphs=graphs,
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of what beside the weights takes memory."""

    context: int
    """Most tokens of one sequence."""
    max_step_tokens: int
    kinds: tuple[PagedKV, ...]
    """Kinds of layer state."""
    num_pages: tuple[int, ...]
    """Pages of each kind for all sequences, without the spare one."""
    notes: tuple[str, ...]


def plan_memory(file: gguf.GGUF, settings: EngineConfig, backend: Backend, *, is_shared: bool = True) -> Plan:
    """What fits beside the weights. Raises OutOfMemoryError with the bytes needed and free, and what to change.

    is_shared: nobody asked for room for so many sequences. One whole context is kept, and what others leave of a GPU's
    memory is left to them: a desktop, another model.
    """
    config = models.read_config(file, settings.context)
    free = int(backend.free_bytes() * settings.memory_fraction)
    weights, converted = _weight_bytes(file, backend)
    if weights > free:
        raise OutOfMemoryError(
            f"{file.path}: the weights need {_gb(weights)}{'' if backend.is_gpu else ' as float32'} and "
            f"{_gb(free)} may be taken, {settings.memory_fraction:g} of what is free on {backend.device}",
            parameter="memory_fraction",
            hint="free some memory, use a smaller model, or a larger memory_fraction",
        )
    size, itemsize = settings.page_size, backend.dtype.itemsize
    wanted = settings.context or config.context_length
    room = max(free - weights, 0)
    kinds = state_kinds(config, settings, wanted, itemsize)
    context = min(wanted, budget.longest_context(kinds, wanted, size, room))
    notes: tuple[str, ...] = ()
    if converted:
        notes = (f"weights: types without a kernel become float16 and take {_gb(weights)} in all: {converted}",)
    if wanted > config.context_length:
        notes += (f"context: {wanted} is longer than the {config.context_length} tokens the model was trained for",)
    if context < wanted:
        need = _gb(budget.bytes_of(kinds, budget.pages_of(kinds, wanted)))
        if settings.context is not None or context < 1:
            if context < 1:
                raise OutOfMemoryError(f"{file.path}: no memory is left beside the weights")
            raise OutOfMemoryError(
                f"{file.path}: a context of {wanted} needs {need} of KV cache and {_gb(room)} are left beside the "
                "weights",
                parameter="context",
                hint=f"use context={context}",
            )
        notes += (f"context: {context} of the model's {wanted} tokens, cut to fit {_gb(room)} of KV cache",)
    kinds = state_kinds(config, settings, context, itemsize)
    shared_pages = _SHARED_TOKENS // size if is_shared else None
    num_pages = budget.share_out(kinds, context, room, settings.max_sequences or _MAX_SEQUENCES, shared_pages)
    if (backend.is_gpu and budget.bytes_of(kinds, num_pages) >= _REMARKABLE_BYTES) or len(kinds) > 1:
        notes += (_cache_note(kinds, num_pages, context, size),)
    return Plan(context, _max_step_tokens(config, settings), kinds, num_pages, notes)


def state_kinds(config: ModelConfig, settings: EngineConfig, context: int, itemsize: int) -> tuple[PagedKV, ...]:
    """The kinds of layer state of a model in an engine with sequences of `context` tokens."""
    step_tokens = max(_max_step_tokens(config, settings), settings.max_sequences or _MAX_SEQUENCES)
    size = settings.page_size
    return kinds_of(config, context=context, page_size=size, step_tokens=step_tokens, itemsize=itemsize)


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


def _weight_bytes(file: gguf.GGUF, backend: Backend) -> tuple[int, str]:
    """Bytes that the weights take on a backend, and which types are converted to float16 for lack of a kernel."""
    if not backend.is_gpu:
        return 4 * sum(prod(info.shape) for info in file.tensors.values()), ""
    total = 0
    converted: set[str] = set()
    for info in file.tensors.values():
        kept = models.kept_type(info.type)
        if len(info.shape) != 2:
            total += 4 * prod(info.shape)
        elif kept is info.type:
            total += info.nbytes
        else:
            total += 2 * prod(info.shape)
            converted |= {info.type.name} - {"F32", "BF16"}
    return total, ", ".join(sorted(converted))


def _max_step_tokens(config: ModelConfig, settings: EngineConfig) -> int:
    """Most tokens of a step whose activations fit. A layer needs the most for a product's output beside its input and
    a temporary, in float32."""
    attention = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    token_bytes = 4 * 3 * max(2 * config.ffn_width, attention, config.width)
    return min(settings.max_step_tokens, max(_STEP_BYTES // token_bytes, 1))


def _resolve(model: str | os.PathLike[str], progress: Progress | None) -> Path:
    if not isinstance(model, str | os.PathLike):
        raise ParameterError(f"model must be a name or a path, not {model!r:.60}", parameter="model")
    return hub.resolve(model if isinstance(model, str) else Path(model), progress=progress)


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
