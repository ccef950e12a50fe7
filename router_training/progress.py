"""Progress of long work on stderr: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0
"""Often enough to see that a run is alive, rare enough for a log file."""


class Progress:
    """`with Progress("validation", total=480, unit="chat") as progress: progress.advance(8, "nll 1.2")`."""

    def __init__(self, title: str, *, total: int, unit: str) -> None:
        self._title = title
        self._total = total
        self._unit = unit
        self._done = 0
        self._last_line = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._bar = tqdm(total=self._total, desc=self._title, unit=self._unit)
        return self

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more units are done; `note` is shown beside them."""
        self._done += count
        if self._bar is not None:
            self._bar.set_postfix_str(note)
            self._bar.update(count)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._print(note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif error is None:
            self._print("done")

    def _print(self, note: str) -> None:
        suffix = f", {note}" if note else ""
        print(f"{self._title}: {self._done} of {self._total} {self._unit}s{suffix}", file=sys.stderr, flush=True)
