"""The Hub over HTTP: facts about a file, the list of a repository, the bytes. The Hub is not trusted."""

from __future__ import annotations

import json
import re
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Self
from urllib.parse import quote, urljoin

import httpx2
from huggingface_hub import constants, get_token

from forge.errors import DownloadError
from forge.hub._failures import Absent, NoRevision, Refused, Unreachable
from forge.hub.names import is_inside

_TRIES = 3
_MAX_REDIRECTS = 10
_MAX_LISTING_BYTES = 1 << 26
_MAX_REASON = 300  # characters
_PIECE_BYTES = 40_000_000_000
"""Most bytes of one request. The Hub's CDN sends no more than 50 GB in one answer."""
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_ETAG = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{0,127}")
_LENGTH = re.compile(r"[0-9]{1,18}")
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")


@dataclass(frozen=True, slots=True)
class Remote:
    """A file as the Hub announced it. Every value was checked. `sha256` is None if the Hub does not give it."""

    url: str
    commit: str
    etag: str
    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Answer:
    """Bytes of a file from `start` to `stop`."""

    start: int
    stop: int
    is_html: bool
    chunks: Iterator[bytes]


class Hub:
    """One connection to the Hub with the user's endpoint, token and proxies."""

    def __init__(self) -> None:
        self.endpoint = constants.ENDPOINT.rstrip("/")
        headers = {"user-agent": "forge-llm", "accept-encoding": "identity"}
        if not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN and (token := get_token()):
            headers["authorization"] = f"Bearer {token}"
        try:
            self._client = httpx2.Client(
                headers=headers,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                max_redirects=_MAX_REDIRECTS,
                verify=_certificates(),
            )
        except (OSError, ValueError, httpx2.InvalidURL) as error:  # a certificate file or a proxy that is none
            raise Unreachable(f"cannot set up the connection: {reason(error)}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def about(self, repo: str, revision: str, file: str) -> Remote:
        """The Hub's announcement of a file, without its bytes."""
        url = first = f"{self.endpoint}/{repo}/resolve/{quote(revision, safe='')}/{quote(file)}"
        seen: dict[str, str] = {}
        for _ in range(_MAX_REDIRECTS):
            response = self._head(url)
            seen |= {key.lower(): value for key, value in response.headers.items()}
            if not response.is_redirect:
                return _remote(first, seen)
            seen.pop("content-length", None)
            target = self._target(url, response)
            if _origin(target) != _origin(url):  # a store of bytes knows no commit, and must not see the token
                return _remote(first, seen)
            url = target
        raise self._unreachable("it redirects without end")

    def files(self, repo: str, revision: str | None) -> list[str]:
        """The files of a repository. Raises Unreachable, Refused or Absent."""
        at = f"/revision/{quote(revision, safe='')}" if revision else ""
        tree = f"/tree/{quote(revision or 'main', safe='')}?recursive=true"
        failure: DownloadError | None = None
        for path in (at, tree):  # mirrors have one or the other
            try:
                return _listing(self._read(f"{self.endpoint}/api/models/{repo}{path}"))
            except (Refused, Absent) as error:
                failure = failure or error
            except ValueError:
                why = "it sent no list of the repository's files: is it a login page or a proxy's?"
                failure = failure or self._unreachable(why)
        assert failure
        raise failure

    @contextmanager
    def stream(self, remote: Remote, start: int) -> Iterator[Answer]:
        """The bytes of a file from `start` on, or from 0 if the server cannot do that."""
        stop = min(remote.size, start + _PIECE_BYTES)
        headers = {"range": f"bytes={start}-{stop - 1 if stop < remote.size else ''}"}
        if start == 0 and stop == remote.size:
            headers = {}
        get = self._client.stream("GET", remote.url, headers=headers, follow_redirects=True)
        with self._guarded(), get as response:
            _check_status(response)
            _check_same(remote, response)
            begun = _start(remote, response)
            is_html = "text/html" in response.headers.get("content-type", "")
            yield Answer(begun, stop if begun == start else remote.size, is_html, response.iter_raw())

    def _head(self, url: str) -> httpx2.Response:
        """Answer to a HEAD request, which is repeated where that may help."""
        for again in range(_TRIES - 1, -1, -1):
            try:
                with self._guarded():
                    response = self._client.head(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
                    _check_status(response, redirected=True)
                    return response
            except Unreachable as error:
                if not again or isinstance(error.__cause__, httpx2.TimeoutException):
                    raise
                time.sleep(1)
        raise AssertionError

    def _read(self, url: str) -> bytes:
        body = bytearray()
        with self._guarded(), self._client.stream("GET", url, follow_redirects=True) as response:
            _check_status(response)
            for chunk in response.iter_raw():
                body += chunk
                if len(body) > _MAX_LISTING_BYTES:
                    raise ValueError
        return bytes(body)

    def _target(self, url: str, response: httpx2.Response) -> str:
        try:
            return str(httpx2.URL(urljoin(url, response.headers.get("location", ""))))
        except (httpx2.InvalidURL, ValueError) as error:
            raise self._unreachable(f"it redirects to nowhere: {reason(error)}") from error

    def _unreachable(self, why: str) -> Unreachable:
        where = re.sub(r"(?<=://)[^/@\s]+(?=@)", "****", self.endpoint)
        return Unreachable(f"cannot get it from {where} ({why}): check the network and HF_ENDPOINT, or pass a path")

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (httpx2.HTTPError, httpx2.InvalidURL, UnicodeError) as error:  # UnicodeError: a malformed host name
            raise self._unreachable(reason(error)) from error


@cache
def _certificates() -> ssl.SSLContext:
    """The certificates of authorities to trust. Reading them takes 50 ms."""
    return httpx2.create_ssl_context()


def reason(error: BaseException) -> str:
    """The first line of an error, of bounded length, without the token."""
    lines = str(error).split("\n")
    text = re.sub(r"Bearer [^'\"]+", "Bearer ****", lines[0].strip().rstrip(".:"))
    return text[:_MAX_REASON] or type(error).__name__


def _check_status(response: httpx2.Response, *, redirected: bool = False) -> None:
    """Raises the failure that a status code stands for. Success passes, and a redirection if `redirected`."""
    status, code = response.status_code, response.headers.get("x-error-code", "")
    if response.is_success or (redirected and response.is_redirect):
        return
    if code == "GatedRepo" or status == 403:
        raise Refused("the repository is gated: accept its terms on the Hub and set HF_TOKEN")
    if code == "RevisionNotFound":
        raise NoRevision("the repository has no such revision: check what follows the @")
    if code == "EntryNotFound" or (status == 404 and code != "RepoNotFound" and "/resolve/" in response.url.path):
        raise Absent("the repository has no such file: check the name, folders included")
    if status in (401, 404):
        raise Refused("there is no such repository, or it is private: check the name or set HF_TOKEN")
    if status == 416:
        raise _other_bytes()
    phrase = response.reason_phrase
    raise httpx2.HTTPError(f"{status} {phrase}" if phrase.isprintable() else f"{status}")


def _remote(url: str, headers: dict[str, str]) -> Remote:
    """The announcement, checked, because etag and commit become names of files."""
    commit, linked = headers.get("x-repo-commit", ""), headers.get("x-linked-etag")
    etag = _bare(linked or headers.get("etag", ""))
    size = headers.get("x-linked-size") or headers.get("content-length", "")
    if not commit and "text/html" in headers.get("content-type", ""):
        raise DownloadError("the server sent an HTML page instead of the file: is it a login page or a proxy's?")
    for what, value, form in (("commit", commit, _COMMIT), ("etag", etag, _ETAG), ("length", size, _LENGTH)):
        if not form.fullmatch(value):
            raise DownloadError(
                f"the server announces {f'the {what} {value[:80]!r}' if value else f'no {what}'}: "
                "it is no Hugging Face Hub, or damaged: check HF_ENDPOINT"
            )
    is_hash = linked and re.fullmatch(r"[0-9a-f]{64}", etag)
    return Remote(url, commit, etag, int(size), etag if is_hash else None)


def _check_same(remote: Remote, response: httpx2.Response) -> None:
    """Raises DownloadError if the file on the Hub is no longer the one that was announced."""
    for step in (*response.history, response):
        etag = step.headers.get("x-linked-etag") or ("" if step.is_redirect else step.headers.get("etag"))
        if "x-repo-commit" in step.headers and etag and _bare(etag) != remote.etag:
            raise DownloadError("the file changed on the Hub meanwhile: run it again")


def _start(remote: Remote, response: httpx2.Response) -> int:
    """First byte of an answer. Raises DownloadError if it announces another range than the request asked for."""
    if response.status_code != 206:
        length = response.headers.get("content-length", str(remote.size))
        if length != str(remote.size):
            raise DownloadError(f"the server announced {remote.size} bytes and then {length[:20]!r}")
        return 0
    got = _RANGE.fullmatch(response.headers.get("content-range", ""))
    asked = response.request.headers.get("range", "")
    if not got or got[3] not in ("*", str(remote.size)) or not asked.startswith(f"bytes={got[1]}-"):
        raise _other_bytes()
    return int(got[1])


def _other_bytes() -> DownloadError:
    return DownloadError("the server sent other bytes than those that were asked for: run it again")


def _listing(body: bytes) -> list[str]:
    """The files of a listing, which has two forms. Raises ValueError for anything else."""
    try:
        found: Any = json.loads(body)
    except RecursionError:
        raise ValueError from None
    items = found.get("siblings") if isinstance(found, dict) else found
    if not isinstance(items, list):
        raise ValueError
    paths = [item.get("rfilename", item.get("path")) for item in items if isinstance(item, dict)]
    return sorted({path for path in paths if isinstance(path, str) and is_inside(path)})


def _bare(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = httpx2.URL(url)
    return parts.scheme, parts.host, parts.port
