"""A small Hub on loopback: what huggingface_hub's own client needs of the real one, and faults on demand.

Serves the model info route with file sizes and LFS hashes, and the resolve route with HEAD, GET and ranges; large files
redirect to another host name, as the real Hub's do to its CDN. Commits are immutable, branches move.
"""

import contextlib
import gzip
import hashlib
import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin")


@dataclass
class Repository:
    """One model repository."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    """Set: private, only this token reads it."""
    is_gated: bool = False
    security: dict[str, object] | None = None
    """What the malware scanners say, for those who ask."""
    listed: dict[str, Mapping[str, object]] = field(default_factory=dict)
    """What the list says of a path in place of the truth."""
    lists_sizes: bool = True
    """False: as listings without `blobs=true`, which some mirrors never give."""
    described: Mapping[str, object] = field(default_factory=dict)
    """What the description of the repository says besides."""
    moved_to: str | None = None
    """The repository's new name: requests for this one are redirected."""

    def resolve(self, revision: str) -> str | None:
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None


@dataclass
class Fault:
    """What goes wrong on requests whose path contains `path`, the next `times` times."""

    path: str
    times: int = 1
    method: str | None = None
    status: int | None = None
    """Answer this status."""
    cut_at: int | None = None
    """Close the connection after this many bytes of the body."""
    body: bytes | None = None
    """Send this body in place of the right one, under the right headers except for its length."""
    delay_s: float = 0.0
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent with `status`."""
    location: str | None = None
    """Redirect there; `self` means the very same URL."""
    ignores_range: bool = False
    """Send the whole body with 200, whatever range was asked for."""
    refuses_range: bool = False
    """Answer 416 to a range."""
    compresses: bool = False
    """Send the body, or its range, compressed, whatever was asked for."""
    drip_s: float = 0.0
    """Pause between pieces of `piece_bytes` of the body."""
    piece_bytes: int = 1000
    header_drip_s: float | None = None
    """Send header lines without end, with pauses in between."""
    is_endless: bool = False
    """With `status`: the body has no end, only pauses of `drip_s`."""


@dataclass(frozen=True)
class Request:
    """One request as it arrived."""

    method: str
    path: str
    token: str | None
    query: str = ""
    range: str | None = None


class FakeHub:
    """`with FakeHub() as hub: HubSource(endpoint=hub.endpoint)`."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.mutex = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.cdn = f"http://localhost:{self._server.server_address[1]}"

    def __enter__(self) -> "FakeHub":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop answering; connections are refused from now on."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def push(self, name: str, files: Mapping[str, bytes], *, branch: str = "main") -> str:
        """Commit `files` as the whole content of a branch; the repository is created if needed. Returns the commit."""
        repository = self.repositories.setdefault(name, Repository())
        parts = [
            f"{len(repository.commits)}".encode(),
            *(part for path in sorted(files) for part in (path.encode(), files[path])),
        ]
        commit = hashlib.sha1(b"\0".join(parts)).hexdigest()
        repository.commits[commit] = dict(files)
        repository.branches[branch] = commit
        return commit

    def push_folder(self, name: str, folder: Path, *, prefix: str = "", branch: str = "main") -> str:
        """Commit the files of a folder, below `prefix`."""
        files = {f"{prefix}{path.name}": path.read_bytes() for path in folder.iterdir() if path.is_file()}
        return self.push(name, files, branch=branch)

    def fail(self, fault: Fault) -> None:
        self.faults.append(fault)

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The fault to apply to this request, if any; counts it down."""
        with self.mutex:
            for fault in self.faults:
                if fault.times > 0 and fault.path in path and fault.method in (None, method):
                    fault.times -= 1
                    return fault
        return None

    def count(self, method: str, path: str) -> int:
        """Requests so far whose path contains `path`."""
        return sum(request.method == method and path in request.path for request in self.requests)


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        pass

    Handler.hub = hub
    return Handler


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    timeout = 10

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def log_message(self, format: str, *args: object) -> None:
        """Tests read `hub.requests` instead."""

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        self._token = token if scheme == "Bearer" else None
        self.hub.requests.append(
            Request(self.command, path, self._token, urlsplit(self.path).query, self.headers.get("Range"))
        )
        self._fault = self.hub.take_fault(self.command, path)
        if self._fault is not None:
            time.sleep(self._fault.delay_s)
            if self._fault.header_drip_s is not None:
                return self._send_without_end(b"X-More: x\r\n", self._fault.header_drip_s)
            if self._fault.is_endless:
                return self._send_without_end(bytes(self._fault.piece_bytes), self._fault.drip_s, is_body=True)
            if self._fault.status is not None:
                body = self._fault.body or b'{"error": "on purpose"}'
                return self._answer(self._fault.status, body, self._fault.headers)
            if self._fault.location is not None:
                target = self.path if self._fault.location == "self" else self._fault.location
                return self._answer(302, b"", {"Location": target})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self._serve_info(match[1], match[2] or "main")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            return self._serve_tree(match[1], match[2])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._serve_file(match[1], match[2], match[3])
        if match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)", path):
            return self._serve_blob(self.hub.repositories[match[1]].commits[match[2]][match[3]], {})
        return self._answer(404, b"{}")

    def _repository(self, name: str) -> Repository | None:
        """The repository if the caller may see it; otherwise the Hub's answers are sent."""
        repository = self.hub.repositories.get(name)
        if repository is None or repository.token not in (None, self._token):
            self._answer(401 if self._token is None else 404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return None
        if repository.moved_to is not None:
            self._answer(307, b"", {"Location": self.path.replace(name, repository.moved_to)})
            return None
        if repository.is_gated:
            self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
            return None
        return repository

    def _serve_info(self, name: str, revision: str) -> None:
        if (repository := self._repository(name)) is None:
            return None
        if (commit := repository.resolve(revision)) is None:
            return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        siblings = [
            {**_sibling(path, content), **repository.listed.get(path, {})}
            for path, content in repository.commits[commit].items()
        ]
        if not repository.lists_sizes:
            siblings = [{"rfilename": sibling["rfilename"]} for sibling in siblings]
        info: dict[str, object] = {
            "id": name,
            "sha": commit,
            "private": repository.token is not None,
            "siblings": siblings,
            **repository.described,
            "tags": [],
        }
        if repository.security is not None and "securityStatus=" in urlsplit(self.path).query:
            info["securityRepoStatus"] = repository.security
        return self._answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _serve_tree(self, name: str, revision: str) -> None:
        if (repository := self._repository(name)) is None:
            return None
        if (commit := repository.resolve(revision)) is None:
            return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        entries = [_tree_entry(path, content) for path, content in repository.commits[commit].items()]
        return self._answer(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def _serve_file(self, name: str, revision: str, path: str) -> None:
        if (repository := self._repository(name)) is None:
            return None
        if (commit := repository.resolve(revision)) is None:
            return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        content = repository.commits[commit].get(path)
        if content is None:
            return self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        etag = hashlib.sha256(content).hexdigest() if path.endswith(LFS_SUFFIXES) else _git_hash(content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}
        if not path.endswith(LFS_SUFFIXES):
            return self._serve_blob(content, headers)
        headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{etag}"'}
        return self._answer(302, b"", {**headers, "Location": f"{self.hub.cdn}/cdn/{name}/{commit}/{path}"})

    def _serve_blob(self, content: bytes, headers: Mapping[str, str]) -> None:
        if self._fault is not None and self._fault.body is not None:
            content = self._fault.body
        is_whole = self._fault is not None and self._fault.ignores_range
        if self._fault is not None and self._fault.refuses_range and "Range" in self.headers:
            return self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        if not is_whole and (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            start = int(match[1])
            total = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            return self._answer(206, content[start:], {**headers, **total})
        return self._answer(200, content, headers)

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str] = {}) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self._fault is not None and self._fault.compresses:
            body = gzip.compress(body)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            cut_at = self._fault.cut_at if self._fault is not None else None
            with contextlib.suppress(ConnectionError):  # the client gave up: several tests want just that
                self._send(body if cut_at is None else body[:cut_at])
        self.close_connection = True

    def _send(self, body: bytes) -> None:
        if self._fault is None or not self._fault.drip_s:
            self.wfile.write(body)
            return
        for start in range(0, len(body), self._fault.piece_bytes):
            self.wfile.write(body[start : start + self._fault.piece_bytes])
            time.sleep(self._fault.drip_s)

    def _send_without_end(self, piece: bytes, pause_s: float, *, is_body: bool = False) -> None:
        """Until the client breaks off."""
        status = self._fault.status if self._fault is not None else None
        self.send_response(status or 200)
        for name, value in self._fault.headers.items() if self._fault is not None else ():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.close_connection = True
        with contextlib.suppress(ConnectionError):
            self.end_headers() if is_body else self.flush_headers()
            while True:
                self.wfile.write(piece)
                time.sleep(pause_s)


def _sibling(path: str, content: bytes) -> dict[str, object]:
    sibling: dict[str, object] = {"rfilename": path, "size": len(content), "blobId": _git_hash(content)}
    if path.endswith(LFS_SUFFIXES):
        sha256 = hashlib.sha256(content).hexdigest()
        sibling["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
    return sibling


def _tree_entry(path: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
