"""One load at a time per thread: fetch, check, confirm in the journal, admit; or the reason why not."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from server.adapters.journal import Journal, JournalEntry
from server.adapters.loading import AdapterLoader
from server.adapters.publisher import Publisher
from server.adapters.records import AdapterState, Record
from server.adapters.residency import CancelledLoadError, Residency
from server.adapters.share_guard import ShareGuard
from server.adapters.state import RegistryState
from server.config import AdapterSpec
from server.errors import AdapterRefusedError, LoraMixerError, RefusalReason

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 5.0
"""Between two log lines about one download."""

NUM_VALIDATING = 2
"""Adapters read and checked at a time; each takes its size in memory."""


class LoadJobs:
    """Takes records from DOWNLOADING to READY or FAILED. `run` may be called from any thread."""

    def __init__(
        self,
        loader: AdapterLoader,
        state: RegistryState,
        publisher: Publisher,
        residency: Residency,
        journal: Journal,
        guard: ShareGuard,
        *,
        decisions: threading.Lock,
        configured: Mapping[str, AdapterSpec],
        on_ready: Callable[[Record], object],
        on_retired: Callable[[Record], object],
        on_load: Callable[[str, float], object],
        tidy_soon: Callable[[], object],
    ) -> None:
        """`decisions` is held while the journal changes; `configured` lists the configuration's adapters by name.

        `on_ready` hears of every adapter that has come to serve, and what that leaves behind `tidy_soon` clears away;
        `on_retired` of every one whose load was abandoned since it was retired.
        """
        self._loader = loader
        self._state = state
        self._publisher = publisher
        self._residency = residency
        self._journal = journal
        self._guard = guard
        self._decisions = decisions
        self._configured = configured
        self._on_ready = on_ready
        self._on_retired = on_retired
        self._on_load = on_load
        self._tidy_soon = tidy_soon
        self._turns = threading.Semaphore(NUM_VALIDATING)

    def run(self, record: Record) -> None:
        """From DOWNLOADING to READY or FAILED."""
        start_s = time.monotonic()
        outcome = "ready"
        try:
            adapter = self._loader.load(
                record.spec,
                progress=lambda done, total: self._report(record, done, total),
                validating=lambda: self._validating(record),
            )
            if record.expected_digest not in (None, adapter.digest):
                raise AdapterRefusedError(record.spec.name, [_changed_content(record, adapter.digest)])
            self._guard.restore(record, adapter.digest)
            self._publisher.run(
                lambda: self._residency.admit(record, adapter, lambda: self._confirm(record, adapter.digest))
            )
            self._on_ready(record)
            self._tidy_soon()
        except CancelledLoadError:
            outcome = "cancelled"
            self._end(record, None)
        except LoraMixerError as error:
            outcome = error.code or "failed"
            logger.warning("adapter %s was not registered: %s", record.spec.name, error)
            self._end(record, error)
        except Exception as error:
            outcome = "internal_error"
            logger.exception("adapter %s could not be registered", record.spec.name)
            self._end(record, LoraMixerError(f"internal error: {type(error).__name__}", code=outcome))
        self._on_load(outcome, time.monotonic() - start_s)

    @contextlib.contextmanager
    def _validating(self, record: Record) -> Iterator[None]:
        with self._turns:
            self._report(record, 1, 1, AdapterState.VALIDATING)
            yield

    def _confirm(self, record: Record, digest: str) -> None:
        """Have the digest in the journal before the adapter serves, and not before that is sure to come: a restart must
        not serve a next generation for which there was no room. Raises CancelledLoadError if it was retired.
        """
        if record.is_configured:
            return
        with self._decisions:
            if record.cancelled.is_set():
                raise CancelledLoadError
            self._journal.put(
                JournalEntry(record.spec, record.generation, digest),
                configured=self._configured.get(record.spec.name),
                otherwise=f"generation {record.generation} of {record.spec.name!r} cannot serve",
            )

    def _report(self, record: Record, done: int, total: int, state: AdapterState | None = None) -> None:
        if record.cancelled.is_set():
            raise CancelledLoadError
        now_s = time.monotonic()
        with self._state.mutex:
            record.progress = done / total if total else 0.0
            if state is None:
                record.downloaded_bytes, record.download_bytes = (0, 0) if total <= 1 else (done, total)
            elif record.state.is_loading:
                record.state = state
            is_due = state is None and total > 1 and now_s - record.logged_s >= LOG_INTERVAL_S
            record.logged_s = now_s if is_due else record.logged_s
        if is_due:
            logger.info("adapter %s: %.1f of %.1f MB downloaded", record.spec.name, done / 1e6, total / 1e6)

    def _end(self, record: Record, failure: LoraMixerError | None) -> None:
        """A load that came to nothing: FAILED with its reason, or gone if it was retired meanwhile."""
        with self._decisions:
            with self._state.mutex:
                self._state.unseat(record)
                record.adapter = None
                is_retired = record.state is AdapterState.RETIRING
                is_failure = failure is not None and not is_retired
                if is_failure:
                    record.state, record.failure = AdapterState.FAILED, failure
                else:
                    self._state.remove(record)
                is_current = self._state.records.get(record.spec.name) is record
                self._state.commit(self._state.router, record)
            # A refusal is final. What the network or a disk did is tried again by a restart.
            is_final = isinstance(failure, AdapterRefusedError) and not record.expected_digest
            if is_failure and is_current and is_final:
                _logged(lambda: self._journal.remove(record.spec.name), not record.is_configured)
            if not (is_failure and is_current and (record.is_configured or not is_final)):
                self._journal.examples.forget(record.spec.name, only=record.generation)
        if is_retired:
            self._on_retired(record)  # again: it was still being downloaded when it was retired


def _changed_content(record: Record, digest: str) -> RefusalReason:
    message = (
        f"its source now holds digest {digest[:12]}, not {str(record.expected_digest)[:12]} as when it was registered; "
        "register it again to accept the new content"
    )
    return RefusalReason("content_changed", message, "source")


def _logged(task: Callable[[], object], is_wanted: bool) -> None:
    """Run a journal change that nobody waits for."""
    if is_wanted:
        try:
            task()
        except LoraMixerError as error:
            logger.warning("%s", error)
