"""Registrations and retirements: one decision at a time, kept in the journal before it is acknowledged, then loaded.

Order of what is durable: a registration is in the journal before its call returns, its digest before it serves, a
retirement before it is refused to anyone. So a crash at any moment leaves what was last acknowledged.
"""

import itertools
import logging
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

from server.adapters.examples import Example
from server.adapters.journal import Journal, JournalEntry
from server.adapters.load_jobs import LoadJobs
from server.adapters.loading import AdapterLoader
from server.adapters.publisher import Publisher
from server.adapters.records import AdapterInfo, AdapterState, Record
from server.adapters.residency import Residency
from server.adapters.sameness import asks_for_the_same, check_expected
from server.adapters.share_guard import ShareGuard
from server.adapters.state import RegistryState
from server.config import AdapterSpec
from server.errors import (
    AdapterConflictError,
    InvalidRequestError,
    LoraMixerError,
    NotReadyError,
    TooManyRegistrationsError,
)
from server.naming import reserved_by

logger = logging.getLogger(__name__)

NUM_LOADERS = 2
"""Adapters loaded from local folders at a time; more would only share the same disk and memory."""

NUM_DOWNLOADERS = 8
"""Adapters from the Hub that load at a time, apart from the local ones: some may be slow, and hold up nobody."""


class Registrations:
    """What changes which adapters there are. Every method may be called from any thread."""

    def __init__(
        self,
        loader: AdapterLoader,
        state: RegistryState,
        publisher: Publisher,
        residency: Residency,
        journal: Journal,
        guard: ShareGuard,
        *,
        base_model_name: str,
        max_adapters: int,
        max_loading: int,
        on_ready: Callable[[Record], object],
        on_retired: Callable[[Record], object],
        on_load: Callable[[str, float], object],
        tidy_soon: Callable[[], object],
    ) -> None:
        """`tidy_soon` has taken out of the bank what nobody can use any more."""
        self._loader = loader
        self._state = state
        self._publisher = publisher
        self._tidy_soon = tidy_soon
        self._journal = journal
        self._guard = guard
        self._base_model_name = base_model_name
        self._max_adapters = max_adapters
        self._max_loading = max_loading
        self._on_retired = on_retired
        self._loaders = ThreadPoolExecutor(NUM_LOADERS, thread_name_prefix="adapter-loader")
        self._downloaders = ThreadPoolExecutor(NUM_DOWNLOADERS, thread_name_prefix="adapter-downloader")
        self._decisions = threading.Lock()
        """Held from a decision until it is in the journal. Taken before the state's mutex."""
        self._numbers = itertools.count(1)
        self._generations: dict[str, int] = {}
        self._configured: dict[str, AdapterSpec] = {}
        self._is_closing = False
        self._jobs = LoadJobs(
            loader,
            state,
            publisher,
            residency,
            journal,
            guard,
            decisions=self._decisions,
            configured=self._configured,
            on_ready=on_ready,
            on_retired=on_retired,
            on_load=on_load,
            tidy_soon=tidy_soon,
        )

    def restore(self, configured: Sequence[AdapterSpec], admit: Callable[[AdapterSpec], object]) -> list[str]:
        """Start to load the configuration's adapters and the journal's; their names.

        `admit` raises LoraMixerError for a registered source that may not be loaded any more.
        """
        specs, entries = self._journal.restored(configured)
        self._configured.update({spec.name: spec for spec in configured})
        records = [Record(spec, self._next_generation(spec.name), is_configured=True) for spec in specs]
        for entry in entries:
            try:
                admit(entry.spec)
            except LoraMixerError as error:
                logger.error("adapter %s is not restored: %s", entry.spec.name, error)
                continue
            records.append(Record(entry.spec, entry.generation, expected_digest=entry.digest))
        alive = {(entry.spec.name, entry.generation) for entry in entries}
        self._journal.examples.sweep(alive | {(record.spec.name, record.generation) for record in records})
        names = []
        for record in records:
            with self._state.mutex:
                try:
                    self._add(record)
                except LoraMixerError as error:
                    logger.error("adapter %s is not served: %s", record.spec.name, error)
                    continue
            names.append(record.spec.name)
            self._start(record)
        return names

    def register(
        self, spec: AdapterSpec, expected: Collection[str] | None, examples: tuple[Example, ...] = ()
    ) -> AdapterInfo:
        """See `AdapterRegistry.register`."""
        if reserved_by(spec.name, self._base_model_name):
            message = f"{spec.name!r} is reserved for routing and the base model; choose another name"
            raise InvalidRequestError(message, param="name", code="reserved_name")
        while True:
            with self._state.mutex:
                known = self._state.records.get(spec.name)
            is_same = (
                known is not None and known.state is AdapterState.READY and self._is_content_of(spec, known, expected)
            )
            with self._decisions:
                with self._state.mutex:
                    if self._state.records.get(spec.name) is not known:
                        continue  # changed while the folder was compared
                    record = self._decide(spec, known, expected, is_same)
                    info = self._state.info(self._state.record(spec.name))
                if record is None:
                    return self._guard.readmit(known) if is_same and known is not None else info
                record.examples = examples
                self._keep(record, is_replacement=record is not self._state.records.get(spec.name))
            self._start(record)
            return info

    def retire(self, name: str, expected: Collection[str] | None) -> AdapterInfo:
        """See `AdapterRegistry.retire`."""
        with self._decisions:
            with self._state.mutex:
                if self._is_closing:
                    raise NotReadyError("the server is shutting down")  # its journal may be another's by now
                record = self._state.record(name)
                check_expected(name, expected, self._state.info(record))
            self._journal.remove(name, configured=self._configured.get(name))
            with self._state.mutex:
                if (replacement := self._state.replacements.pop(name, None)) is not None:
                    replacement.cancelled.set()
                    replacement.state = AdapterState.RETIRING
                is_warm = record.state is AdapterState.READY and record.slot is None
                if is_warm or record.state is AdapterState.FAILED or (record.state.is_loading and record.abandon()):
                    self._state.remove(record)
                record.state = AdapterState.RETIRING
                self._state.commit(self._state.router, record)
                info = self._state.info(record)
            self._journal.examples.forget(name)
            self._guard.forget(name)
            self._on_retired(record)  # now, not when the last request ends: until then a crash would forget to
        self._tidy_soon()
        return info

    def close(self) -> None:
        """Abandon loads and stop the threads."""
        with self._state.mutex:
            self._is_closing = True
            for record in (*self._state.records.values(), *self._state.replacements.values()):
                record.cancelled.set()
        self._publisher.close()
        for threads in (self._loaders, self._downloaders):
            threads.shutdown(wait=True, cancel_futures=True)
        with self._decisions:  # whoever has begun to write may end
            self._journal.close()

    def _start(self, record: Record) -> None:
        threads = self._downloaders if self._loader.may_download(record.spec) else self._loaders
        record.load = threads.submit(self._jobs.run, record)

    # Deciding

    def _decide(
        self, spec: AdapterSpec, known: Record | None, expected: Collection[str] | None, is_same: bool
    ) -> Record | None:
        """The new record to load, in its place already; None when the name has what is asked for. With the mutex."""
        check_expected(spec.name, expected, None if known is None else self._state.info(known))
        if known is None or known.state is AdapterState.FAILED:
            self._refuse_overload()
            record = Record(spec, self._next_generation(spec.name))
            self._add(record)
            return record
        pending = self._state.replacements.get(spec.name)
        if is_same and pending is not None and pending.state.is_loading:
            message = f"adapter {spec.name!r} is being replaced; wait until that has ended"
            raise AdapterConflictError(message, param="name")
        if known.state is not AdapterState.READY:
            if not known.state.is_loading or not asks_for_the_same(spec, known.spec, self._loader.root, commit=None):
                message = f"adapter {spec.name!r} is {known.state}; wait until that has ended"
                raise AdapterConflictError(message, param="name")
            return None
        if is_same:
            self._state.replacements.pop(spec.name, None)  # one that failed
            return None
        if expected is None:
            assert known.adapter is not None
            message = (
                f"the name {spec.name!r} is taken by other content or settings (source {known.spec.source!r}, routed "
                f"{known.spec.routed}, pinned {known.spec.pinned}, digest {known.adapter.digest[:12]}); retire it "
                "first, or send If-Match"
            )
            raise AdapterConflictError(message, param="name")
        return self._replacement(spec)

    def _replacement(self, spec: AdapterSpec) -> Record | None:
        """The record of a next generation; None when that one is loading already. With the mutex."""
        pending = self._state.replacements.get(spec.name)
        if pending is not None and pending.state.is_loading:
            if asks_for_the_same(spec, pending.spec, self._loader.root, commit=None):
                return None
            message = f"adapter {spec.name!r} is being replaced; wait until that has ended"
            raise AdapterConflictError(message, param="name")
        self._refuse_overload()
        record = Record(spec, self._next_generation(spec.name))
        self._state.replacements[spec.name] = record
        return record

    def _add(self, record: Record) -> None:
        """Give a record its name. Raises AdapterConflictError. With the mutex."""
        records, name = self._state.records, record.spec.name
        alive = [r for other, r in records.items() if r.state is not AdapterState.FAILED and other != name]
        folded, appearance = record.looks
        if alike := next((r for r in alive if r.looks[0] == folded or r.looks[1] == appearance), None):
            message = f"the name {name!r} looks like {alike.spec.name!r}, which is registered; choose another name"
            raise AdapterConflictError(message, param="name", code="confusable_name")
        if len(alive) >= self._max_adapters:
            message = f"{self._max_adapters} adapters are registered, the most allowed; retire one first"
            raise AdapterConflictError(message, param="name", code="too_many_adapters")
        # Failures are kept to be read, the oldest only as long as there is room.
        failed = [other for other, known in records.items() if known.state is AdapterState.FAILED]
        for other in {name, *failed[: max(0, len(failed) - self._max_adapters + 1)]}:
            records.pop(other, None)
        record.number = next(self._numbers)
        records[name] = record

    def _refuse_overload(self) -> None:
        """Raises TooManyRegistrationsError, and NotReadyError at the end. With the mutex."""
        if self._is_closing:
            raise NotReadyError("the server is shutting down")
        everyone = (*self._state.records.values(), *self._state.replacements.values())
        num_loading = sum(record.state.is_loading for record in everyone)
        if num_loading >= self._max_loading:
            message = f"{num_loading} adapters are loading, the most allowed at once; wait until one has ended"
            raise TooManyRegistrationsError(message, retry_after_s=5)

    def _next_generation(self, name: str) -> int:
        self._generations[name] = 1 + max(self._generations.get(name, 0), self._journal.generation(name))
        return self._generations[name]

    def _is_content_of(self, spec: AdapterSpec, known: Record, expected: Collection[str] | None) -> bool:
        """Whether `spec` means the very adapter that is READY. Reads a local folder, which may have changed since."""
        assert known.adapter is not None
        digest, commit = known.adapter.digest, known.adapter.revision
        if not asks_for_the_same(spec, known.spec, self._loader.root, commit=commit):
            return False
        if commit is not None:
            return True
        try:
            return self._loader.load(spec).digest == digest
        except LoraMixerError as error:
            if expected is not None:
                return False  # the load of the next generation reports it in full
            message = f"adapter {spec.name!r} is READY, but its source can no longer be loaded: {error.message}"
            raise AdapterConflictError(message, param="name") from error

    def _keep(self, record: Record, *, is_replacement: bool) -> None:
        """Have a registration in the journal before it is acknowledged. A next generation counts once it is loaded."""
        examples = self._journal.examples
        try:
            if record.examples:
                examples.keep(record.spec.name, record.generation, None, record.examples)
            if not is_replacement:
                self._journal.put(JournalEntry(record.spec, record.generation))
        except LoraMixerError:
            examples.forget(record.spec.name, only=record.generation)
            with self._state.mutex:
                self._state.remove(record)
                self._state.commit(self._state.router, record)
            raise
