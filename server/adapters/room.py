"""Who gets a place in the bank: a budget of bytes and slots, and from whom it is taken. Knows slots and sizes only."""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple


class Seat(NamedTuple):
    """One slot that is taken."""

    slot: int
    num_bytes: int
    stays: bool
    """Whether it may never be taken away: pinned or routed."""
    is_leased: bool
    last_use: int
    """Grows from use to use; 0 before the first."""


class Taken(NamedTuple):
    """Seats that newcomers get their room from."""

    idle: tuple[int, ...]
    """Slots that can be emptied now."""
    leased: tuple[int, ...]
    """Slots whose last request has to end before; without any, the newcomers can come now."""


class Room:
    """What is free, and who would go, at one moment. `take` reserves: several can be asked for one after the other."""

    def __init__(self, seats: Iterable[Seat], *, max_bytes: int | None, max_slots: int) -> None:
        # Idle ones first, then least recently used: what nobody uses goes before what somebody does, however old.
        self._seats = sorted(seats, key=lambda seat: (seat.is_leased, seat.last_use))
        self._max_bytes = max_bytes
        self._max_slots = max_slots
        self._free_slots = max_slots - len(self._seats)
        self._free_bytes = 0 if max_bytes is None else max_bytes - sum(seat.num_bytes for seat in self._seats)
        staying = [seat.num_bytes for seat in self._seats if seat.stays]
        self.staying_bytes, self.num_staying = sum(staying), len(staying)

    def can_hold(self, sizes: Sequence[int]) -> bool:
        """Whether adapters of these sizes can ever stand beside those that stay."""
        fits = self._max_bytes is None or self.staying_bytes + sum(sizes) <= self._max_bytes
        return fits and self.num_staying + len(sizes) <= self._max_slots

    def take(self, sizes: Sequence[int], *, keep: Collection[int] = ()) -> Taken | None:
        """Reserve room for newcomers of these sizes; `keep` are slots that must not go. None: not even then."""
        missing_bytes = 0 if self._max_bytes is None else sum(sizes) - self._free_bytes
        missing_slots = len(sizes) - self._free_slots
        going: list[Seat] = []
        for seat in self._seats:
            if missing_bytes <= 0 and missing_slots <= 0:
                break
            if not seat.stays and seat.slot not in keep:
                going.append(seat)
                missing_bytes -= seat.num_bytes
                missing_slots -= 1
        if missing_bytes > 0 or missing_slots > 0:
            return None
        self._seats = [seat for seat in self._seats if seat not in going]
        self._free_bytes, self._free_slots = -missing_bytes, -missing_slots
        idle = tuple(seat.slot for seat in going if not seat.is_leased)
        return Taken(idle, tuple(seat.slot for seat in going if seat.is_leased))
