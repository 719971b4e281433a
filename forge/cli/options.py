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

from forge.cli import output
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
        help="A name, a GGUF file, or hf:owner/repo[:QUANT].",
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
Context = Annotated[
    int | None,
    typer.Option("--context", metavar="N", help="Most tokens of prompt and answer. [default: the model's]"),
]
MemoryFraction = Annotated[
    float,
    typer.Option("--memory-fraction", metavar="F", help="Share of the free memory for weights and KV cache, at most."),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", help="Threads of the CPU. [default: cores that nobody else keeps busy]"),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", metavar="N", help="Most tokens to generate.")]
Temperature = Annotated[
    float, typer.Option("--temperature", metavar="T", help="0 takes the most probable token each time.")
]
TopK = Annotated[int, typer.Option("--top-k", metavar="K", help="Draw from the K most probable tokens; 0 = all.")]
TopP = Annotated[
    float, typer.Option("--top-p", metavar="P", help="Draw from the most probable tokens that reach P together.")
]
MinP = Annotated[
    float, typer.Option("--min-p", metavar="P", help="Draw from tokens at least P times as probable as the best.")
]
RepetitionPenalty = Annotated[
    float,
    typer.Option("--repetition-penalty", metavar="R", help="Above 1: make tokens seen before less probable."),
]
PresencePenalty = Annotated[
    float,
    typer.Option("--presence-penalty", metavar="P", help="Above 0: make generated tokens less probable."),
]
FrequencyPenalty = Annotated[
    float,
    typer.Option(
        "--frequency-penalty",
        metavar="P",
        help="Above 0: make tokens less probable with each occurrence.",
    ),
]
Logprobs = Annotated[
    int | None,
    typer.Option("--logprobs", metavar="N", help="Show each token's log probability, and N alternatives to it."),
]
Seed = Annotated[
    int | None, typer.Option("--seed", metavar="S", help="Same seed, same text. [default: a new one each time]")
]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text; may be given several times.")
]
_SAMPLING: dict[str, tuple[Any, Any]] = {
    "max_tokens": (MaxTokens, 256),
    "temperature": (Temperature, 0.0),
    "top_k": (TopK, 0),
    "top_p": (TopP, 1.0),
    "min_p": (MinP, 0.0),
    "repetition_penalty": (RepetitionPenalty, 1.0),
    "presence_penalty": (PresencePenalty, 0.0),
    "frequency_penalty": (FrequencyPenalty, 0.0),
    "seed": (Seed, None),
    "stop": (Stop, None),
    "logprobs": (Logprobs, None),
}
"""Options for fields of SamplingParams, with their defaults."""


def takes_sampling(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace the keyword `sampling` of a command by the options of SamplingParams. It receives their values.

    Options that the command declares itself are left out. `defaults` replaces some of the defaults.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())
        names = [name for name in _SAMPLING if name not in {parameter.name for parameter in own}]
        place = next(i for i, parameter in enumerate(own) if parameter.name == "sampling")
        parameters = [
            *own[:place],
            *(
                inspect.Parameter(
                    *(name, inspect.Parameter.KEYWORD_ONLY),
                    annotation=_SAMPLING[name][0],
                    default=defaults.get(name, _SAMPLING[name][1]),
                )
                for name in names
            ),
            *own[place + 1 :],
        ]

        @wraps(command)
        def run(**values: Any) -> None:
            sampling = {name: values.pop(name) for name in names}
            command(**values, sampling=sampling | {"stop": sampling["stop"] or ()})

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


def resolve(model: str) -> Path:
    """Path of a model's file. A known model is fetched if the cache lacks it."""
    from forge import hub

    with output.ProgressDisplay() as progress:
        return hub.resolve(model, progress=progress)


@contextmanager
def loaded(
    model: str,
    device: str = "auto",
    context: int | None = None,
    chat_template: str | None = None,
    max_sequences: int | None = 1,
    memory_fraction: float = DEFAULT_MEMORY_FRACTION,
    threads: int | None = None,
) -> Iterator[LLM]:
    """A model, ready to run. Its notes are printed on stderr."""
    import forge

    with output.ProgressDisplay() as progress:
        llm = forge.load(
            model,
            device=device,
            context=context,
            chat_template=chat_template,
            max_sequences=max_sequences,
            memory_fraction=memory_fraction,
            threads=threads,
            progress=progress,
        )
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
        elif not output.is_quiet() and is_news(remark):
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
