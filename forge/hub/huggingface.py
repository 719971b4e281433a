"""Files of the Hugging Face Hub through `huggingface_hub`, whose own cache, token and settings are used."""

import inspect
import re
from logging import ERROR
from pathlib import Path
from typing import Any

from forge.errors import DownloadError, ModelNotFoundError
from forge.hub.cache import FULL_DISK, Progress
from forge.hub.catalog import shown

PREFIX = "hf:"
_SPEC = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?/(?P<file>[^/\0][^\0]*)", re.ASCII)
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def fetch(spec: str, report: Progress, *, download: bool = True) -> Path:
    """The local path of `hf:owner/repo[@revision]/file.gguf`, fetched if the Hub's cache lacks it.

    Of a sharded file (`-00001-of-00003.gguf`) all shards are fetched and the first one's path is returned.
    Raises ModelNotFoundError for a malformed name, DownloadError for whatever keeps the file away.
    """
    match = _SPEC.fullmatch(spec)
    if not match or any(part in ("", ".", "..") for part in match["file"].split("/")):
        raise ModelNotFoundError(
            f"{shown(spec)} is not of the form hf:owner/repo/file.gguf (or hf:owner/repo@revision/…)"
        )
    shard = _SHARD.fullmatch(match["file"])
    if not shard:
        return _fetch_file(spec, match["repo"], match["revision"], match["file"], report, download)
    names = [f"{shard[1]}-{n:05}-of-{shard[3]}.gguf" for n in range(1, int(shard[3]) + 1)]
    if match["file"] not in names:
        raise ModelNotFoundError(f"{shown(spec)}: there is no shard {int(shard[2])} of {int(shard[3])}")
    paths = [_fetch_file(spec, match["repo"], match["revision"], name, report, download) for name in names]
    if len({path.parent for path in paths}) > 1:  # a snapshot of the repository is one directory
        raise DownloadError(f"{spec}: the repository changed while its shards were fetched: run it again")
    return paths[0]


def _fetch_file(spec: str, repo: str, revision: str | None, name: str, report: Progress, download: bool) -> Path:
    import huggingface_hub  # costs 0.2 s, which only hf: names pay
    from huggingface_hub.utils import logging

    # Where `tqdm_class` is not there yet (before 1.0), huggingface_hub shows a bar of its own on a terminal.
    bar: dict[str, Any] = {}
    if "tqdm_class" in inspect.signature(huggingface_hub.hf_hub_download).parameters:
        bar["tqdm_class"] = _progress_class(f"downloading {name}", report)
    report(f"asking the Hub for {name}", 0, None)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(max(verbosity, ERROR))  # it logs each retry; the last one becomes our error
    try:
        return Path(
            huggingface_hub.hf_hub_download(repo, name, revision=revision, local_files_only=not download, **bar)
        )
    except Exception as error:  # httpx, requests, OSError, hf_xet: the set of types changes with its version
        raise DownloadError(f"{spec}: {_reason(error, name, download)}") from error
    finally:
        logging.set_verbosity(verbosity)


def _progress_class(stage: str, report: Progress) -> type[Any]:
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        """Draws nothing and passes on the bytes."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"disable": True})  # type: ignore[no-untyped-call]
            report(stage, int(self.n), self.total)

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            report(stage, int(self.n), self.total)

    return Bar


def _reason(error: Exception, name: str, download: bool) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        if not download:
            return "it is not in the Hugging Face cache: run `forge pull` first"
        if constants.HF_HUB_OFFLINE:
            return "it is not in the Hugging Face cache and HF_HUB_OFFLINE is set: unset it or pass a path"
        cause = _first_line(error.__cause__ or error)
        return f"cannot get it from {constants.ENDPOINT} ({cause}): check the network and HF_ENDPOINT, or pass a path"
    known = {
        errors.GatedRepoError: "the repository is gated: accept its terms on the Hub and set HF_TOKEN",
        errors.RepositoryNotFoundError: "there is no such repository, or it is private: check the name or set HF_TOKEN",
        errors.RevisionNotFoundError: "the repository has no such revision: check what follows the @",
        errors.EntryNotFoundError: f"the repository has no file {shown(name)}: check the name, folders included",
    }
    for kind, reason in known.items():  # the order matters: a gated repository is also a missing one
        if isinstance(error, kind):
            return reason
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return f"no space left in {constants.HF_HUB_CACHE}: free some space or set HF_HOME to another disk"
    if isinstance(error, OSError) and error.errno and error.filename:
        return f"{error.filename} cannot be used ({error.strerror}): set HF_HOME to a writable directory"
    return f"{_first_line(error)}: check the network and HF_ENDPOINT, or pass a path"


def _first_line(error: BaseException) -> str:
    lines = str(error).split("\n")
    return lines[0].strip().rstrip(".:") or type(error).__name__
