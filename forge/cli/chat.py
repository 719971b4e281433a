"""`forge chat`: a conversation in the terminal, or one answer per line of stdin."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from forge.cli import options, output
from forge.cli.generate import statistics
from forge.errors import ForgeError

if TYPE_CHECKING:
    from forge.config import SamplingParams
    from forge.llm import LLM

_HELP = "/exit leaves, /reset forgets the conversation, /system TEXT sets the instructions; Ctrl-C aborts an answer"


def command(
    model: options.Model = options.DEFAULT_MODEL,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="Instructions. [default: the template's]")
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option("--chat-template", metavar="FILE", help="A Jinja template to use instead of the model's."),
    ] = None,
    max_tokens: options.MaxTokens = 1024,
    temperature: options.Temperature = 0.7,
    top_k: options.TopK = 0,
    top_p: options.TopP = 0.95,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    device: options.Device = "auto",
    context: options.Context = None,
    memory_fraction: options.MemoryFraction = options.DEFAULT_MEMORY_FRACTION,
) -> None:
    """Talk with a model. /help shows what can be said beside messages."""
    from forge.config import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or (),
    )
    with options.loaded(model, device, context, chat_template, memory_fraction=memory_fraction) as llm:
        Conversation(llm, params, system).run()


_LONGEST_LINE = 1 << 20


class Conversation:
    """Messages so far, and the loop that adds to them."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self.llm, self.params, self.system = llm, params, system
        self.messages: list[dict[str, str]] = []
        self.is_interactive = output.is_terminal(sys.stdin)

    def run(self) -> None:
        """Until the input ends. Raises ForgeError for what cannot be answered, unless a person can try again."""
        self.render_once()
        if self.is_interactive:
            output.status(_HELP)
        while (line := self.read()) is not None:
            try:
                if line.startswith("/"):
                    if not self.obey(*line.partition(" ")[::2]):
                        return
                elif line:
                    self.answer(line)
            except ForgeError as error:
                if not self.is_interactive:
                    raise
                output.note(str(error))

    def render_once(self) -> None:
        """Raises ForgeError now if the model has no template, or one that does not work."""
        self.llm.render_chat([{"role": "user", "content": "Hi"}])

    def read(self) -> str | None:
        """A line without the blanks around it; None at the end of the input."""
        try:
            if self.is_interactive and output.is_terminal(sys.stdout):
                import readline  # noqa: F401  (gives input() editing and history)

                return input("> ").strip()
            line = sys.stdin.readline(_LONGEST_LINE + 1) if sys.stdin else ""
        except EOFError:
            output.status("")
            return None
        except UnicodeDecodeError as error:
            raise ForgeError(f"standard input: is not UTF-8 text ({error.reason}): convert it") from None
        if len(line) > _LONGEST_LINE:
            raise ForgeError(f"standard input: a line is longer than {_LONGEST_LINE} characters: give shorter messages")
        return line.strip() if line else None

    def obey(self, order: str, text: str) -> bool:
        """Whether to go on."""
        if order == "/exit":
            return False
        if order == "/reset":
            self.messages.clear()
        elif order == "/system":
            self.system = text.strip() or None
        else:
            output.status(_HELP if order == "/help" else f"{order} is not known: {_HELP}")
        return True

    def answer(self, text: str) -> None:
        """Stream the answer to a message; Ctrl-C ends the answer, and what was said stays said."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        asked = [*self.messages, {"role": "user", "content": text}]
        said: list[str] = []
        timings = reason = None
        try:
            for chunk in self.llm.stream_chat(head + asked, self.params):
                said.append(chunk.text)
                output.write(chunk.text)
                timings, reason = chunk.timings, chunk.finish_reason
        except KeyboardInterrupt:
            if not self.is_interactive:
                raise
        output.write("\n")
        options.check_finish(reason, self.llm)
        self.messages = [*asked, {"role": "assistant", "content": "".join(said)}]
        if timings and self.is_interactive:
            output.status(statistics(timings))
