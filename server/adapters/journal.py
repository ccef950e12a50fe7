"""adapters.state: what was registered and retired while the server ran, so that a restart serves what it acknowledged.

adapters.yaml is the operator's and never written. The journal holds the difference: adapters registered over HTTP, and
configured ones that were retired; sources and digests only, never a token. Its first line is a JSON object with
everything, each further line one change, so that a change costs the same however many adapters there are; every so
often all of it is written anew as one line. A last line without its end was cut off by a crash, before anybody heard of
the change. One server at a time may use a journal.
"""

import errno
import fcntl
import json
import logging
import os
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from server.adapters.example_store import ExampleStore
from server.adapters.exclusions import Exclusions
from server.adapters.strict_json import StrictJsonError, parse_object
from server.atomic_file import remove_leftovers, write_atomically
from server.config import AdapterSpec
from server.errors import ConfigError, RegistryFileError

logger = logging.getLogger(__name__)

JOURNAL_VERSION = 2
"""Version 1 was the same first object, on many lines and without changes after it; it is still read."""

MIN_CHANGES = 1000
"""Changes after which the file is written anew, or as many as there are adapters, if those are more."""

MAX_JOURNAL_BYTES = 64 * 1024**2
"""Largest journal read; an entry has about 300 bytes."""

MAX_GENERATIONS = 10_000
"""Names whose count of registrations is remembered after they retired; the oldest are forgotten first."""


@dataclass(frozen=True)
class JournalEntry:
    """One adapter that was registered over HTTP."""

    spec: AdapterSpec
    generation: int
    digest: str | None = None
    """Digest once it was found sound; a restart must find the same."""


class Journal:
    """The journal of one server. Thread-safe; every change is on disk when the call returns, or was not made."""

    def __init__(self, path: Path | None) -> None:
        """Reads `path` if it exists; None keeps nothing. Raises ConfigError when it is damaged.

        Where it cannot be written, or while another server uses it, nothing is kept either, with a warning.
        """
        self._mutex = threading.Lock()
        self._entries: dict[str, JournalEntry] = {}
        self._retired: dict[str, AdapterSpec] = {}
        self._generations: dict[str, int] = {}
        self._size = 0
        """Bytes of the file that count; 0 while there is none of this version."""
        self._num_changes = 0
        self._lock_descriptor: int | None = None
        self._path = path if path is not None and self._claim(path) else None
        self.examples = ExampleStore(self._path and self._path.with_name(f"{self._path.name}.examples"))
        """Stands beside the journal, for files that are nobody else's business, and is kept where that is."""
        self.exclusions = Exclusions(self._path and self._path.with_name(f"{self._path.name}.excluded"))
        """Likewise: who is out of the routed pool, configured adapters included."""
        if self._path is not None:
            remove_leftovers(self._path)
            self._read(self._path)

    def close(self) -> None:
        """Let another server use the file."""
        if self._lock_descriptor is not None:
            os.close(self._lock_descriptor)
            self._lock_descriptor = None

    def restored(self, configured: Sequence[AdapterSpec]) -> tuple[list[AdapterSpec], list[JournalEntry]]:
        """What a start has to load: configured adapters still wanted, and registered ones.

        A configured adapter that was retired stays so until its lines in the configuration change; a name that the
        configuration has come to give to something else is the configuration's.
        """
        with self._mutex:
            entries, wanted = dict(self._entries), []
            for spec in configured:
                if self._retired.get(spec.name) == spec:
                    if spec.name not in entries:
                        logger.warning("adapter %s was retired while the server ran and stays so", spec.name)
                    continue
                if entries.pop(spec.name, None) is not None:
                    logger.warning("adapter %s is the configuration's now; its registration is dropped", spec.name)
                wanted.append(spec)
            self._drop({spec.name for spec in wanted})
            return wanted, list(entries.values())

    def generation(self, name: str) -> int:
        """How many times the name has been registered, as far as is remembered."""
        with self._mutex:
            return self._generations.get(name, 0)

    def put(
        self,
        entry: JournalEntry,
        *,
        configured: AdapterSpec | None = None,
        otherwise: str = "nothing was changed",
    ) -> None:
        """Add an adapter, or replace the one of its name; `configured` is what the configuration lists under the name
        and no longer counts. Raises RegistryFileError when it cannot be kept, which says that `otherwise` is the case.
        """
        with self._mutex:
            self._keep({"put": _entry_record(entry), "retired": configured and _spec_record(configured)}, otherwise)
            self._put(entry, configured)

    def remove(self, name: str, *, configured: AdapterSpec | None = None) -> None:
        """Forget an adapter; `configured` says that the configuration lists it. Raises RegistryFileError as `put`."""
        with self._mutex:
            is_retired = configured is None or self._retired.get(name) == configured
            if name not in self._entries and is_retired:
                return
            self._keep({"remove": name, "retired": configured and _spec_record(configured)})
            self._remove(name, configured)

    def _drop(self, names: Collection[str]) -> None:
        """Forget registrations and retirements that the configuration has overtaken, for good: it may come to list
        again what was retired. With the lock.
        """
        if not any(name in self._entries or name in self._retired for name in names):
            return
        for name in names:
            self._entries.pop(name, None)
            self._retired.pop(name, None)
        if self._path is not None:
            try:
                self._rewrite(self._path)
            except OSError as error:
                logger.warning("%s", _unwritable(self._path, error, "the next start looks at it again"))

    def _put(self, entry: JournalEntry, configured: AdapterSpec | None) -> None:
        name = entry.spec.name
        self._entries[name] = entry
        self._generations[name] = max(entry.generation, self._generations.pop(name, 0))  # now the youngest
        if len(self._generations) > MAX_GENERATIONS:
            del self._generations[next(iter(self._generations))]
        if configured is not None:
            self._retired[name] = configured

    def _remove(self, name: str, configured: AdapterSpec | None) -> None:
        self._entries.pop(name, None)
        if configured is not None:
            self._retired[name] = configured

    def _keep(self, change: Mapping[str, Any], otherwise: str = "nothing was changed") -> None:
        """Have a change on disk. Raises RegistryFileError, and then the file is what it was."""
        if self._path is None:
            return
        try:
            if self._num_changes >= max(MIN_CHANGES, len(self._entries)) or not self._append(self._path, change):
                self._rewrite(self._path)
                if not self._append(self._path, change):
                    raise OSError(errno.EIO, "the file changed while it was written")
        except OSError as error:
            raise _unwritable(self._path, error, otherwise) from error

    def _append(self, path: Path, change: Mapping[str, Any]) -> bool:
        """False if the file is not the one that this journal has written last. Raises OSError."""
        line = (json.dumps(change) + "\n").encode()
        if self._size == 0:
            return False
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            if os.fstat(descriptor).st_size < self._size:
                return False
            os.ftruncate(descriptor, self._size)  # what an earlier change that failed may have left
            try:
                if os.pwrite(descriptor, line, self._size) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, self._size)  # a restart must not read what was refused
                raise
        finally:
            os.close(descriptor)
        self._size += len(line)
        self._num_changes += 1
        return True

    def _rewrite(self, path: Path) -> None:
        """Everything as one line, without changes after it."""
        record = {
            "version": JOURNAL_VERSION,
            "adapters": [_entry_record(entry) for entry in self._entries.values()],
            "retired": [_spec_record(spec) for spec in self._retired.values()],
            "generations": self._generations,
        }
        text = json.dumps(record) + "\n"
        self._size = 0  # should the folder not be written out, this one is there even so, and must not be appended to
        write_atomically(path, text)
        self._size, self._num_changes = len(text.encode()), 0

    def _claim(self, path: Path) -> bool:
        """Whether this server may write the journal; holds the claim until `close` or the end of the process."""
        reason = "another server uses it"
        try:
            descriptor = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._lock_descriptor = descriptor
                return True
            except OSError:
                os.close(descriptor)
        except OSError as error:
            reason = str(error.strerror)
        logger.warning("%s is not used (%s): registrations over HTTP will not survive a restart", path, reason)
        return False

    def _read(self, path: Path) -> None:
        try:
            data = path.read_bytes()
            if len(data) > MAX_JOURNAL_BYTES:
                raise StrictJsonError(f"it has {len(data)} bytes, more than the limit of {MAX_JOURNAL_BYTES}")
            self._parse(data)
        except FileNotFoundError:
            return
        except (StrictJsonError, OSError, ValidationError, ValueError, KeyError, TypeError, AttributeError) as error:
            advice = "restore it, or delete it to start with the adapters of the configuration alone"
            raise ConfigError(f"{path} is damaged: {type(error).__name__}: {error}; {advice}") from error

    def _parse(self, data: bytes) -> None:
        first, *changes = data.split(b"\n")
        has_changes = first.startswith(b'{"version": 2,')
        content = parse_object(first if has_changes else data, max_bytes=MAX_JOURNAL_BYTES)
        if content.get("version") not in (1, JOURNAL_VERSION):
            raise StrictJsonError(f"its version is {content.get('version')!r}, this server reads {JOURNAL_VERSION}")
        entries = [_entry(record) for record in content["adapters"]]
        retired = [AdapterSpec.model_validate(record) for record in content["retired"]]
        self._generations = {str(name): int(count) for name, count in content["generations"].items()}
        self._entries = {entry.spec.name: entry for entry in entries}
        self._retired = {spec.name: spec for spec in retired}
        if not has_changes:
            return  # the first change writes the file anew
        cut_off = changes.pop() if changes else first
        for line in changes:
            self._apply(parse_object(line, max_bytes=MAX_JOURNAL_BYTES))
        self._size, self._num_changes = len(data) - len(cut_off), len(changes)

    def _apply(self, change: Mapping[str, Any]) -> None:
        configured = None if change["retired"] is None else AdapterSpec.model_validate(change["retired"])
        if "put" in change:
            self._put(_entry(change["put"]), configured)
        else:
            self._remove(str(change["remove"]), configured)


def _unwritable(path: Path, error: OSError, outcome: str) -> RegistryFileError:
    return RegistryFileError(
        f"{path} cannot be written ({error.strerror}), so {outcome}; free space, or set server.registry_file to a file "
        "that can be written"
    )


def _spec_record(spec: AdapterSpec) -> dict[str, Any]:
    """Every field, but `routed` only if it was said: asking for routing and not objecting to it are not the same."""
    return spec.model_dump(exclude=set() if "routed" in spec.model_fields_set else {"routed"})


def _entry_record(entry: JournalEntry) -> dict[str, Any]:
    return {"spec": _spec_record(entry.spec), "generation": entry.generation, "digest": entry.digest}


def _entry(record: Mapping[str, Any]) -> JournalEntry:
    digest = record["digest"]
    if digest is not None and not isinstance(digest, str):
        raise StrictJsonError("a digest is no text")
    return JournalEntry(AdapterSpec.model_validate(record["spec"]), int(record["generation"]), digest)
