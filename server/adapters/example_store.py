"""adapters.state.examples/: the examples that came over HTTP, from which a restart makes their adapters' rows anew.

The texts, not the rows: a row means something under one router artefact only; nor the tokens, which belong to one
tokenizer and template. One file per generation of a name, at most 64 lines of 64 KiB, for the server's user alone.
Whoever owns the journal beside it owns the folder; a file that no registration stands for goes at the next start.
"""

import contextlib
import json
import logging
import re
import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from server.adapters.examples import MAX_EXAMPLE_BYTES, MAX_EXAMPLES, Example, read_lines
from server.atomic_file import write_atomically
from server.errors import ConfigError, InvalidRequestError, RegistryFileError

logger = logging.getLogger(__name__)

STORE_VERSION = 1

FILE_MODE, FOLDER_MODE = 0o600, 0o700
"""Examples are prompts of somebody."""

MAX_STORED_BYTES = MAX_EXAMPLES * (MAX_EXAMPLE_BYTES + 1) + 1000
"""The most that `keep` writes: a first line of facts, then one example a line."""

_FILE_PATTERN = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)\.(?P<generation>\d+)\.jsonl")
"""What is ours in the folder, together with what a killed write left; anything else is left alone."""
_LEFTOVER_PATTERN = re.compile(_FILE_PATTERN.pattern + r".*\.tmp")


class ExampleStore:
    """The examples of one server's adapters. Thread-safe; every change is on disk when the call returns."""

    def __init__(self, folder: Path | None) -> None:
        """None keeps nothing: examples are gone with the process. Raises ConfigError when it cannot be read."""
        self._folder = folder
        self._mutex = threading.Lock()
        self._generations: dict[str, set[int]] = {}
        """name -> the generations that have a file."""
        try:
            paths = [] if folder is None or not folder.is_dir() else list(folder.iterdir())
        except OSError as error:
            raise ConfigError(f"{folder} cannot be read ({error.strerror}); give it to the server's user") from error
        for path in paths:
            if match := _FILE_PATTERN.fullmatch(path.name):
                self._generations.setdefault(match["name"], set()).add(int(match["generation"]))
            elif _LEFTOVER_PATTERN.fullmatch(path.name):
                with contextlib.suppress(OSError):
                    path.unlink()

    def keep(self, name: str, generation: int, digest: str | None, examples: Sequence[Example]) -> None:
        """Have all examples of an adapter on disk; `digest` is its content's, once that is known.

        Raises RegistryFileError, and then the file is what it was.
        """
        if self._folder is None:
            return
        facts = json.dumps({"version": STORE_VERSION, "digest": digest})
        text = "\n".join([facts, *(example.source for example in examples)]) + "\n"
        with self._mutex:
            try:
                self._folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
                self._folder.chmod(FOLDER_MODE)  # whatever made it
                write_atomically(self._path(name, generation), text, mode=FILE_MODE)
            except OSError as error:
                raise RegistryFileError(
                    f"{self._folder} cannot be written ({error.strerror}), so nothing was changed; free space, or set "
                    "server.registry_file to a file whose folder can be written",
                ) from error
            self._generations.setdefault(name, set()).add(generation)

    def recall(self, name: str, generation: int, digest: str) -> list[Any] | None:
        """Raw examples of an adapter with this content, None where there are none.

        Raises InvalidRequestError when the file is damaged.
        """
        with self._mutex:
            if generation not in self._generations.get(name, ()):
                return None
            path = self._path(name, generation)
            lines = read_lines(path, MAX_STORED_BYTES)
        facts = lines[0] if lines else None
        if not isinstance(facts, dict) or facts.get("version") != STORE_VERSION:
            message = (
                f"{path} is damaged: its first line is not that of version {STORE_VERSION}; send the examples again"
            )
            raise InvalidRequestError(message, param="examples", code="invalid_examples")
        if facts.get("digest") not in (None, digest):
            logger.warning("adapter %s has other content now; the examples kept for it are dropped", name)
            self.forget(name)
            return None
        return lines[1:]

    def forget(self, name: str, *, below: int | None = None, only: int | None = None) -> None:
        """Delete the examples of a name: all, or those of the generations `below` one, or those of one `only`."""
        with self._mutex:
            for generation in tuple(self._generations.get(name, ())):
                if only in (None, generation) and (below is None or generation < below):
                    self._delete(name, generation)

    def sweep(self, alive: Collection[tuple[str, int]]) -> None:
        """Delete what belongs to none of these (name, generation): a kill may come between a retirement and this."""
        with self._mutex:
            for name, generations in tuple(self._generations.items()):
                for generation in tuple(generations):
                    if (name, generation) not in alive:
                        self._delete(name, generation)

    def _delete(self, name: str, generation: int) -> None:
        """With the mutex."""
        try:
            self._path(name, generation).unlink(missing_ok=True)
        except OSError as error:
            logger.error("the examples of adapter %s cannot be deleted (%s); delete them by hand", name, error)
            return
        self._generations[name].discard(generation)
        if not self._generations[name]:
            del self._generations[name]

    def _path(self, name: str, generation: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}.{generation}.jsonl"
