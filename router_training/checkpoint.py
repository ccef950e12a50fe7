"""Checkpoints of a run: one file, replaced atomically, that only the run it belongs to may continue from, in a folder
that one run at a time may write.

Knows neither what a state holds nor when to save.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from server.errors import ConfigError

CHECKPOINT_NAME = "checkpoint.pt"


def run_fingerprint(facts: Mapping[str, Any]) -> str:
    """sha256 over everything that decides the outcome of a run: settings, data, adapters, base, library versions."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """The folder, made if need be, for this process alone until the block ends or the process does; no file tells.

    Raises ConfigError where it cannot be written, or while another run writes it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"--out {folder}: not a folder that can be written ({error.strerror})") from error
    try:
        if not os.access(folder, os.W_OK):
            raise ConfigError(f"--out {folder}: not a folder that can be written (no permission)")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"--out {folder}: another run writes there now; wait for it, or take another") from error
        yield
    finally:
        os.close(descriptor)


class Checkpoint:
    """The checkpoint file of one output folder."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._path = folder / CHECKPOINT_NAME
        self._fingerprint = fingerprint

    def load(self) -> dict[str, Any] | None:
        """The last state saved; None where the run has not come that far.

        Raises ConfigError if the folder holds the checkpoint of another run, which must not be overwritten unasked.
        """
        if not self._path.exists():
            return None
        try:
            content = torch.load(self._path, weights_only=True)
            fingerprint, state = content["fingerprint"], content["state"]
        except Exception as error:  # torch.load raises half a dozen unrelated classes for a damaged file
            raise ConfigError(f"{self._path} is damaged ({error}); delete it to begin again") from error
        if fingerprint != self._fingerprint:
            raise ConfigError(
                f"{self._path} belongs to an unfinished run with other settings, data, weights, dtype or thread count; "
                "repeat that run's command to finish it, delete the file, or take another --out"
            )
        loaded: dict[str, Any] = state
        return loaded

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint in one step: a kill at any moment leaves the old one or the new one, whole."""
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save({"fingerprint": self._fingerprint, "state": dict(state)}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)

    def delete(self) -> None:
        """The run is complete."""
        self._path.unlink(missing_ok=True)
        self._path.with_suffix(".tmp").unlink(missing_ok=True)
