"""adapters.state.excluded: adapters that had more of the routed traffic than their cap allows, so that a restart does
not let them in again. Owned by whoever owns the journal beside it. Decides nothing.
"""

import json
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from server.adapters.strict_json import StrictJsonError, parse_object
from server.atomic_file import remove_leftovers, write_atomically
from server.errors import ConfigError, RegistryFileError

FILE_VERSION = 1

MAX_FILE_BYTES = 4 * 1024**2
"""Largest file read; an entry has about 200 bytes, and there are no more than adapters."""


@dataclass(frozen=True)
class Exclusion:
    """Why an adapter left the routed pool."""

    generation: int
    digest: str
    share: float
    """Of the routed gate weight, when it was judged."""
    max_gate_share: float
    """The cap that it exceeded."""
    window_tokens: int
    """Token-weights after which it was judged."""

    @property
    def reason(self) -> str:
        return (
            f"it had {self.share:.1%} of the gate weight of the last {self.window_tokens} routed tokens, more than its "
            f"max_gate_share of {self.max_gate_share:g}; calibrate it or register it again to route to it again"
        )


class Exclusions:
    """The exclusions of one server. Thread-safe; every change is on disk when the call returns, or was not made."""

    def __init__(self, path: Path | None) -> None:
        """Reads `path` if it exists; None keeps nothing across restarts. Raises ConfigError when it is damaged."""
        self._path = path
        self._mutex = threading.Lock()
        if path is not None:
            remove_leftovers(path)
        self._entries = {} if path is None else _read(path)

    def get(self, name: str) -> Exclusion | None:
        with self._mutex:
            return self._entries.get(name)

    def put(self, name: str, exclusion: Exclusion) -> None:
        """Raises RegistryFileError when it cannot be kept."""
        with self._mutex:
            self._change({**self._entries, name: exclusion})

    def remove(self, name: str) -> None:
        """Nothing happens when there is none. Raises as `put` does."""
        with self._mutex:
            if name in self._entries:
                self._change({other: entry for other, entry in self._entries.items() if other != name})

    def _change(self, entries: dict[str, Exclusion]) -> None:
        if self._path is not None:
            record = {"version": FILE_VERSION, "excluded": {name: asdict(entry) for name, entry in entries.items()}}
            try:
                write_atomically(self._path, json.dumps(record, indent=1) + "\n")
            except OSError as error:
                raise RegistryFileError(
                    f"{self._path} cannot be written ({error.strerror}), so nothing was changed; free space, or set "
                    "server.registry_file to a file whose folder can be written",
                ) from error
        self._entries = entries


def _read(path: Path) -> dict[str, Exclusion]:
    try:
        content = parse_object(path.read_bytes(), max_bytes=MAX_FILE_BYTES)
        if content.get("version") != FILE_VERSION:
            raise StrictJsonError(f"its version is {content.get('version')!r}, this server reads {FILE_VERSION}")
        return {name: _entry(record) for name, record in content["excluded"].items()}
    except FileNotFoundError:
        return {}
    except (StrictJsonError, OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        advice = "restore it, or delete it to let every adapter in again"
        raise ConfigError(f"{path} is damaged: {type(error).__name__}: {error}; {advice}") from error


def _entry(record: Mapping[str, Any]) -> Exclusion:
    """Raises TypeError, ValueError or KeyError."""
    entry = Exclusion(
        int(record["generation"]),
        str(record["digest"]),
        float(record["share"]),
        float(record["max_gate_share"]),
        int(record["window_tokens"]),
    )
    if asdict(entry) != record:
        raise ValueError("an entry is not what this server writes")
    return entry
