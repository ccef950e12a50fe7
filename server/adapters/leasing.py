"""Where requests get their leases: at once, or after a wait for adapters that are on disk. `Seating` ends the wait."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future

from server.adapters.leases import AdapterLease
from server.adapters.roster import AUTO_MODEL, NotResidentError
from server.adapters.seating import Seating
from server.adapters.state import RegistryState
from server.adapters.waiting_line import Ticket
from server.errors import AdapterMemoryError, LoraMixerError, NotReadyError
from server.routing.policy import BASE_SLOT, Policy

logger = logging.getLogger(__name__)

AdapterChoice = Sequence[str] | Mapping[str, float] | None


class LeaseDesk:
    """For requests on any thread or event loop."""

    def __init__(self, state: RegistryState, seating: Seating, *, wait_s: float) -> None:
        """A request waits `wait_s` at most, unless it says otherwise."""
        self._state = state
        self._seating = seating
        self._line = seating.line
        self._wait_s = wait_s

    def lease_now(
        self, model: str, adapters: AdapterChoice, top_k: int | None, count: int
    ) -> list[AdapterLease] | None:
        """`count` leases if they can be had at once, else None. Raises what `Roster.resolve` raises."""
        return None if isinstance(found := self._try(model, adapters, top_k, count), tuple) else found

    def lease(
        self,
        model: str,
        adapters: AdapterChoice = None,
        top_k: int | None = None,
        count: int = 1,
        *,
        wait_s: float | None = None,
    ) -> list[AdapterLease]:
        """`count` leases, once they can be had; blocks. Raises as `lease_when_resident`."""
        ticket = self._enter(model, adapters, top_k, count)
        if not isinstance(ticket, Ticket):
            return ticket
        wait_s = self._wait_s if wait_s is None else wait_s
        with self._waiting(ticket, wait_s):
            return ticket.outcome.result(wait_s)

    async def lease_when_resident(
        self, model: str, adapters: AdapterChoice = None, top_k: int | None = None, count: int = 1
    ) -> list[AdapterLease]:
        """`lease`, for event loops. A caller that is cancelled holds nothing.

        Raises what `Roster.resolve` raises; AdapterMemoryError when there was no room in time, or never can be, or too
        many wait; what `AdapterLoader.load` raises, and AdapterRefusedError when the source holds other content than it
        did, which makes the adapter FAILED; NotReadyError when the server drains.
        """
        ticket = self._enter(model, adapters, top_k, count)
        if not isinstance(ticket, Ticket):
            return ticket
        with self._waiting(ticket, self._wait_s):
            try:
                async with asyncio.timeout(self._wait_s):
                    return await asyncio.wrap_future(ticket.outcome)
            except asyncio.CancelledError:
                self._give_back(ticket)
                raise

    @contextlib.contextmanager
    def _waiting(self, ticket: Ticket, wait_s: float) -> Iterator[None]:
        """Whatever ends the wait inside, the ticket is out of the line and the wait is counted."""
        start_s = time.monotonic()
        error: LoraMixerError | None = None
        try:
            yield
        except TimeoutError:
            error = self._too_late(ticket, wait_s)
            raise error from None
        except LoraMixerError as failure:
            error = failure
            raise
        finally:
            self._leave(ticket, start_s, error)

    def hold(self, names: Sequence[str], *, wait_s: float | None = None) -> AdapterLease:
        """One lease that keeps all these adapters in the bank; blocks. Raises as `lease_when_resident`."""
        return self.lease(AUTO_MODEL, dict.fromkeys(names, 1.0), wait_s=wait_s)[0]

    def bring_in(self, name: str, then: Callable[[], object]) -> None:
        """Have an adapter brought into the bank in its turn, however many wait and however long it takes. `then` is
        called on any thread while it is held there, or once that has turned out to be in vain, which is logged.
        """
        ticket = Ticket(name, None, 1, (name,))

        def tell(outcome: "Future[list[AdapterLease]]") -> None:
            if (error := outcome.exception()) is not None:
                logger.warning("adapter %s is served, but not in memory yet: %s", name, error)
            then()
            for lease in [] if error is not None else outcome.result():
                lease.release()

        ticket.outcome.add_done_callback(tell)
        try:
            with self._state.mutex:
                self._line.enter(ticket, is_limited=False)
        except NotReadyError as error:
            ticket.outcome.set_exception(error)
        self._seating.serve_soon()

    @property
    def num_waiting(self) -> int:
        """Requests in line."""
        return len(self._line)

    def refuse_waiting(self) -> None:
        """Send away who waits; nobody may wait any more. Leases that can be had at once still can."""
        with self._state.mutex:
            self._line.close()

    def _try(
        self, model: str, adapters: AdapterChoice, top_k: int | None, count: int
    ) -> list[AdapterLease] | tuple[str, ...]:
        """Leases, or the adapters that have to be waited for."""
        state = self._state
        while True:
            roster = state.roster
            try:
                resolution = roster.resolve(model, adapters, top_k)
            except NotResidentError as error:
                return error.names
            with state.mutex:
                if roster is not state.roster:
                    continue  # a slot of the plan may be gone: resolve again
                slots = {slot for slot in resolution.plan.slots if slot != BASE_SLOT}
                if resolution.plan.policy is Policy.ROUTED:
                    # What is routed to stays, so nobody has to get in line for it but while it is being replaced.
                    slots &= state.closed
                names = tuple(sorted(resolution.slot_names[slot] for slot in slots))
                if names and (self._line.has(names) or not state.closed.isdisjoint(slots)):
                    return names
                return self._seating.acquire(model, resolution, count)

    def _enter(self, model: str, adapters: AdapterChoice, top_k: int | None, count: int) -> list[AdapterLease] | Ticket:
        found = self._try(model, adapters, top_k, count)
        if not isinstance(found, tuple):
            return found
        ticket = Ticket(model, adapters, count, found)
        with self._state.mutex:
            self._line.enter(ticket)
        self._seating.serve_soon()
        return ticket

    def _too_late(self, ticket: Ticket, wait_s: float) -> AdapterMemoryError:
        is_downloading = self._seating.is_downloading(ticket.names)
        self._give_back(ticket)
        reason = (
            "the cache of the Hub has lost files of it, which are being downloaded again; retry later"
            if is_downloading
            else "running requests use what is there; retry later, or raise server.adapter_memory_mib"
        )
        message = f"{' and '.join(ticket.names)} could not be brought into memory within {wait_s:g} s: {reason}"
        return AdapterMemoryError(message, retry_after_s=5)

    def _give_back(self, ticket: Ticket) -> None:
        """Out of the line; or, when it was granted at this very moment, its leases go back."""
        with self._state.mutex:
            was_waiting = self._line.leave(ticket)
        if not was_waiting and ticket.outcome.exception() is None:
            for lease in ticket.outcome.result():
                lease.release()

    def _leave(self, ticket: Ticket, start_s: float, error: LoraMixerError | None) -> None:
        is_leased = ticket.outcome.done() and error is None
        outcome = "leased" if is_leased else "left" if error is None else error.code or "failed"
        self._seating.observer.count_wait(outcome, time.monotonic() - start_s)
        if not is_leased:
            self._seating.serve_soon()  # others may have what this one waited for
