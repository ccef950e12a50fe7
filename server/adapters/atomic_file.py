"""Replacing a small text file so that readers, and a crash at any moment, see the old content or the new one."""

import contextlib
import fcntl
import glob
import os
import tempfile
from pathlib import Path

_SUFFIX = ".tmp"


def write_atomically(path: Path, text: str, *, mode: int = 0o644) -> None:
    """On disk when the call returns, with these permissions. Raises OSError, and then the file is what it was."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=_SUFFIX)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # tells `remove_leftovers` that somebody is writing; ends with the process
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(temporary, mode)
            os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
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
