"""Options that several commands share, and their values' meaning."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forge.cli import output, parts
from forge.errors import ForgeError, ParameterError

if TYPE_CHECKING:
    from pathlib import Path

    from forge.llm import LLM

DEFAULT_MODEL = "smollm2"  # equals forge.hub's, which is too slow to import for --help; a test compares them
DEFAULT_MEMORY_FRACTION = 0.9  # equals EngineConfig's; a test compares them


def _models(incomplete: str) -> list[str]:
    """The shell's completions of a model: known names, cached ones, files, directories."""
    import glob

    from forge import hub

    start = os.path.expanduser(incomplete)
    paths = [path + "/" if os.path.isdir(path) else path for path in glob.glob(f"{glob.escape(start)}*")]
    known = dict.fromkeys((*hub.MODELS, *(item.name for item in hub.stored() if item.state == "complete")))
    names = [name for name in known if name.startswith(incomplete)]
    return names + sorted(incomplete + path[len(start) :] for path in paths if path.endswith(("/", ".gguf")))


Model = Annotated[
    str,
    typer.Option(
        "-m",
        "--model",
        metavar="MODEL",
        envvar="FORGE_MODEL",
        help="A name, a GGUF file, a model's directory, or hf:owner/repo[:QUANT].",
        autocompletion=_models,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        envvar="FORGE_DEVICE",
        help="auto, cpu, hip, cuda, hip:N or cuda:N.",
        autocompletion=lambda: ["auto", "cpu", "hip", "cuda"],
    ),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        "--chat-template", metavar="FILE|NAME", help="A Jinja template, or one of the model's several by its name."
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option("--adapter", metavar="[NAME=]PATH", help="A LoRA adapter of the model: a GGUF file or a directory."),
]
Timings = Annotated[bool, typer.Option("--timings", help="Show the parts of the time to the first token.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _option(kind: Any, metavar: str, help: str) -> Any:
    return Annotated[kind, typer.Option(metavar=metavar, help=help)]


_Option = tuple[Any, Any]
"""The annotation of a parameter, from which typer makes an option, and its default."""
_SAMPLING: dict[str, _Option] = {
    "max_tokens": (_option(int, "N", "Most tokens to generate."), 256),
    "temperature": (_option(float, "T", "0 takes the most probable token each time."), 0.0),
    "top_k": (_option(int, "K", "Draw from the K most probable tokens; 0 = all."), 0),
    "top_p": (_option(float, "P", "Draw from the most probable tokens that reach P together."), 1.0),
    "min_p": (_option(float, "P", "Draw from tokens at least P times as probable as the best."), 0.0),
    "repetition_penalty": (_option(float, "R", "Above 1: make tokens seen before less probable."), 1.0),
    "presence_penalty": (_option(float, "P", "Above 0: make generated tokens less probable."), 0.0),
    "frequency_penalty": (_option(float, "P", "Above 0: make tokens less probable with each occurrence."), 0.0),
    "seed": (_option(int | None, "S", "Same seed, same text. [default: a new one each time]"), None),
    "stop": (_option(list[str], "TEXT", "End before this text; may be given several times."), ()),
    "logprobs": (_option(int | None, "N", "Show each token's log probability, and N alternatives to it."), None),
}
"""Options for fields of SamplingParams."""
_LOADING: dict[str, _Option] = {
    "device": (Device, "auto"),
    "threads": (_option(int | None, "N", "Threads of the CPU. [default: cores that nobody else keeps busy]"), None),
    "context": (_option(int | None, "N", "Most tokens of prompt and answer. [default: the model's]"), None),
    "memory_fraction": (
        _option(float, "F", "Share of the free memory for weights and KV cache, at most."),
        DEFAULT_MEMORY_FRACTION,
    ),
    "quantize": (_option(str | None, "TYPE", "Quantize the weights while they are loaded: Q8_0, Q4_K_M, ..."), None),
    "cpu_experts": (_option(int, "N", "Leave the experts of the first N layers in the host's memory."), 0),
}
"""Options for arguments of `forge.load`."""
_SERVING: dict[str, _Option] = {
    "max_queue": (_option(int, "N", "Most answers that wait; requests beyond them get status 429."), 256),
    "allowed_hosts": (_option(list[str], "NAME", "Name by which clients may call the server, too; several."), ()),
    "cors_origins": (_option(list[str], "URL", "Site whose pages may call the server, or *; several."), ()),
    "max_n": (_option(int, "N", "Largest n of a request."), 16),
    "max_stop": (_option(int, "N", "Most stop texts of a request."), 16),
    "max_logit_bias": (_option(int, "N", "Most entries of logit_bias."), 1024),
    "max_prompts": (_option(int, "N", "Most prompts of a request."), 64),
    "max_inputs": (_option(int, "N", "Most inputs of a request for embeddings."), 2048),
    "max_body_bytes": (_option(int, "BYTES", "Largest body of a request."), 8 << 20),
    "max_json_depth": (_option(int, "N", "Deepest nesting of a body."), 64),
    "header_seconds": (_option(float, "S", "A connection that sends no header for so long is closed."), 10.0),
    "body_seconds": (_option(float, "S", "Longest time for a request's body."), 60.0),
    "idle_seconds": (_option(float, "S", "A connection is kept for so long between requests."), 5.0),
    "send_seconds": (_option(float, "S", "A client that reads nothing for so long has left."), 60.0),
    "request_seconds": (_option(float | None, "S", "Longest time for a request's answers. [default: any]"), None),
    "shutdown_seconds": (_option(float, "S", "Longest time for open answers when the server ends."), 30.0),
    "log_prompts": (Annotated[bool, typer.Option("--log-prompts", help="Log prompts and answers, too.")], False),
}
"""Options for fields of ServerSettings."""
_GROUPS = {"sampling": _SAMPLING, "loading": _LOADING, "serving": _SERVING}


def takes_groups(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace the keywords `sampling` and `loading` of a command by options. Each keyword receives their values.

    Options that the command declares itself are left out. `defaults` replaces some of the defaults.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        groups = {group: _GROUPS[group].keys() - own.keys() for group in own.keys() & _GROUPS.keys()}
        parameters: list[inspect.Parameter] = []
        for name, parameter in own.items():
            if name not in groups:
                parameters.append(parameter)
                continue
            for one, (annotation, default) in _GROUPS[name].items():
                if one in groups[name]:
                    chosen = defaults.get(one, default)
                    parameters.append(parameter.replace(name=one, annotation=annotation, default=chosen))

        @wraps(command)
        def run(**values: Any) -> None:
            given = {group: {name: values.pop(name) for name in names} for group, names in groups.items()}
            command(**values, **given)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def text_or_stdin(text: str, name: str) -> str:
    """An argument, or the text on stdin if it is "-". Raises ParameterError for bytes that are not UTF-8."""
    if text == "-":
        return output.read_text("-")
    check_text(text, name)
    return text


def check_text(text: str, name: str) -> None:
    """Raises ParameterError for a text that holds bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        message = f"{name} is not UTF-8 text"
        raise ParameterError(message, parameter=name.lower(), hint="check the terminal's encoding") from None


def adapters_of(given: list[str]) -> dict[str, str]:
    """The adapters that --adapter [NAME=]PATH names. Without a name it is the file's or the directory's."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals:
            name, path = os.path.basename(os.path.normpath(text)).removesuffix(".gguf"), text
        if not name or not path or name in found:
            problem = f"{name!r:.100} is there twice" if name in found else f"{text!r:.100} is no NAME=PATH"
            raise ParameterError(f"adapter: {problem}", parameter="adapter")
        found[name] = path
    return found


def chosen_adapter(llm: LLM) -> str | None:
    """The adapter of a command that takes one: each of its answers has it."""
    return next(iter(llm.adapters), None)


def resolve(model: str) -> Path:
    """Path of a model's file. A known model is fetched if the cache lacks it."""
    from forge import hub

    with output.ProgressDisplay() as progress:
        return hub.resolve(model, progress=progress)


@contextmanager
def loaded(model: str, *, max_sequences: int | None = 1, **settings: Any) -> Iterator[LLM]:
    """A model, ready to run. `settings` go to `forge.load`. Its notes are printed on stderr."""
    import forge

    with output.ProgressDisplay() as progress:
        llm = forge.load(model, max_sequences=max_sequences, progress=progress, **settings)
    imports = 1000 * parts.seconds_of_process() - sum(llm.load_parts.values())  # `forge.load` imports before it begins
    llm.load_parts = {"imports": imports, **llm.load_parts}
    # If stderr is no terminal, a failure is one line there, so notes wait for success.
    is_watched = output.is_terminal(sys.stderr)
    with llm:
        if is_watched:
            _remark(llm)
        yield llm
    if not is_watched:
        _remark(llm)


def check_finish(reason: str | None, llm: LLM) -> None:
    """Raises NumericsError for a completion that ended with an error."""
    from forge.errors import NumericsError

    if reason == "error":
        raise NumericsError(f"{llm.path}: the logits are not finite: the file is damaged; check or replace it")


def _remark(llm: LLM) -> None:
    for remark in llm.notes:
        if "; auto: " not in remark:
            output.note(remark)
        elif not output.quiet and is_news(remark):
            device, _, why = remark.partition("; auto: ")
            is_bare = "without CuPy" in why  # any other reason is a fault, and is printed with its cause
            output.note(f"{device}; no GPU that forge can use: see forge doctor" if is_bare else remark)


def is_news(remark: str) -> bool:
    """Whether a note on the device differs from the last one, which the cache directory keeps."""
    from forge import _files

    try:
        path = _files.cache_dir() / "device-note.txt"
        if _files.read(path, 1 << 16) == remark.encode():
            return False
    except (OSError, ValueError):
        pass
    except ForgeError:
        return True
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        _files.replace(path, remark.encode())
    return True
