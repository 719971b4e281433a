"""Names of models on the Hugging Face Hub: `hf:` names, addresses, and the choice of a repository's file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote, urlsplit

from forge.errors import ModelNotFoundError
from forge.hub import directories
from forge.hub.catalog import shown

DEFAULT_QUANTS = ("Q4_K_M", "Q8_0")
"""llama.cpp's choice, in this order, if no quantization is named."""

_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_STARTS = ("hf:", "http://", "https://", *(f"{host}/" for host in _HOSTS))
_MAX_CHARS = 1000
_MAX_LISTED = 12
_REPO = re.compile(r"([\w.-]+/[\w.-]+)(.*)", re.ASCII | re.DOTALL)
_QUANT = re.compile(r"[\w.-]+", re.ASCII)
_VERBS = ("blob", "resolve", "raw", "tree")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SPECIAL_REF = re.compile(r"(refs/(?:pr|convert)/[^/]+)/(.+)")
_SHARD = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", re.IGNORECASE)
_TAG = re.compile(r"[-.](\w+)$", re.ASCII)

Place = tuple[str | None, str | None]
"""A revision (None: the repository's main branch) and a file within it (None: the one that the quantization picks)."""


@dataclass(frozen=True, slots=True)
class Name:
    """A user's text and its possible meanings, in the order to try. Revisions and files may both hold slashes."""

    text: str
    repo: str
    places: tuple[Place, ...]
    quant: str | None = None


def is_hub_name(text: str) -> bool:
    """Whether a text is meant as a name or an address of the Hub."""
    return text.lower().startswith(_STARTS)


def parse(text: str) -> Name:
    """Parts of a name of the Hub. Raises ModelNotFoundError for a text of another form.

    `hf:owner/repo[@revision][:QUANT]`, `hf:owner/repo[@revision]/file.gguf` (`hf://` too), `hf.co/owner/repo[:QUANT]`,
    and pasted addresses of a repository or of a file in it. `%2F` is a slash of a revision.
    """
    if not text.isprintable():
        raise ModelNotFoundError(f"{shown(text)} holds control characters: write the name without them")
    if len(text) > _MAX_CHARS:
        raise ModelNotFoundError(f"{shown(text)} is no name of the Hub: it has more than {_MAX_CHARS} characters")
    name = _parse_name(text) if text.lower().startswith("hf:") else _parse_address(text)
    if not all(part is None or is_inside(part) for place in name.places for part in place):
        raise _malformed(text)
    return name


def is_gguf(file: str) -> bool:
    """Whether a file has a name of GGUF files."""
    return file.lower().endswith(".gguf")


def is_file(file: str) -> bool:
    """Whether a file has a name of those that a name of the Hub can end with."""
    return is_gguf(file) or directories.is_graph(file)


def is_inside(path: str) -> bool:
    """Whether a path that is not trusted stays below the directory it is appended to, and is printable."""
    return path.isprintable() and "\\" not in path and not {"", ".", ".."}.intersection(path.split("/"))


def _parse_name(text: str) -> Name:
    match = _REPO.fullmatch(text[3:].lstrip("/").removesuffix("/"))
    if not match:
        raise _malformed(text)
    repo, rest = match.groups()
    kind, rest = rest[:1], rest[1:]
    if kind == "/":
        return Name(text, repo, ((None, _file(text, rest)),))
    if kind == "@" and is_file(rest):
        return Name(text, repo, _splits(text, rest.split("/")))
    if kind == "@":
        revision, colon, quant = rest.partition(":")
        return _chosen(text, repo, unquote(revision), quant if colon else None)
    if kind not in ("", ":"):  # without the left-out part it would name another repository
        raise _malformed(text)
    return _chosen(text, repo, None, rest if kind else None)


def _parse_address(text: str) -> Name:
    path, query = _path(text)
    segments = path.strip("/").split("/")
    match = _REPO.fullmatch(unquote("/".join(segments[:2])))
    if not match or segments[0] in ("datasets", "spaces", "api"):
        raise _malformed(text)
    (repo, rest), tail = match.groups(), segments[3:]
    verb = segments[2] if len(segments) > 2 else ""
    shown_file = parse_qs(query).get("show_file_info")
    if rest and (not rest.startswith(":") or verb):
        raise _malformed(text)
    if shown_file and verb in ("", "tree"):
        return Name(text, repo, (("/".join(map(unquote, tail)) or None, _file(text, shown_file[0])),))
    if not verb:
        return _chosen(text, repo, None, rest[1:] if rest else None)
    if verb not in _VERBS:
        return Name(text, repo, ((None, _file(text, unquote("/".join(segments[2:])))),))
    if not tail:
        raise _malformed(text)
    if verb == "tree" and not is_file(tail[-1]):
        return _chosen(text, repo, "/".join(map(unquote, tail)), None)
    return Name(text, repo, _splits(text, [tail[0], *map(unquote, tail[1:])]))


def _path(text: str) -> tuple[str, str]:
    """Path and query of an address on the Hub, or on the user's endpoint."""
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    if endpoint and text.startswith(f"{endpoint}/"):
        text = f"https://{_HOSTS[0]}{text.removeprefix(endpoint)}"
    try:
        parts = urlsplit(text if "://" in text else f"https://{text}")
        known = parts.hostname in _HOSTS
    except ValueError:
        raise _malformed(text) from None
    if not known:
        raise ModelNotFoundError(
            f"{shown(text)} is no address of the Hugging Face Hub", hint="download the file and pass its path"
        )
    return parts.path, parts.query


def _splits(text: str, segments: list[str]) -> tuple[Place, ...]:
    """All ways to cut `revision/file`: the revision is the first segment, or the first ones."""
    _file(text, segments[-1])
    special = _SPECIAL_REF.fullmatch("/".join(segments))
    if special:
        return ((special[1], special[2]),)
    first = unquote(segments[0])
    if first != segments[0] or first == "main" or _COMMIT.fullmatch(first):
        return ((first, "/".join(segments[1:])),)
    return tuple(("/".join(segments[:n]), "/".join(segments[n:])) for n in range(1, len(segments))) or (("", ""),)


def _chosen(text: str, repo: str, revision: str | None, quant: str | None) -> Name:
    if quant is not None and not _QUANT.fullmatch(quant):
        raise _malformed(text)
    if quant and is_gguf(quant):  # ollama's form
        return Name(text, repo, ((revision, quant),))
    return Name(text, repo, ((revision, None),), None if quant in (None, "latest") else quant)


def _file(text: str, file: str) -> str:
    if not is_file(file):
        raise _malformed(text)
    return file


def _malformed(text: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"{shown(text)} is not of the form hf:owner/repo, hf:owner/repo:QUANT or hf:owner/repo/file.gguf or .onnx "
        "(or hf:owner/repo@revision/…)"
    )


def hint(text: str) -> str | None:
    """Advice for a missing path that looks like a repository of the Hub, else None."""
    match = _REPO.fullmatch(text)
    if (
        match
        and not text.startswith((".", "-"))
        and re.fullmatch(r"(|:[\w.-]+|@\S+|/\S+\.(gguf|onnx))", match[2], re.ASCII | re.IGNORECASE)
    ):
        return f"for a repository of the Hugging Face Hub write {shown('hf:' + text)}"
    return None


def shards(file: str) -> list[str]:
    """Names of all shards of a file, `-00001-of-00003.gguf`; the one name of a file without shards.

    Raises ModelNotFoundError for impossible numbers.
    """
    match = _SHARD.fullmatch(file)
    if not match:
        return [file]
    index, count = int(match[2]), int(match[3])
    if not 1 <= index <= count:
        raise ModelNotFoundError(f"{shown(file)}: there is no shard {index} of {count}")
    end = file[-5:]
    return [f"{match[1]}-{n:05}-of-{match[3]}{end}" for n in range(1, count + 1)]


def matching(files: Iterable[str], quant: str | None) -> list[str]:
    """A repository's models of one quantization, each by its first shard. None = of all quantizations.

    The rule is llama.cpp's: the name, in any case, before a dot or a dash, and no projector or importance matrix.
    If a file ends with exactly this name (F16, not BF16), only such files count.
    """
    models = [file for file in files if _is_model(file)]
    if quant is None:
        return models
    pattern = re.compile(re.escape(quant) + "[.-]", re.IGNORECASE)
    found = [file for file in models if pattern.search(file)]
    return [file for file in found if quant_of(file) == quant.upper()] or found


def quant_of(file: str) -> str:
    """The quantization that a file's name ends with, in capitals; empty if there is none."""
    match = _SHARD.fullmatch(file)
    tag = _TAG.search(match[1] if match else file[:-5])
    return tag[1].upper() if tag else ""


def _is_model(file: str) -> bool:
    base = file.lower().rpartition("/")[2]
    match = _SHARD.fullmatch(file)
    return (
        base.endswith(".gguf")
        and "mmproj" not in base
        and "imatrix" not in base
        and (match is None or int(match[2]) == 1)
    )


def choose(name: Name, files: Sequence[str], where: str = "the repository") -> str:
    """The file that is meant if a name gives none. `where` is the place of the files, for messages.

    Raises ModelNotFoundError with the choices.
    """
    models = matching(files, None)
    if not models:
        raise _no_model(name, files, where)
    for quant in (name.quant,) if name.quant else DEFAULT_QUANTS:
        if found := matching(files, quant):
            break
    else:
        found = [] if name.quant else models
    if len(found) == 1:
        return found[0]
    if not found:
        raise ModelNotFoundError(f"{name.text}: {where} has no such file", hint=f"it has {_listed(models)}")
    raise ModelNotFoundError(
        f"{name.text}: several files may be meant: {_listed(found)}", hint=f"name one, as hf:{name.repo}/file.gguf"
    )


def _no_model(name: Name, files: Sequence[str], where: str) -> ModelNotFoundError:
    """The error for files of which none is a GGUF file, and which are not asked for, or not usable, as a directory."""
    if name.quant and directories.is_model(files):
        return ModelNotFoundError(f"{name.text}: {where} has no GGUF file", hint=f"leave out :{name.quant}")
    if directories.ADAPTER in files:
        return ModelNotFoundError(
            f"{name.text}: {where} holds a LoRA adapter and not a model",
            hint="download it, and give its path as an adapter of what it was made for",
        )
    if (pickle := directories.pickle(files)) and not directories.has_weights(files):
        return ModelNotFoundError(
            f"{name.text}: {where} has no GGUF file and no safetensors, but {shown(pickle)}: "
            "a pickle of PyTorch, which runs code when it is opened",
            hint="look for a repository with safetensors",
        )
    return ModelNotFoundError(
        f"{name.text}: {where} has no GGUF file, and no safetensors with config.json", hint="look for one that has"
    )


def _listed(files: Sequence[str]) -> str:
    listed = ", ".join(shown(file)[1:-1] for file in files[:_MAX_LISTED])
    return listed if len(files) <= _MAX_LISTED else f"{listed} and {len(files) - _MAX_LISTED} more"
