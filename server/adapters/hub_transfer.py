"""One file of the Hub into a file here: resumed where it broke off, never longer than stated, verified at the end.

huggingface_hub's own transfer keeps nothing of a download that ends early and reports in pieces of 10 MB, larger than
most adapters; this one leaves the layout of the cache to it. Partial files stand beside their target and survive the
process.
"""

import contextlib
import errno
import fcntl
import os
import uuid
from collections.abc import Callable, Iterator
from io import BufferedRandom
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError

from server.adapters.hub_content import StatedContent, WrongContentError
from server.adapters.hub_errors import status_of
from server.adapters.hub_requests import HubCall, encoding_of
from server.adapters.hub_retry import CutShortError

MAX_FRUITLESS_RESUMES = 2
"""Resumes in a row that may bring nothing; then the file begins anew, should it be the resuming that fails."""

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
"""A disk that is full, or the share of it that the server may use."""

PARTIAL_SUFFIX = ".lora-mixer.partial"

PLAIN = {"Accept-Encoding": "identity"}
"""Compressed bodies have another length, and ranges of them mean something else. Some mirrors compress even so."""


class FileDownload:
    """Fetches a URL to `target`, in one attempt or several."""

    def __init__(self, url: str, target: Path, content: StatedContent, on_bytes: Callable[[int], object]) -> None:
        """`on_bytes` hears how many bytes of the file are here and may raise."""
        self._url = url
        self._target = target
        self._content = content
        self._on_bytes = on_bytes
        self._num_fruitless = 0

    def attempt(self, call: HubCall) -> str:
        """Complete the file, or the partial one of an earlier attempt; the sha256 of what stands at the target then.

        Raises CutShortError (what came so far is kept), WrongContentError (nothing is kept), what `HubCall` raises, and
        OSError (nothing is kept where there is no room for it).
        """
        self._target.parent.mkdir(parents=True, exist_ok=True)
        with _partial_file(self._target) as (path, file):
            try:
                self._transfer(call, file)
                file.flush()
            except OSError as error:
                if error.errno in NO_ROOM:  # what came must not keep the disk full for everybody else
                    os.ftruncate(file.fileno(), 0)  # not the file's own, which would first write out what it holds
                    path.unlink(missing_ok=True)
                raise
            try:
                found = self._content.sha256_of(file)
            except WrongContentError:
                path.unlink(missing_ok=True)
                raise
            os.fsync(file.fileno())
            os.replace(path, self._target)
        return found

    def _transfer(self, call: HubCall, file: BufferedRandom) -> None:
        """Append what is missing."""
        done = file.seek(0, os.SEEK_END)
        if done > self._content.size_bytes or self._num_fruitless >= MAX_FRUITLESS_RESUMES:
            done = file.truncate(0)
        self._on_bytes(done)
        if done == self._content.size_bytes or (done and self._resumed(call, file, done)):
            return
        with call.open("GET", self._url, PLAIN) as response:
            self._copy(call, response, file, 0)

    def _resumed(self, call: HubCall, file: BufferedRandom, done: int) -> bool:
        """Complete the partial file by its rest; False when the server cannot give just that."""
        try:
            with call.open("GET", self._url, {**PLAIN, "Range": f"bytes={done}-"}) as response:
                if response.status_code != 206:  # it ignores ranges and sends the whole
                    self._copy(call, response, file, 0)
                    return True
                if not _continues_at(response, done):
                    return False
                self._num_fruitless += 1
                self._copy(call, response, file, done)
                return True
        except HfHubHTTPError as error:
            if status_of(error) == 416:  # it refuses ranges, or this one: its file would be shorter than stated
                return False
            raise

    def _copy(self, call: HubCall, response: Any, file: BufferedRandom, done: int) -> None:
        """Write a body that begins `done` bytes into the file."""
        file.truncate(done)
        for piece in call.pieces(response):  # as they arrive: a chunk size would hold back what a slow Hub sends
            self._num_fruitless = 0
            done += len(piece)
            if done > self._content.size_bytes:
                file.truncate(0)
                raise WrongContentError("has the wrong length: it is longer than the Hub states")
            file.write(piece)
            file.flush()  # to the system, so that a killed process loses nothing that was reported
            self._on_bytes(done)
        if done < self._content.size_bytes:
            # A body whose end is marked would have raised if it had broken off: the Hub's file really is shorter.
            marks = {"content-length", "transfer-encoding"} & {name.lower() for name in response.headers}
            if marks or encoding_of(response):
                file.truncate(0)
                raise WrongContentError("has the wrong length: it is shorter than the Hub states")
            raise CutShortError(f"{done} of {self._content.size_bytes} bytes")


def discard_partials(folder: Path) -> None:
    """Delete the partial files in a folder but for those that somebody works on."""
    for path in folder.glob(f"*{PARTIAL_SUFFIX}"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _continues_at(response: Any, position: int) -> bool:
    """Whether the body goes on where the partial file ends; a server may take ranges elsewhere, or of what it has
    compressed.
    """
    content_range = str(response.headers.get("Content-Range", ""))
    return content_range.startswith(f"bytes {position}-") and not encoding_of(response)


@contextlib.contextmanager
def _partial_file(target: Path) -> Iterator[tuple[Path, BufferedRandom]]:
    """The partial file of `target`, open for appending, or a file of our own while somebody else works on it."""
    path = target.with_name(f"{target.name}{PARTIAL_SUFFIX}")
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino
    except OSError:  # held by another process or thread, or a file system without locks
        is_ours = False
    if is_ours:
        with file:
            yield path, file
        return
    file.close()
    path = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}")
    try:
        with path.open("a+b") as own:
            yield path, own
    finally:
        path.unlink(missing_ok=True)
