"""Who comes into the bank from disk, and in whose place: adapters are warm when they are on disk only.

What waiting requests need is read from disk at once, whatever runs. Room goes to them in order of arrival, from
adapters that no request uses, the least recently used first. Once what the oldest needs is read, and it can only have
the room of adapters that running requests use, those take no new requests: these get in line behind it. So every
request has its turn once those before it end, and an adapter's requests start in their order of arrival.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol

from server.adapters.leases import AdapterLease
from server.adapters.loading import AdapterLoader
from server.adapters.occupancy import stays
from server.adapters.records import AdapterState, Record
from server.adapters.reloads import Reloads
from server.adapters.residency import Residency
from server.adapters.roster import Resolution
from server.adapters.state import RegistryState
from server.adapters.waiting_line import Ticket, WaitingLine
from server.adapters.weights import Adapter
from server.errors import AdapterMemoryError, AdapterRefusedError, LoraMixerError, NotReadyError

logger = logging.getLogger(__name__)

NEVER_RETRY_S = 60
"""Retry-After of what cannot be served before somebody changes pins, routes or the budget."""


class ResidencyObserver(Protocol):
    """Who counts what happens."""

    def count_evictions(self, count: int, /) -> object:
        """So many adapters left the bank for others."""

    def count_reload(self, outcome: str, seconds: float, /) -> object:
        """A warm adapter was read again in so many seconds; `outcome` is `loaded` or the failure's code."""

    def count_wait(self, outcome: str, seconds: float, /) -> object:
        """A request has waited for adapters; `outcome` is `leased`, `left` or the failure's code."""


class NobodyCounts:
    """For registries that nobody measures."""

    def count_evictions(self, count: int) -> None: ...
    def count_reload(self, outcome: str, seconds: float) -> None: ...
    def count_wait(self, outcome: str, seconds: float) -> None: ...


class _Exchange(NamedTuple):
    victims: list[Record]
    newcomers: list[tuple[Record, Adapter]]


class Seating:
    """The line of waiting requests, and what is done for them. `serve` runs on the publisher's lane."""

    def __init__(
        self,
        state: RegistryState,
        residency: Residency,
        loader: AdapterLoader,
        observer: ResidencyObserver,
        *,
        max_waiting: int,
        serve_soon: Callable[[], object],
        release: Callable[[AdapterLease], None],
    ) -> None:
        """`serve_soon` has `serve` called; `release` takes leases back."""
        self._state = state
        self._residency = residency
        self.observer = observer
        self.serve_soon = serve_soon
        self._release = release
        self.line = WaitingLine(max_waiting)
        """With the mutex."""
        self._reloads = Reloads(
            loader, state, on_loaded=self._on_loaded, on_failed=self._on_failed, on_download=serve_soon
        )

    def close(self) -> None:
        """Stop the threads."""
        self._reloads.close()

    def is_downloading(self, names: Collection[str]) -> bool:
        """Whether one of these is not on this machine any more, and on its way here."""
        with self._state.mutex:
            return any(record.spec.name in names for record in self._reloads.downloading)

    def acquire(self, model: str, resolution: Resolution, count: int) -> list[AdapterLease]:
        """`count` leases of what the current roster resolved. With the mutex."""
        plan, slot_names = resolution
        self._state.acquire(plan, count)
        return [AdapterLease(plan, slot_names, model, self._release) for _ in range(count)]

    # Reloads' threads

    def _on_loaded(self, _record: Record, seconds: float) -> None:
        self.observer.count_reload("loaded", seconds)
        self.serve_soon()

    def _on_failed(self, record: Record, error: LoraMixerError, seconds: float) -> None:
        """Who waits for it hears why. What its source holds now is no longer what was checked: then it is FAILED;
        what the network or a disk did may be over the next time."""
        state = self._state
        logger.warning("adapter %s could not be loaded again: %s", record.spec.name, error)
        with state.mutex:
            if state.records.get(record.spec.name) is record:
                if isinstance(error, AdapterRefusedError) and record.state is AdapterState.READY:
                    record.state, record.failure, record.adapter = AdapterState.FAILED, error, None
                    state.commit(state.router, record)
                self._fail_waiting(record, error)
        self.observer.count_reload(error.code or "failed", seconds)
        self.serve_soon()

    def _fail_waiting(self, record: Record, error: LoraMixerError) -> None:
        """With the mutex."""
        for ticket in self.line.tickets:
            if record.spec.name in ticket.names:
                self.line.fail(ticket, error)

    # The publisher's lane

    def serve(self) -> None:
        """Give room and leases to who can have them now, in order."""
        while (exchange := self._next()) is not None:
            try:
                self._residency.exchange(*exchange)
            except NotReadyError:
                raise
            except Exception as error:
                logger.exception("adapters could not be brought into the bank")
                failure = LoraMixerError(f"internal error: {type(error).__name__}", code="internal_error")
                with self._state.mutex:
                    for record, _ in exchange.newcomers:
                        self._fail_waiting(record, failure)
                continue
            if exchange.victims:
                self.observer.count_evictions(len(exchange.victims))
            self._let_in(exchange.newcomers)

    def _let_in(self, newcomers: Sequence[tuple[Record, Adapter]]) -> None:
        """All who are in line for them start together, so that one visit serves them all; who comes later may have to
        wait behind others.
        """
        names = {record.spec.name for record, _ in newcomers}
        with self._state.mutex:
            self._state.closed -= {record.slot for record, _ in newcomers if record.slot is not None}
            for ticket in self.line.tickets:
                if not names.isdisjoint(ticket.names):
                    self._serve_ticket(ticket, lambda _: None)

    def _next(self) -> _Exchange | None:
        """Grant what is there, have read what is not, and choose who comes into the bank next."""
        with self._state.mutex:
            while (turn := self._walk()).has_granted:
                pass  # what was free before is in use now
            self._reloads.want(turn.wanted, turn.urgent)
            self._state.is_room_wanted = bool(turn.wanted)
            if turn.exchange is not None:
                for record, _ in turn.exchange.newcomers:
                    del self._reloads.loaded[record]
            return turn.exchange

    def _walk(self) -> "_Turn":
        turn = _Turn(self._state, self._residency)
        for ticket in self.line.tickets:
            turn.has_granted |= self._serve_ticket(ticket, lambda records: turn.consider(records, self._reloads))
        return turn

    def _serve_ticket(self, ticket: Ticket, consider: Callable[[Sequence[Record]], object]) -> bool:
        """Whether its request starts: all it needs is there, and not closed when `consider` has seen it. With the
        mutex."""
        state = self._state
        try:
            records = [state.ready(name) for name in ticket.names]
            consider(records)
            if any(record.slot is None or record.slot in state.closed for record in records):
                return False
            resolution = state.roster.resolve(ticket.model, ticket.adapters, None)
            self.line.grant(ticket, self.acquire(ticket.model, resolution, ticket.count))
        except LoraMixerError as error:
            self.line.fail(ticket, error)
            return False
        return True


class _Turn:
    """One walk along the line, from the oldest ticket on. With the mutex."""

    def __init__(self, state: RegistryState, residency: Residency) -> None:
        self._state = state
        self._residency = residency
        self._room = residency.room()
        self._kept: set[int] = set()
        self._coming: set[Record] = set()
        self._going: list[int] = []
        """Idle slots that are to make room for those considered so far."""
        self._is_blocked = False
        self.has_granted = False
        self.wanted: list[Record] = []
        self.urgent: Sequence[Record] = ()
        self.exchange: _Exchange | None = None
        state.closed.clear()

    def consider(self, records: Sequence[Record], reloads: Reloads) -> None:
        """Room for those of one ticket that are missing. Raises AdapterMemoryError if there never can be."""
        loaded = reloads.loaded
        missing = [record for record in records if record.slot is None]
        if not missing:
            return
        sizes = [record.memory_bytes for record in records if record.slot is None or not stays(self._state, record)]
        if not self._room.can_hold(sizes):
            raise AdapterMemoryError(self._residency.explain_full(sizes, self._room), retry_after_s=NEVER_RETRY_S)
        self.wanted += missing
        if not reloads.downloading.isdisjoint(missing):
            return  # nobody waits for room that a slow download will fill
        self.urgent = self.urgent or missing
        if self._is_blocked or self.exchange is not None:
            return
        self._kept |= {record.slot for record in records if record.slot is not None}
        new = [record for record in missing if record not in self._coming]
        taken = self._room.take([record.memory_bytes for record in new], keep=self._kept)
        is_read = all(record in loaded for record in missing)
        if taken is None or taken.leased:
            self._is_blocked = True  # whoever is behind must not take the room that this one waits for
            if taken is not None and is_read:
                self._state.closed |= {*taken.idle, *taken.leased}
            return
        self._coming |= set(new)
        self._going += taken.idle
        if len(new) == len(missing) and is_read:
            # What tickets before this one have not filled yet is room only once those go whom it is taken from.
            self._state.closed |= set(self._going)
            victims = [self._state.seated[slot] for slot in self._going]
            self.exchange = _Exchange(victims, [(record, loaded[record]) for record in missing])
