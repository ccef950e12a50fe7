"""Weights of warm adapters on their way from disk to the bank: read and checked anew on threads of their own.

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
MAX_AHEAD = 4
"""Adapters read before there is room for them; their weights are in memory besides the budget."""


class Reloads:
    """What is being read, and what has been and is not in the bank yet."""

    def __init__(
        self,
        loader: AdapterLoader,
        state: RegistryState,
        *,
        on_loaded: Callable[[Record, float], object],
        on_failed: Callable[[Record, LoraMixerError, float], object],
    ) -> None:
        """Both hear of every end, with the seconds it took, on a thread of this class."""
        self._loader = loader
        self._state = state
        self._on_loaded = on_loaded
        self._on_failed = on_failed
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="adapter-reloader")
        self._is_closed = False
        self.loaded: dict[Record, Adapter] = {}
        """With the mutex."""
        self._loading: set[Record] = set()

    def want(self, records: Iterable[Record], urgent: Collection[Record]) -> None:
        """Start to read these, the first ones first, and forget others. With the mutex.

        Only so many are read ahead, `urgent` ones always: who is first in line must not wait for those behind.
        """
        wanted = dict.fromkeys(records)
        self.loaded = {record: adapter for record, adapter in self.loaded.items() if record in wanted}
        for record in wanted:
            is_known = record in self.loaded or record in self._loading
            has_room = len(self.loaded) + len(self._loading) < MAX_AHEAD or record in urgent
            if not is_known and has_room and not self._is_closed:
                self._loading.add(record)
                self._threads.submit(self._run, record)

    def close(self) -> None:
        """Finish what is being read, give up what is being downloaded, start nothing more."""
        with self._state.mutex:
            self._is_closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _run(self, record: Record) -> None:
        start_s = time.monotonic()
        failure: LoraMixerError | None = None
        adapter: Adapter | None = None
        try:
            adapter = self._loader.load(record.spec, progress=self._check)
            known = record.adapter
            if known is not None and adapter.digest != known.digest:
                raise AdapterRefusedError(record.spec.name, [_changed(known.digest, adapter.digest)])
        except LoraMixerError as error:
            failure = error
        except Exception as error:
            logger.exception("adapter %s could not be loaded again", record.spec.name)
            failure = LoraMixerError(f"internal error: {type(error).__name__}", code="internal_error")
        with self._state.mutex:
            self._loading.discard(record)
            if failure is None and adapter is not None:
                self.loaded[record] = adapter
        seconds = time.monotonic() - start_s
        if failure is None:
            self._on_loaded(record, seconds)
        else:
            self._on_failed(record, failure, seconds)

    def _check(self, _done: int, _total: int) -> None:
        if self._is_closed:
            raise NotReadyError("the server is shutting down")


def _changed(known: str, found: str) -> RefusalReason:
    message = (
        f"its source now holds digest {found[:12]}, not {known[:12]} as when it was registered; register it again to "
        "accept the new content"
    )
    return RefusalReason("content_changed", message, "source")
