"""The process that renders chat templates. `forge.tokenizer.chat` starts this file by its path, isolated (`-I -S`).

It imports the standard library and jinja2 alone, from the directories given as arguments. A request on stdin is eight
bytes of length (big-endian) and JSON; a reply on stdout is one byte of status, eight of length, and UTF-8 text:
T = the rendered text, R = the template refuses the messages, E = an error of the template, M = too much memory,
O = too much output. The text of R and E is the reason.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any

if __name__ == "__main__":
    sys.path.extend(sys.argv[1:])

# Imported now, because jinja2 and Python import them late, and after `_lock_down` no file can be opened.
import encodings.ascii
import encodings.latin_1
import encodings.unicode_escape  # noqa: F401
import html  # noqa: F401
import pprint  # noqa: F401
import textwrap  # noqa: F401
import unicodedata  # noqa: F401

import jinja2
import jinja2.debug
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class Refusal(Exception):
    """The template called raise_exception."""


class OutputLimit(Exception):
    """The rendered text is longer than allowed."""


class SafeDict:
    """`dict` for templates. The type itself would hand out unbound mutators such as dict.update."""

    fromkeys = staticmethod(dict.fromkeys)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class SafeNamespace(Namespace):
    """`namespace` for templates, without the names with underscores by which Python and jinja2 find protocols."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold the name {name!r}")
        super().__setitem__(name, value)


def namespace(*args: Any, **kwargs: Any) -> SafeNamespace:
    space = SafeNamespace()
    for name, value in dict(*args, **kwargs).items():
        space[name] = value
    return space


def raise_exception(message: Any = "no reason given") -> None:
    raise Refusal(str(message))


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter of transformers. jinja2's own escapes HTML and sorts keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text for training. It renders as its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, LoopControlExtension]
    )
    environment.filters["tojson"] = tojson
    helpers: list[Callable[..., Any]] = [raise_exception, strftime_now, namespace]
    environment.globals.update({helper.__name__: helper for helper in helpers}, dict=SafeDict())
    return environment


ENVIRONMENT = _environment()


@lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    return ENVIRONMENT.from_string(source)


def render(source: str, context: dict[str, Any], max_chars: int) -> str:
    chunks: list[str] = []
    for chunk in compiled(source).generate(context):
        max_chars -= len(chunk)
        if max_chars < 0:
            raise OutputLimit
        chunks.append(chunk)
    return "".join(chunks)


def set_limits(seconds: int, memory_bytes: int) -> None:
    """Set soft limits of the next rendering. The parent keeps the time; these hold if the parent is gone."""
    for kind, value in (
        (resource.RLIMIT_CPU, int(time.process_time()) + seconds + 1),
        (resource.RLIMIT_AS, memory_bytes),
    ):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def answer(request: bytes) -> tuple[bytes, bytes]:
    """(status, text) of one request."""
    try:
        job = json.loads(request)
        set_limits(job["seconds"], job["memory_bytes"])
        return b"T", render(job["source"], job["context"], job["max_chars"]).encode()
    except MemoryError:
        return b"M", b""
    except OutputLimit:
        return b"O", b""
    except Refusal as error:
        return b"R", _encoded(str(error))
    except RecursionError:
        return b"E", b"it nests or calls itself too deeply"
    except jinja2.TemplateSyntaxError as error:
        return b"E", _encoded(f"line {error.lineno}: {error.message}")
    except UnicodeEncodeError:
        return b"E", b"its output is not valid Unicode text"
    except Exception as error:
        what = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
        return b"E", _encoded(f"line {_line(error)}: {what}")


def _encoded(text: str) -> bytes:
    return text[:1000].encode(errors="replace")


def _line(error: Exception) -> int:
    """The line of the template that was running, from jinja2's traceback. 0 if there is none."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _lock_down() -> None:
    """Deny files, processes and core dumps, in case a template escapes from the sandbox."""
    time.tzset()  # strftime_now needs the file of the time zone
    for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(kind, (0, 0))


def main() -> None:
    """Serve requests until stdin ends. It ends with the parent, even if the parent is killed."""
    # The protocol alone has the pipes: a stray print is dropped.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    _lock_down()
    status, text = b"T", b"ready"
    while True:
        replies.write(status + len(text).to_bytes(8, "big") + text)
        replies.flush()
        header = requests.read(8)
        if len(header) < 8:
            return
        status, text = answer(requests.read(int.from_bytes(header, "big")))


if __name__ == "__main__":
    main()
