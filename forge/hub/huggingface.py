"""Files of the Hugging Face Hub, in its own cache, with the token and the settings of `huggingface_hub`."""

import hashlib
import os
import struct
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from forge.config import Progress
from forge.errors import DownloadError, ModelNotFoundError
from forge.hub import client, directories, locks, names
from forge.hub._failures import Absent, NoRevision, Refused, Unreachable
from forge.hub.cache import FULL_DISK, require_place
from forge.hub.catalog import shown
from forge.hub.client import Hub, Remote
from forge.hub.download import download, require_space
from forge.hub.hf_cache import Repo, prune, root
from forge.hub.names import Name

_MAX_SHARDS = 1000
_SPLIT_COUNT = struct.pack("<Q", 11) + b"split.count"


def fetch(text: str, report: Progress, *, may_download: bool = True, force: bool = False) -> Path:
    """Local path of a model of the Hub, fetched if the cache lacks it. `names.parse` lists the forms of `text`.

    All shards of a sharded file (`-00001-of-00003.gguf`) are fetched, and the path of the first is returned. Of a
    repository without GGUF files it is the directory of safetensors, or of ONNX, and what a model needs beside them.
    If the Hub cannot be asked, the cached model of the revision is used. `force` checks the bytes of cached files.
    Raises ModelNotFoundError for a name that means no file, DownloadError for every other failure.
    """
    name = names.parse(text)
    with _named(name):
        try:
            validate_repo_id(name.repo)
        except HFValidationError as error:
            raise DownloadError(client.reason(error)) from error
        if not may_download:
            return _cached(name, "it is not in the Hugging Face cache: run `forge pull` first")
        if constants.HF_HUB_OFFLINE:
            return _cached(
                name, "it is not in the Hugging Face cache and HF_HUB_OFFLINE is set: unset it or pass a path"
            )
        return _fetch(name, report, force)


def _fetch(name: Name, report: Progress, force: bool) -> Path:
    with ExitStack() as stack:
        try:
            hub = stack.enter_context(Hub())
            revision, parts, remote = _find(hub, name, report)
        except (Unreachable, Refused) as error:
            return _cached(name, str(error))
        repo = Repo(name.repo)
        if remote is None:
            graph = next((file for _, file in name.places if file in parts), None)
            folder = _fetch_directory(hub, repo, revision, parts, graph, report, force)
            return folder / graph if graph else folder
        paths = [_fetch_file(hub, repo, revision, parts[0], remote if len(parts) == 1 else None, report, force)]
        if len(parts) > 1:
            _check_split(paths[0], len(parts))
        paths += [_fetch_file(hub, repo, revision, part, None, report, force) for part in parts[1:]]
    if len({path.parent for path in paths}) > 1:  # a snapshot of the repository is one directory
        raise DownloadError("the repository changed while its shards were fetched: run it again")
    return paths[0]


def _find(hub: Hub, name: Name, report: Progress) -> tuple[str, list[str], Remote | None]:
    """Revision and files that a name means: the shards of a GGUF file, and the Hub's announcement of the last of them.

    Without an announcement they are all files of a repository whose model is a directory, or an ONNX file in it. A
    name may claim any number of shards, so the last shard is asked for before anything else.
    """
    failure: Absent | None = None
    for revision, file in name.places:
        last = ""
        try:
            if file is None:
                report(f"asking the Hub for {name.repo}", 0, None)
                files = hub.files(name.repo, revision)
                if _is_directory(name, files):
                    if directories.TOKENIZERS.isdisjoint(files):  # said before gigabytes are fetched
                        raise DownloadError(
                            "the repository has no tokenizer.json: take one that has, or save its tokenizer there by "
                            "transformers' AutoTokenizer(...).save_pretrained"
                        )
                    return revision or "main", files, None
                file = names.choose(name, files)
            elif directories.is_graph(file):
                report(f"asking the Hub for {name.repo}", 0, None)
                files = hub.files(name.repo, revision)
                if file not in files:
                    raise Absent(f"the repository has no file {shown(file)}: check the name, folders included")
                return revision or "main", files, None
            parts = names.shards(file)
            last = parts[-1]
            report(f"asking the Hub for {last}", 0, None)
            remote = hub.about(name.repo, revision or "main", last)
            if len(parts) > _MAX_SHARDS:
                raise DownloadError(f"no model has {len(parts)} shards, at most {_MAX_SHARDS}: check the name")
            return revision or "main", parts, remote
        except NoRevision as error:
            failure = failure or error
        except Absent as error:  # this revision exists: its failure says more than the absence of another revision
            failure = (
                Absent(f"the repository has no file {shown(last)}: check the name, folders included") if last else error
            )
    assert failure
    raise failure


def _is_directory(name: Name, files: Collection[str]) -> bool:
    """Whether a name without a file means a directory: a GGUF file is preferred, and a quantization names one."""
    return name.quant is None and not names.matching(files, None) and directories.is_model(files)


def _cached(name: Name, problem: str) -> Path:
    """Path of the first shard, or of a directory, in the cache. Raises DownloadError with why the Hub was not asked."""
    repo = Repo(name.repo)
    for revision, file in name.places:
        if commit := repo.commit(revision or "main"):
            present = {part for part in repo.files(commit) if repo.pointer(commit, part).is_file()}
            with suppress(ModelNotFoundError, DownloadError):
                if file is None and _is_directory(name, present):
                    directories.weights(present, repo.snapshot(commit))
                    return repo.snapshot(commit)
                parts = names.shards(file or names.choose(name, repo.files(commit)))
                if present.issuperset(parts):
                    return repo.pointer(commit, parts[0])
    raise DownloadError(problem)


def _fetch_directory(
    hub: Hub, repo: Repo, revision: str, files: list[str], graph: str | None, report: Progress, force: bool
) -> Path:
    """The directory of a snapshot, with all files of its model: the weights come last, when there is room for all.

    graph: The ONNX file that is meant, where it is named.
    """
    beside = directories.beside(files)
    if not beside:
        raise DownloadError("the repository has no config.json and no tokenizer beside the graph at its top")
    commit = _about(hub, repo, revision, beside[0], report).commit  # the branch may move meanwhile
    for file in beside:
        remote = _about(hub, repo, commit, file, report)
        if remote.size > directories.MAX_BESIDE_BYTES:
            raise DownloadError(f"{file} has {remote.size} bytes, allowed are {directories.MAX_BESIDE_BYTES}")
        _fetch_file(hub, repo, commit, file, remote, report, force)
    snapshot = repo.snapshot(commit)
    weights = directories.of_graph(graph, files) if graph else directories.weights(files, snapshot)
    remotes = {file: _about(hub, repo, commit, file, report) for file in weights}
    missing = (remote.size for file, remote in remotes.items() if not _is_right(snapshot / file, remote, afresh=False))
    require_space(snapshot, sum(missing))
    for file, remote in remotes.items():
        _fetch_file(hub, repo, commit, file, remote, report, force)
    repo.remember(revision, commit)
    return snapshot


def _about(hub: Hub, repo: Repo, revision: str, file: str, report: Progress) -> Remote:
    report(f"asking the Hub for {file}", 0, None)
    return hub.about(repo.name, revision, file)


def _fetch_file(
    hub: Hub, repo: Repo, revision: str, file: str, remote: Remote | None, report: Progress, force: bool
) -> Path:
    remote = remote or _about(hub, repo, revision, file, report)
    pointer, blob, lock = repo.pointer(remote.commit, file), repo.blob(remote.etag), repo.lock(remote.etag)
    if _is_right(pointer, remote, force):
        repo.remember(revision, remote.commit)
        return pointer
    require_place(pointer)
    require_place(blob)
    partial = repo.partials / file / remote.etag
    try:
        with locks.held(lock, lambda: report(f"waiting for another download of {file}", 0, None), remove=True):
            if not _is_right(blob, remote, force):
                partial.parent.mkdir(parents=True, exist_ok=True)
                try:
                    download(hub, remote, partial, f"downloading {file}", report)
                    blob.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(partial, blob)
                finally:
                    prune(partial.parent, root())
            if not pointer.exists() or not pointer.samefile(blob):
                repo.link(blob, pointer)
            repo.remember(revision, remote.commit)
    finally:
        prune(lock.parent, root())
    return pointer


def _is_right(path: Path, remote: Remote, afresh: bool) -> bool:
    """Whether a file has the announced size and, with `afresh`, the announced SHA-256."""
    if not path.is_file() or path.stat().st_size != remote.size:
        return False
    if not afresh:
        return True
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == remote.sha256


def _check_split(path: Path, count: int) -> None:
    """Raises DownloadError if a first shard's metadata and its name disagree on the number of shards."""
    with open(path, "rb") as file:
        head = file.read(1 << 24)
    _, key, value = head.partition(_SPLIT_COUNT)
    if key and len(value) >= 6 and value[:4] == b"\2\0\0\0" and int.from_bytes(value[4:6], "little") != count:
        found = int.from_bytes(value[4:6], "little")
        raise DownloadError(f"the first shard says that there are {found} shards, its name {count}: check the name")


@contextmanager
def _named(name: Name) -> Iterator[None]:
    """Turn every failure into a DownloadError that begins with the name."""
    try:
        yield
    except DownloadError as error:
        raise DownloadError(f"{name.text}: {error}") from error
    except OSError as error:
        if error.errno in FULL_DISK:
            reason = f"no space left in {constants.HF_HUB_CACHE}: free some space or set HF_HOME to another disk"
        else:
            where = error.filename or constants.HF_HUB_CACHE
            reason = f"{where} cannot be used ({error.strerror or error}): set HF_HOME to a writable directory"
        raise DownloadError(f"{name.text}: {reason}") from error
