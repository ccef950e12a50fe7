"""Requests that wait until their adapters are in the bank, in order of arrival. Calls hold the registry's mutex."""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from server.adapters.leases import AdapterLease
from server.errors import AdapterMemoryError, LoraMixerError, NotReadyError


@dataclass(eq=False)
class Ticket:
    """One waiting request: what it asked for, which adapters that needs, and how many leases, to be had at once."""

    model: str
    adapters: Sequence[str] | Mapping[str, float] | None
    count: int
    names: tuple[str, ...]
    outcome: "Future[list[AdapterLease]]" = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.outcome.set_running_or_notify_cancel()  # nobody can cancel it: whoever gives up says so to the line


class WaitingLine:
    """Tickets that have no outcome yet."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max(1, max_waiting)
        self._tickets: dict[Ticket, None] = {}
        self._names: Counter[tuple[str, ...]] = Counter()
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._tickets)

    @property
    def tickets(self) -> tuple[Ticket, ...]:
        """The oldest first."""
        return tuple(self._tickets)

    def has(self, names: tuple[str, ...]) -> bool:
        """Whether somebody waits for exactly these adapters."""
        return names in self._names

    def enter(self, ticket: Ticket, *, is_limited: bool = True) -> None:
        """Raises AdapterMemoryError when too many wait and the ticket `is_limited`; NotReadyError once it is closed."""
        if self._is_closed:
            raise NotReadyError("the server is draining")
        if is_limited and len(self._tickets) >= self._max_waiting:
            raise AdapterMemoryError(
                f"{len(self._tickets)} requests wait for adapters to be loaded already; retry later", retry_after_s=5
            )
        self._tickets[ticket] = None
        self._names[ticket.names] += 1

    def leave(self, ticket: Ticket) -> bool:
        """Take a ticket out; whether it was still in."""
        if ticket not in self._tickets:
            return False
        del self._tickets[ticket]
        self._names[ticket.names] -= 1
        if not self._names[ticket.names]:
            del self._names[ticket.names]
        return True

    def grant(self, ticket: Ticket, leases: list[AdapterLease]) -> None:
        """It waits no more."""
        if self.leave(ticket):
            ticket.outcome.set_result(leases)

    def fail(self, ticket: Ticket, error: LoraMixerError) -> None:
        """It waits no more, in vain."""
        if self.leave(ticket):
            ticket.outcome.set_exception(error)

    def close(self) -> None:
        """Send everybody away."""
        self._is_closed = True
        for ticket in self.tickets:
            self.fail(ticket, NotReadyError("the server is draining"))
