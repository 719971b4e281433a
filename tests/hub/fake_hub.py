"""A Hugging Face Hub on the loopback that can be made to lie."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Reply:
    """What the Hub sends: tests change it before it goes out. `send` bytes of the body are sent, then it is cut."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    send: int | None = None
    chunked: bool = False


class FakeHub(ThreadingHTTPServer):
    """Serves `repos["owner/repo"][revision][path]`, and what `spoil(method, path, reply)` makes of it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.commits: dict[str, str] = {}
        self.in_git: set[str] = set()  # small files: the Hub gives git's name of them, and no SHA-256
        self.listings = ("revision", "tree")
        self.spoil: Callable[[str, str, Reply], None] = lambda method, path, reply: None
        self.log: list[tuple[str, str, dict[str, str]]] = []

    def add(self, repo: str, *files: str, revision: str = "main", body: bytes = b"") -> None:
        tree = self.repos.setdefault(repo, {}).setdefault(revision, {})
        tree |= {file: body or b"GGUF of " + file.encode() for file in files}

    def asked(self, method: str, part: str = "") -> list[str]:
        """The paths of the requests so far."""
        return [path for name, path, _ in self.log if name == method and part in path]

    def ranges(self) -> list[str | None]:
        """The Range headers of the requests for bytes."""
        return [headers.get("range") for method, path, headers in self.log if method == "GET" and "/resolve/" in path]


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body is sent behind its headers: 40 ms less for each answer

    def do_GET(self) -> None:
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.server.log.append((self.command, self.path, headers))
        reply = self._reply(self.path, headers)
        self.server.spoil(self.command, self.path, reply)
        self.send_response(reply.status)
        for key, value in reply.headers.items():
            self.send_header(key, value)
        if reply.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif "Content-Length" not in reply.headers:
            self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command == "GET":
            body = reply.body[: reply.send]
            self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if reply.chunked else body)
        if reply.send is not None or "Content-Length" in reply.headers:
            self.close_connection = True

    do_HEAD = do_GET

    def _reply(self, path: str, headers: dict[str, str]) -> Reply:
        parts = urlsplit(path)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", parts.path):
            return self._file(match[1], unquote(match[2]), unquote(match[3]), headers)
        for kind, pattern in (("revision", r"(?:/revision/([^/]+))?"), ("tree", r"/tree/([^/]+)")):
            if match := re.fullmatch(rf"/api/models/([^/]+/[^/]+){pattern}", parts.path):
                tree, error = self._tree(match[1], unquote(match[2] or "main"))
                if error or kind not in self.server.listings:
                    return error or Reply(404)
                names = [{"rfilename": name} for name in tree]
                listing = (
                    {"siblings": names} if kind == "revision" else [{"type": "file", "path": name} for name in tree]
                )
                return Reply(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})
        return Reply(404, b"<html>no such page</html>", {"Content-Type": "text/html"})

    def _tree(self, repo: str, revision: str) -> tuple[dict[str, bytes], Reply | None]:
        if repo not in self.server.repos:
            return {}, Reply(404, headers={"X-Error-Code": "RepoNotFound"})
        revisions = self.server.repos[repo]
        commits = {self.server.commits.get(name, COMMIT): name for name in reversed(revisions)}
        revision = revision if revision in revisions else commits.get(revision, "")
        if revision not in revisions:
            return {}, Reply(404, headers={"X-Error-Code": "RevisionNotFound"})
        return revisions[revision], None

    def _file(self, repo: str, revision: str, file: str, headers: dict[str, str]) -> Reply:
        tree, error = self._tree(repo, revision)
        if error:
            return error
        commit = revision if re.fullmatch("[0-9a-f]{40}", revision) else self.server.commits.get(revision, COMMIT)
        if file not in tree:
            return Reply(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        body = tree[file]
        about = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": commit}
        if file in self.server.in_git:
            blob = b"blob %d\0" % len(body) + body
            about["ETag"] = f'"{hashlib.sha1(blob).hexdigest()}"'
        else:
            about |= {"X-Linked-ETag": about["ETag"], "X-Linked-Size": str(len(body))}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", "")):
            start, end = int(wanted[1]), int(wanted[2] or len(body) - 1)
            about["Content-Range"] = f"bytes {start}-{end}/{len(body)}"
            return Reply(206, body[start : end + 1], about)
        return Reply(200, body, about)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def running() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True).start()
        yield hub
        hub.shutdown()
