"""Replacing small files so that readers, and a crash at any moment, see the old content or the new one."""

import contextlib
import fcntl
import glob
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

_SUFFIX = ".tmp"


def write_atomically(path: Path, text: str, *, mode: int = 0o644) -> None:
    """On disk when the call returns, with these permissions. Raises OSError, and then the file is what it was."""
    replace_together({path: text.encode()}, mode=mode)


def replace_together(contents: Mapping[Path, bytes], *, mode: int = 0o644) -> None:
    """As `write_atomically`, for files of one folder that belong together.

    None is touched before all are written. A crash in the moment between two renames leaves a mix, which only a digest
    of one in another can tell.
    """
    with contextlib.ExitStack() as stack:
        written = [(path, _temporary(path, content, mode, stack)) for path, content in contents.items()]
        for path, temporary in written:
            os.replace(temporary, path)
    folder = os.open(next(iter(contents)).parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_leftovers(path: Path) -> None:
    """Delete what writes of `path` that a crash cut short have left; what another process is writing stays."""
    for leftover in path.parent.glob(f"{glob.escape(path.name)}*{_SUFFIX}"):
        with contextlib.suppress(OSError), leftover.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()


def _temporary(path: Path, content: bytes, mode: int, stack: contextlib.ExitStack) -> Path:
    """The content on disk beside `path`; gone when `stack` unwinds unless it has been renamed."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=_SUFFIX)
    temporary = Path(name)
    stack.callback(temporary.unlink, missing_ok=True)
    file = stack.enter_context(os.fdopen(descriptor, "wb"))
    fcntl.flock(file, fcntl.LOCK_EX)  # Tells `remove_leftovers` that somebody is writing; ends with the process.
    try:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:  # a full disk does not say whose
        raise OSError(error.errno, error.strerror, str(path)) from error
    os.chmod(temporary, mode)
    return temporary
