"""Counts the bytes of a download over several files. huggingface_hub reports them through a class that acts as tqdm."""

from collections.abc import Callable
from typing import Any

from tqdm.std import tqdm

from server.errors import AdapterDownloadError

Progress = Callable[[int, int], object]
"""Called with (bytes done, bytes in all). May raise to abandon the download."""

MAX_EXCESS_BYTES = 16 * 1024**2
"""Bytes beyond the stated sizes after which a download is abandoned; more than the client's largest chunk (10 MB), so
that its own accounting of retries never trips it. Exact lengths are checked when a file is complete."""


def ignore_progress(_done: int, _total: int) -> None:
    """Progress of callers that do not watch."""


class DownloadMeter:
    """Adds up the bytes of files that come one after the other."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done_before = 0
        self._done_in_file = 0

    def start_file(self) -> None:
        """A file begins, possibly anew."""
        self._done_in_file = 0
        self._report()

    def end_file(self, size_bytes: int) -> None:
        """A file is complete; one that was cached has reported nothing before."""
        self._done_before += size_bytes
        self.start_file()

    def advance(self, num_bytes: int) -> None:
        """Raises AdapterDownloadError when far more arrives than the Hub said there is."""
        self._done_in_file += num_bytes
        if self._done_before + self._done_in_file > self._total + MAX_EXCESS_BYTES:
            raise AdapterDownloadError(f"the Hub sends more than the {self._total} bytes that it stated")
        self._report()

    def bar_class(self) -> Any:
        """What `hf_hub_download` takes as `tqdm_class`: a progress bar that shows nothing and reports here.

        A real tqdm, since the client uses more of its interface for some storages than for others. `update_transfer`
        tells the client that one bar takes both counts of a Xet download: bytes written, and bytes received on the
        wire, which compression and deduplication make meaningless here.
        """
        meter = self

        class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **{**options, "disable": True})
                meter.advance(int(options.get("initial", 0)))

            def update(self, n: float | None = 1) -> None:
                meter.advance(int(n or 0))

            def update_transfer(self, _num_bytes: float) -> None:
                return None

            def set_transfer_postfix_str(self, *_: Any, **__: Any) -> None:
                return None

        return Bar

    def _report(self) -> None:
        self._progress(min(self._done_before + self._done_in_file, self._total), self._total)
