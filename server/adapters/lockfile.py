"""adapters.lock: which commit and which bytes every Hub source resolved to, so that a restart serves the same.

Written whole and atomically; a missing file is an empty lock, a damaged one is an error and never overwritten. Several
servers may share it, and an operator may edit it while they run: a server adds and drops entries of its own and leaves
the rest as it finds it. What it has read or added holds for it until it ends.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from server.adapters.examples import EXAMPLES_NAME
from server.adapters.peft_config import CONFIG_NAME
from server.adapters.sources import COMMIT_PATTERN
from server.adapters.strict_json import StrictJsonError, parse_object
from server.adapters.validation import WEIGHTS_NAME
from server.atomic_file import remove_leftovers, write_atomically
from server.config import AdapterSpec
from server.errors import ConfigError

LOCK_VERSION = 1

MAX_LOCK_BYTES = 16 * 1024**2
"""Largest lock read; an entry has about 500 bytes."""

_SHA256_PATTERN = r"[0-9a-f]{64}"


@dataclass(frozen=True)
class LockKey:
    """What was asked for; `revision` is the branch, tag or commit as given, None for the default branch."""

    source: str
    revision: str | None
    subfolder: str | None

    @classmethod
    def of(cls, spec: AdapterSpec) -> "LockKey":
        return cls(spec.source, spec.revision, spec.subfolder)


@dataclass(frozen=True)
class LockEntry:
    """What it resolved to."""

    commit: str
    files: Mapping[str, str]
    """File name -> sha256 in hex; without the examples where the commit has none, or none that could be had."""
    digest: str
    """Digest of the adapter."""


@dataclass(frozen=True)
class BaseLock:
    """The commit that a base model from the Hub resolved to; `revision` as it was asked for."""

    source: str
    revision: str | None
    commit: str


class Lockfile:
    """The lock of one server. Thread-safe; every change is on disk when the call returns."""

    def __init__(self, path: Path | None) -> None:
        """Reads `path` if it exists; None keeps the lock in memory. Raises ConfigError when it is damaged."""
        self._path = path
        self._mutex = threading.Lock()
        if path is not None:
            remove_leftovers(path)
        self._entries, self._base = ({}, None) if path is None else _read(path)
        self._changes: dict[LockKey, LockEntry | None] = {}
        """Not in the file yet: entries to add, and None for those to drop."""
        self._new_base: BaseLock | None = None
        """Likewise."""

    def get(self, key: LockKey) -> LockEntry | None:
        with self._mutex:
            return self._entries.get(key)

    def put(self, key: LockKey, entry: LockEntry) -> bool:
        """Add an entry or replace one of the same commit. One of another commit stays, also one that another server has
        added meanwhile, which holds here too from now on: then False.

        Raises OSError when the file cannot be written; memory is changed even so.
        """
        with self._mutex:
            if (known := self._entries.get(key)) == entry:
                return True
            with self._stored() as stored:
                known = known or stored.get(key)
                if known is not None and known.commit != entry.commit:
                    self._entries = {**self._entries, key: known}
                    return False
                self._entries = {**self._entries, key: entry}
                self._changes[key] = entry
            return True

    def remove(self, key: LockKey) -> None:
        """Forget an entry, if there is one. Raises OSError as `put` does."""
        with self._mutex:
            if key in self._entries:
                self._entries = {other: entry for other, entry in self._entries.items() if other != key}
                with self._stored():
                    self._changes[key] = None

    def has_commit(self, source: str, commit: str) -> bool:
        """Whether an adapter is locked at this commit of a source."""
        with self._mutex:
            return any(key.source == source and entry.commit == commit for key, entry in self._entries.items())

    def base_commit(self, source: str, revision: str | None) -> str | None:
        """Of a base model from the Hub, None where another one or none is locked."""
        with self._mutex:
            known = self._base
        return known.commit if known is not None and (known.source, known.revision) == (source, revision) else None

    def put_base(self, base: BaseLock) -> None:
        """Replaces what is there: a server has one base model. Raises OSError when the file cannot be written."""
        with self._mutex:
            if self._base != base:
                self._base = base
                with self._stored():
                    self._new_base = base

    @contextlib.contextmanager
    def _stored(self) -> Iterator[Mapping[LockKey, LockEntry]]:
        """The entries of the file, for which no other server can come in between; changes that the block makes are in
        the file after it. Raises OSError, after the block.
        """
        if self._path is None:
            yield {}
            return
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # no folder, or a file system without locks
                folder = os.open(self._path.parent, os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, folder)
                fcntl.flock(folder, fcntl.LOCK_EX)
            try:
                entries, base = _read(self._path)
            except ConfigError as error:
                yield {}
                raise OSError(errno.EINVAL, "the file is damaged, and stays as it is") from error
            yield entries
            if self._changes or self._new_base:
                _write(self._path, {**entries, **self._changes}, self._new_base or base)
                self._changes, self._new_base = {}, None


def _write(path: Path, entries: Mapping[LockKey, LockEntry | None], base: BaseLock | None) -> None:
    """None stands for an entry that is to go."""
    records = [{**asdict(key), **asdict(entry)} for key, entry in entries.items() if entry is not None]
    records.sort(key=lambda record: (record["source"], record["revision"] or "", record["subfolder"] or ""))
    stated = {} if base is None else {"base_model": asdict(base)}
    text = json.dumps({"version": LOCK_VERSION, **stated, "adapters": records}, indent=2, sort_keys=True) + "\n"
    write_atomically(path, text)


def _read(path: Path) -> tuple[dict[LockKey, LockEntry], BaseLock | None]:
    try:
        content = parse_object(path.read_bytes(), max_bytes=MAX_LOCK_BYTES)
        return _entries(content), _base(content)
    except FileNotFoundError:
        return {}, None
    except (StrictJsonError, OSError) as error:
        advice = "restore it from version control, or delete it to resolve every source anew"
        raise ConfigError(f"{path} is damaged: {error}; {advice}") from error


def _entries(content: dict[str, Any]) -> dict[LockKey, LockEntry]:
    if content.get("version") != LOCK_VERSION:
        raise StrictJsonError(f"its version is {content.get('version')!r}, this server reads {LOCK_VERSION}")
    records = content.get("adapters")
    if set(content) - {"base_model"} != {"version", "adapters"} or not isinstance(records, list):
        raise StrictJsonError("it does not hold exactly version, adapters and perhaps base_model")
    entries: dict[LockKey, LockEntry] = {}
    for index, record in enumerate(records):
        if not isinstance(record, dict) or not _is_sound(record):
            raise StrictJsonError(f"entry {index} is malformed")
        key = LockKey(record["source"], record["revision"], record["subfolder"])
        if key in entries:
            raise StrictJsonError(f"entry {index} repeats {key.source!r}")
        entries[key] = LockEntry(record["commit"], record["files"], record["digest"])
    return entries


def _base(content: dict[str, Any]) -> BaseLock | None:
    if "base_model" not in content:
        return None
    record = content["base_model"]
    if (
        not isinstance(record, dict)
        or set(record) != {"source", "revision", "commit"}
        or not isinstance(record["source"], str)
        or not (record["revision"] is None or isinstance(record["revision"], str))
        or not _matches(COMMIT_PATTERN, record["commit"])
    ):
        raise StrictJsonError("its base_model is malformed")
    return BaseLock(**record)


def _is_sound(record: dict[str, Any]) -> bool:
    files = record.get("files")
    return (
        set(record) == {"source", "revision", "subfolder", "commit", "files", "digest"}
        and isinstance(record["source"], str)
        and all(record[name] is None or isinstance(record[name], str) for name in ("revision", "subfolder"))
        and _matches(COMMIT_PATTERN, record["commit"])
        and _matches(_SHA256_PATTERN, record["digest"])
        and isinstance(files, dict)
        and set(files) - {EXAMPLES_NAME} == {CONFIG_NAME, WEIGHTS_NAME}
        and all(_matches(_SHA256_PATTERN, sha256) for sha256 in files.values())
    )


def _matches(pattern: str, value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None
