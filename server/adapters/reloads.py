"""Weights of warm adapters on their way from disk to the bank: read and checked anew on threads of their own.

What the Hub's cache has lost meanwhile is downloaded into it first, on other threads and as long as somebody wants it.
Knows no bank, no slots and no requests: whoever wants an adapter finds it in `loaded` some time later.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor

from server.adapters.loading import AdapterLoader
from server.adapters.records import Record
from server.adapters.state import RegistryState
from server.adapters.weights import Adapter
from server.errors import AdapterRefusedError, LoraMixerError, NotReadyError, RefusalReason

logger = logging.getLogger(__name__)

NUM_THREADS = 2
"""Adapters read at a time, apart from registrations: a slow download must not hold up a request."""
NUM_DOWNLOADS = 4
"""Adapters downloaded again at a time."""
MAX_AHEAD = 4
"""Adapters read before there is room for them; their weights are in memory besides the budget."""


class _UnwantedError(Exception):
    """Nobody waits for this download any more. What has come stays for the next one."""


class Reloads:
    """What is being read, and what has been and is not in the bank yet."""

    def __init__(
        self,
        loader: AdapterLoader,
        state: RegistryState,
        *,
        on_loaded: Callable[[Record, float], object],
        on_failed: Callable[[Record, LoraMixerError, float], object],
        on_download: Callable[[], object],
    ) -> None:
        """The first two hear of every end, with the seconds it took, the last one when something turns out to be
        missing on this machine, and when it has come; all on a thread of this class.
        """
        self._loader = loader
        self._state = state
        self._on_loaded = on_loaded
        self._on_failed = on_failed
        self._on_download = on_download
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="adapter-reloader")
        self._downloaders = ThreadPoolExecutor(NUM_DOWNLOADS, thread_name_prefix="adapter-redownloader")
        self._is_closed = False
        self.loaded: dict[Record, Adapter] = {}
        """With the mutex."""
        self.downloading: set[Record] = set()
        """What is not on this machine, as it has turned out. With the mutex."""
        self._downloaded: set[Record] = set()
        """What has come since, and is not read yet."""
        self._reading: set[Record] = set()
        self._wanted: Collection[Record] = ()

    def want(self, records: Iterable[Record], urgent: Collection[Record]) -> None:
        """Start to read these, the first ones first, and forget others. With the mutex.

        Only so many are read ahead, `urgent` ones always: who is first in line must not wait for those behind.
        """
        self._wanted = wanted = dict.fromkeys(records)
        self.loaded = {record: adapter for record, adapter in self.loaded.items() if record in wanted}
        for record in wanted:
            is_known = record in self.loaded or record in self._reading or record in self.downloading
            has_room = len(self.loaded) + len(self._reading) < MAX_AHEAD or record in urgent
            if not is_known and has_room and not self._is_closed:
                self._reading.add(record)
                self._threads.submit(self._read, record)

    def close(self) -> None:
        """Finish what is being read, give up what is being downloaded, start nothing more."""
        with self._state.mutex:
            self._is_closed = True
        for threads in (self._threads, self._downloaders):
            threads.shutdown(wait=True, cancel_futures=True)

    def _read(self, record: Record) -> None:
        try:
            is_at_hand = self._loader.is_at_hand(record.spec)
        except Exception:  # a cache that cannot be read, say: what is wrong is for `load` to tell
            is_at_hand = True
        with self._state.mutex:
            is_to_come = not is_at_hand and record not in self._downloaded
            if is_to_come:
                self._reading.discard(record)
                if self._is_closed:
                    return
                self.downloading.add(record)
                self._downloaders.submit(self._download, record)
        if is_to_come:
            self._on_download()
        else:
            self._load(record)

    def _download(self, record: Record) -> None:
        """Only into the cache: who is read ahead, and so in memory, `want` decides."""
        start_s = time.monotonic()
        failure: LoraMixerError | None = None
        try:
            self._loader.fetch(record.spec, progress=lambda _done, _total: self._check(record))
        except _UnwantedError:
            logger.info("the download of adapter %s is abandoned: nobody waits for it any more", record.spec.name)
            self._abandon(record)
            return
        except Exception as error:
            failure = _known(error, record)
        with self._state.mutex:
            self.downloading.discard(record)
            if failure is None:
                self._downloaded.add(record)
        if failure is None:
            self._on_download()
        else:
            self._on_failed(record, failure, time.monotonic() - start_s)

    def _load(self, record: Record) -> None:
        start_s = time.monotonic()
        failure: LoraMixerError | None = None
        adapter: Adapter | None = None
        try:
            adapter = self._loader.load(record.spec, progress=lambda _done, _total: self._check(record))
            known = record.adapter
            if known is not None and adapter.digest != known.digest:
                raise AdapterRefusedError(record.spec.name, [_changed(known.digest, adapter.digest)])
        except Exception as error:
            failure = _known(error, record)
        with self._state.mutex:
            self._reading.discard(record)
            self._downloaded.discard(record)
            if failure is None and adapter is not None:
                self.loaded[record] = adapter
        seconds = time.monotonic() - start_s
        if failure is None:
            self._on_loaded(record, seconds)
        else:
            self._on_failed(record, failure, seconds)

    def _abandon(self, record: Record) -> None:
        """But somebody may have come to want it at this very moment."""
        with self._state.mutex:
            if record in self._wanted and not self._is_closed:
                self._downloaders.submit(self._download, record)
            else:
                self.downloading.discard(record)

    def _check(self, record: Record) -> None:
        if self._is_closed:
            raise NotReadyError("the server is shutting down")
        if record in self.downloading and record not in self._wanted:
            raise _UnwantedError


def _known(error: Exception, record: Record) -> LoraMixerError:
    """The error to report; what is none of ours is logged."""
    if isinstance(error, LoraMixerError):
        return error
    logger.error("adapter %s could not be loaded again", record.spec.name, exc_info=error)
    return LoraMixerError(f"internal error: {type(error).__name__}", code="internal_error")


def _changed(known: str, found: str) -> RefusalReason:
    message = (
        f"its source now holds digest {found[:12]}, not {known[:12]} as when it was registered; register it again to "
        "accept the new content"
    )
    return RefusalReason("content_changed", message, "source")
