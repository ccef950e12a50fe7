"""Counts the bytes of a download over several files that come one after the other."""

import threading
from collections.abc import Callable

Progress = Callable[[int, int], object]
"""Called with (bytes done, bytes in all; both 0 before the sizes are known). May raise to abandon the download."""


def ignore_progress(_done: int, _total: int) -> None:
    """Progress of callers that do not watch."""


class DownloadMeter:
    """Adds up files; what it reports never falls and never exceeds the total. Thread-safe."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._total = 0
        self._done_before = 0
        self._done = 0
        self._mutex = threading.RLock()
        """Held while reporting: of two reports the later one must not arrive first."""

    def start(self, total: int) -> None:
        """The sizes are known: `total` bytes in all."""
        with self._mutex:
            self._total = total
            self.report()

    def file_has(self, num_bytes: int) -> None:
        """This much of the current file is here. A file that begins anew shows no step back."""
        with self._mutex:
            self._done = max(self._done, min(self._done_before + num_bytes, self._total))
            self.report()

    def end_file(self, size_bytes: int) -> None:
        """The current file is complete; one that was cached has reported nothing before."""
        with self._mutex:
            self._done_before += size_bytes
            self.file_has(0)

    def report(self) -> None:
        """Say where we are, also when nothing has changed: the listener may want to abandon the whole."""
        with self._mutex:
            self._progress(self._done, self._total)
