"""One file of the Hub into a file here: resumed where it broke off, never longer than stated, verified at the end.

huggingface_hub's own transfer keeps nothing of a download that ends early and reports in pieces of 10 MB, larger than
most adapters; this one goes through its session, hooks and errors, and leaves the layout of the cache to it. Partial
files stand beside their target and survive the process.
"""

import contextlib
import fcntl
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from io import BufferedRandom
from pathlib import Path
from typing import Any

from huggingface_hub import get_session
from huggingface_hub.utils._http import hf_raise_for_status

from server.adapters.hub_retry import CutShortError


class WrongContentError(OSError):
    """The bytes are not those that the Hub, or the lock, states."""


def download(
    url: str,
    target: Path,
    *,
    headers: Mapping[str, str],
    size_bytes: int,
    sha256: str | None,
    timeout_s: float,
    on_bytes: Callable[[int], object],
) -> str:
    """Fetch `url` to `target`; the sha256 of what stands there then.

    A partial file of an earlier try is completed. `on_bytes` hears how many bytes of the file are here and may raise.
    Raises CutShortError (what came so far is kept), WrongContentError (nothing is kept), HTTP errors and OSError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _partial_file(target) as (path, file):
        _transfer(url, file, headers=headers, size_bytes=size_bytes, timeout_s=timeout_s, on_bytes=on_bytes)
        file.flush()
        file.seek(0)
        found = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 not in (None, found):
            path.unlink(missing_ok=True)
            raise WrongContentError("does not have the expected sha256")
        os.fsync(file.fileno())
        os.replace(path, target)
    return found


def _transfer(
    url: str,
    file: BufferedRandom,
    *,
    headers: Mapping[str, str],
    size_bytes: int,
    timeout_s: float,
    on_bytes: Callable[[int], object],
) -> None:
    """Append what is missing of `size_bytes` bytes."""
    done = file.seek(0, os.SEEK_END)
    if done > size_bytes:
        file.truncate(0)
        done = 0
    on_bytes(done)
    if done == size_bytes:
        return
    # Compressed bodies have another length, and ranges of them mean something else.
    asked = {**headers, "Accept-Encoding": "identity", **({"Range": f"bytes={done}-"} if done else {})}
    with get_session().stream("GET", url, headers=asked, timeout=timeout_s, follow_redirects=True) as response:
        hf_raise_for_status(response)
        if done and not _continues_at(response, done):
            done = file.seek(0)
            file.truncate(0)
        for piece in response.iter_raw():  # as they arrive: a chunk size would hold back what a slow Hub sends
            done += len(piece)
            if done > size_bytes:
                file.truncate(0)
                raise WrongContentError("has the wrong length: it is longer than the Hub states")
            file.write(piece)
            file.flush()  # to the system, so that a killed process loses nothing that was reported
            on_bytes(done)
    if done < size_bytes:
        # A body of known length would have raised if it had broken off: the Hub's file really is shorter.
        if {"content-length", "transfer-encoding"} & {name.lower() for name in response.headers}:
            file.truncate(0)
            raise WrongContentError("has the wrong length: it is shorter than the Hub states")
        raise CutShortError(f"{done} of {size_bytes} bytes")


def _continues_at(response: Any, position: int) -> bool:
    """Whether the body goes on where the partial file ends; a server may ignore ranges, or take them elsewhere."""
    return response.status_code == 206 and str(response.headers.get("Content-Range", "")).startswith(
        f"bytes {position}-"
    )


@contextlib.contextmanager
def _partial_file(target: Path) -> Iterator[tuple[Path, BufferedRandom]]:
    """The partial file of `target`, open for appending, or a file of our own while somebody else works on it."""
    path = target.with_name(f"{target.name}.lora-mixer.partial")
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
    path = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.lora-mixer.partial")
    try:
        with path.open("a+b") as own:
            yield path, own
    finally:
        path.unlink(missing_ok=True)
