"""`load` and `load_tokenizer`: from a name to an LLM. A model that does not fit is an error before weights are read."""

from __future__ import annotations

import gc
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from forge import _files, hub, models
from forge import backend as backends
from forge.backend import Backend, compilers
from forge.backend.threads import THREADS
from forge.checkpoints import open_checkpoint
from forge.checkpoints.adapters import check_adapters, read_adapter
from forge.checkpoints.recipes import check_recipe
from forge.checkpoints.retyped import quantized
from forge.config import Dtype, EngineConfig, Progress
from forge.display import Stopwatch, watched
from forge.engine import Engine, ModelRunner
from forge.engine.step_budget import StepBudget
from forge.errors import FormatError, OutOfMemoryError, ParameterError, drop_frames
from forge.keywords import check_integer, keywords
from forge.llm import LLM
from forge.planning import Plan, layers_text, make_plan
from forge.runtime import process
from forge.runtime.encoder import PromptEncoder, choose_template
from forge.state.model_state import ModelState
from forge.tokenizer import Tokenizer

_CPU_PREFILL_TOKENS = 64
"""Prompt tokens of a step beside others that decode, where nobody says how many. By benchmarks/mixed_steps.py, with
smollm2 and 8 that decode, such a step takes 2.3 times as long as one without (with 256 tokens 6.3 times), and prompts
cost a twentieth more than in steps of 256. In steps of 32 they cost a quarter more. On a GPU it is measured."""
_MAX_THREADS = 1024


@keywords()
def load(
    model: str | os.PathLike[str] = hub.DEFAULT_MODEL,
    *,
    device: str = "auto",
    context: int | None = None,
    memory_fraction: float | None = None,
    cpu_experts: int | None = None,
    dtype: Dtype | None = None,
    max_sequences: int | None = None,
    threads: int | None = None,
    chat_template: str | os.PathLike[str] | None = None,
    graphs: bool | int | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    quantize: str | None = None,
    engine: EngineConfig | None = None,
    progress: Progress | bool | None = None,
) -> LLM:
    """Load a model.

    `context`, `memory_fraction`, `cpu_experts`, `dtype`, `max_sequences` and `graphs` are fields of `EngineConfig`:
    None = the field of `engine`.

    Args:
        model: A name (`forge pull --help` lists them), the path of a file or of a model's directory,
            `hf:owner/repo[:QUANT]`, `hf:owner/repo[@revision]/file.gguf`, or an address of the Hugging Face Hub.
        device: "auto", "cpu", "hip", "cuda", or "hip:1" for the second GPU.
        context: Most tokens of one sequence, prompt and completion. By default the model's, cut to what fits.
        memory_fraction: Share of the free memory that weights and KV cache may take. By default 0.9.
        cpu_experts: Layers, from the first on, whose experts stay in the host's memory: a GPU runs a mixture of experts
            that way which does not fit its own. What that costs is one of `LLM.notes`. By default 0.
        dtype: Precision of matrix inputs, "f32" or "f16". By default what the device does best.
        max_sequences: Most sequences that run together, each with room for its whole context as far as memory goes;
            further ones wait. By default up to 256 on a GPU and 64 on a CPU that share room for one whole context, or
            512 tokens for each if that is more: on a GPU as far as they take half of what the weights leave, down to
            32,768 tokens in all. If they need more together, the youngest wait. Layers with a window then have room for
            as many whole contexts, and for more while they take no more memory than the other layers.
        threads: Threads of the CPU, for NumPy's matrix products and for loading. They are one number for the whole
            process: the last load's. None = as many as this process may use cores, less those that other processes
            keep busy, looked at once a second.
        chat_template: The name of one of the model's templates, or a Jinja file to use instead.
        graphs: Whether decode steps on a GPU are replayed as graphs. N = yes, and every Nth replay is compared with its
            launches: from a difference on there are no graphs. By default as the variable FORGE_GRAPHS says: 0, 1,
            check:N.
        adapters: LoRA adapters of the model, from their names to their files: docs/adapters.md. A request chooses one
            by its name, and several may be in one batch. They stay beside the weights, which do not change.
        quantize: A type that the weights get while they are loaded, of a model that is not quantized: "Q8_0", "Q6_K",
            "Q4_K_M", ...; docs/quantization.md lists them, and what they cost.
        engine: All settings of the engine, those without a keyword too. A keyword beside it sets a field that it leaves
            at its default.
        progress: Called with a stage, how much of it is done, and its total or None. None = bars on a terminal and in
            a notebook; False = no progress.

    Raises:
        ForgeError: A child of it names what is wrong: an unknown name, a damaged file, too little memory.
    """
    shortcuts = {"context": context, "memory_fraction": memory_fraction, "cpu_experts": cpu_experts, "dtype": dtype}
    settings = settings_of(engine, shortcuts | {"max_sequences": max_sequences, "graphs": graphs})
    graphs = _graphs() if settings.graphs is None else settings.graphs  # before anything is fetched
    check_integer("threads", threads, 1, _MAX_THREADS, optional=True)
    watch = Stopwatch()
    backend = backends.select(device)
    watch.lap("device")
    check_settings(settings, chat_template, backend)
    named = check_adapters(adapters)
    quantize = None if quantize is None else check_recipe(quantize)
    THREADS.use(None if threads is None else int(threads))  # NumPy's integers too
    with watched(progress) as report:
        path = resolve(model, report)
        watch.lap("file")
        process.wait_for_closed()
        notes = (*_device_notes(device, settings, backend), *(f"memory: {text}" for text in loaded_text(backend)))
        with nothing_kept(backend):
            return _assembled(path, settings, graphs, backend, chat_template, named, quantize, notes, report, watch)


@contextmanager
def nothing_kept(backend: Backend) -> Iterator[None]:
    """An error within keeps no array, and the device's memory is given back. One of memory says what else is loaded."""
    outer = sys.exception()
    try:
        yield
    except BaseException as error:
        drop_frames(error, outer)
        gc.collect()  # parts of a model may refer to each other
        with suppress(Exception):  # the device may have failed, which the error says
            backend.release_memory()
        if isinstance(error, OutOfMemoryError):
            raise with_loaded(error, backend) from None
        raise


def with_loaded(error: OutOfMemoryError, backend: Backend) -> OutOfMemoryError:
    """The error, or one that says what else takes the device's memory."""
    for text in loaded_text(backend):
        hint = f"close it, or {error.hint}" if error.hint else "close it"
        return OutOfMemoryError(f"{error.args[0]}; {text}", parameter=error.parameter, hint=hint)
    return error


def loaded_text(backend: Backend) -> Iterator[str]:
    """A line on the models that this process has loaded to the same device, if there are any."""
    loops = [loop for loop in process.loaded() if loop.device == backend.device]
    if loops:
        names = ", ".join(f"{_files.model_name(Path(loop.name))} ({loop.nbytes / 1e9:.2f} GB)" for loop in loops)
        yield f"this process has loaded {names}, which LLM.close() gives back"


def check_settings(settings: EngineConfig, chat_template: object, backend: Backend) -> None:
    """Raises ParameterError for arguments of `load` that cannot be used on this backend, or at all."""
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


def _device_notes(device: str, settings: EngineConfig, backend: Backend) -> Iterator[str]:
    """Remarks on the device, and on a precision that it has not."""
    if device == "auto":
        yield f"device: {backend.device}; auto: {backends.explain()}"
    if settings.dtype == "f16" and not backend.is_gpu:
        yield f"dtype: {backend.device} computes in float32; f16 is for GPUs"
    if untested := compilers.untested(backend.arch):
        yield f"device: {untested}"


def _assembled(
    path: Path,
    settings: EngineConfig,
    graphs: bool | int,
    backend: Backend,
    chat_template: str | os.PathLike[str] | None,
    adapters: Mapping[str, Path],
    quantize: str | None,
    notes: tuple[str, ...],
    report: Progress | None,
    watch: Stopwatch,
) -> LLM:
    """An LLM of its parts, ready to run. notes: Those that come first."""
    started = time.perf_counter()
    with open_checkpoint(path) as stored:
        file = quantized(stored, quantize, backend) if quantize else stored
        read = [read_adapter(each, file) for each in adapters.values()]
        plan = make_plan(file, settings, backend, models.adapter_bytes(file, read, backend.dtype.itemsize))
        config = models.read_config(file, plan.context)
        watch.lap("header")
        tokenizer = Tokenizer.from_metadata(file.metadata, source=str(path))
        if tokenizer.vocab_size != config.vocab_size:
            raise FormatError(
                f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding {config.vocab_size} rows"
            )
        template = choose_template(chat_template, tokenizer, str(path))
        watch.lap("tokenizer")
        decoder = models.build(
            file,
            config,
            backend,
            report,
            is_deterministic=settings.deterministic,
            cpu_experts=settings.cpu_experts,
        )
        models.attach(decoder, read)
        known = models.fingerprints(file, config, dict(zip(adapters, read, strict=True)))
    watch.lap("weights")
    runner = build_runner(decoder, plan, settings, backend, graphs)
    try:
        is_measured = backend.is_asynchronous
        engine = Engine(
            runner,
            end_ids=tokenizer.eog_ids,
            max_step_tokens=plan.max_step_tokens,
            max_prefill_tokens=settings.max_prefill_tokens or (None if is_measured else _CPU_PREFILL_TOKENS),
            prefix_caching=settings.prefix_caching,
            budget=StepBudget(plan.max_step_tokens) if is_measured and settings.max_prefill_tokens is None else None,
        )
        watch.lap("KV cache")
        engine.warm_up(report, watch.lap)
        backend.reserve(plan.step_bytes)  # not before: the warm-up has given back what its largest step made
        return LLM(
            engine,
            tokenizer,
            template,
            path=path,
            notes=(*notes, *file.notes, *plan.notes, *_cost_of_host_experts(decoder)),
            load_parts=watch.parts,
            load_ms=1000 * (time.perf_counter() - started),
            adapters=tuple(adapters),
            quantize=quantize,
            nbytes=plan.device_bytes,
            fingerprints=known,
        )
    except BaseException:  # the error's traceback keeps functions, and what they refer to from outside of them
        with suppress(Exception):  # the device may have failed, which the error says
            runner.close()
        raise


def _cost_of_host_experts(decoder: models.Decoder) -> tuple[str, ...]:
    """A remark on the experts that stay in the host's memory, if any do."""
    layers = decoder.host_experts()
    if not layers:
        return ()
    rate = layers[0].token_bytes / layers[0].token_seconds()
    of_token, in_all = sum(layer.token_bytes for layer in layers), sum(layer.nbytes for layer in layers)
    return (
        f"cpu_experts: experts of {layers_text(len(layers))} take {in_all / 1e9:.2f} GB of the host's memory; a token "
        f"reads {of_token / 1e9:.3f} GB of them at {rate / 1e9:.1f} GB/s, so one sequence has at most "
        f"{rate / of_token:.1f} tokens/s",
    )


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
        path = resolve(model, report)
    with open_checkpoint(path) as file:
        return Tokenizer.from_metadata(file.metadata, source=str(path))


def load_encoder(path: Path, name: str, chat_template: str | os.PathLike[str] | None = None) -> PromptEncoder:
    """What turns prompts and conversations into ids, without the model. Its context is the file's own.

    path: A GGUF file. name: The model's, in errors about a prompt. chat_template: As in `load`.
    """
    with open_checkpoint(path) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata, source=str(path))
        context = models.read_config(file, None).context_length
    return PromptEncoder(tokenizer, choose_template(chat_template, tokenizer, name), context, name)


def settings_of(engine: EngineConfig | None, given: Mapping[str, Any]) -> EngineConfig:
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
        max_sequences=plan.max_sequences,
        graphs=graphs,
    )


def resolve(model: str | os.PathLike[str], progress: Progress | None) -> Path:
    """The file or directory of a model, fetched if need be. Raises ParameterError for what is no name."""
    if not isinstance(model, str | os.PathLike):
        raise ParameterError(f"model must be a name or a path, not {model!r:.60}", parameter="model")
    return hub.resolve(model if isinstance(model, str) else Path(model), progress=progress)
