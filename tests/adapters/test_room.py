"""Whose place a newcomer gets."""

import random

from server.adapters.room import Room, Seat, Taken


def seat(slot: int, num_bytes: int = 10, *, stays: bool = False, is_leased: bool = False, last_use: int = 0) -> Seat:
    return Seat(slot, num_bytes, stays, is_leased, last_use)


def test_free_room_is_taken_before_anybody_goes() -> None:
    room = Room([seat(1), seat(2)], max_bytes=35, max_slots=9)
    assert room.take([15]) == Taken((), ())
    assert room.take([1], keep=(2,)) == Taken((1,), ()), "the first one has it now"


def test_the_least_recently_used_idle_ones_go_first_and_only_as_many_as_needed() -> None:
    seats = [seat(1, last_use=3), seat(2, last_use=1), seat(3, last_use=2), seat(4, last_use=0, is_leased=True)]
    room = Room(seats, max_bytes=40, max_slots=9)
    assert room.take([11]) == Taken((2, 3), ())
    assert room.take([12], keep=(1,)) == Taken((), (4,)), "9 bytes were left over"


def test_who_stays_or_is_kept_never_goes() -> None:
    seats = [seat(1, stays=True), seat(2), seat(3)]
    assert Room(seats, max_bytes=30, max_slots=9).take([20]) == Taken((2, 3), ())
    assert Room(seats, max_bytes=30, max_slots=9).take([20], keep=(3,)) is None
    assert Room(seats, max_bytes=30, max_slots=9).take([21]) is None


def test_slots_are_a_budget_of_their_own() -> None:
    seats = [seat(1, 0, last_use=2), seat(2, 0, last_use=1)]
    assert Room(seats, max_bytes=None, max_slots=3).take([10**12]) == Taken((), ())
    assert Room(seats, max_bytes=None, max_slots=2).take([1]) == Taken((2,), ())
    assert Room(seats, max_bytes=None, max_slots=2).take([1, 1, 1]) is None


def test_a_request_that_failed_reserves_nothing() -> None:
    room = Room([seat(1), seat(2)], max_bytes=20, max_slots=9)
    assert room.take([21]) is None
    assert room.take([20]) == Taken((1, 2), ())


def test_what_can_never_fit_beside_those_that_stay_is_known() -> None:
    room = Room([seat(1, stays=True), seat(2)], max_bytes=30, max_slots=2)
    assert room.can_hold([20])
    assert not room.can_hold([21])
    assert not room.can_hold([1, 1])
    assert room.staying_bytes == 10


def test_budgets_hold_for_any_sequence_of_requests() -> None:
    rng = random.Random(5)
    for _ in range(300):
        seats = [
            seat(slot, rng.randint(0, 9), stays=rng.random() < 0.2, is_leased=rng.random() < 0.4, last_use=slot)
            for slot in range(rng.randint(0, 8))
        ]
        max_bytes, max_slots = sum(s.num_bytes for s in seats) + rng.randint(0, 9), len(seats) + rng.randint(0, 2)
        room = Room(seats, max_bytes=max_bytes, max_slots=max_slots)
        there = {s.slot: s for s in seats}
        new_bytes = num_new = 0
        for _ in range(5):
            sizes = [rng.randint(0, 12) for _ in range(rng.randint(1, 2))]
            if (taken := room.take(sizes)) is None:
                continue
            for slot in (*taken.idle, *taken.leased):
                gone = there.pop(slot)
                assert not gone.stays
                assert gone.is_leased == (slot in taken.leased)
            if taken.leased:
                assert all(s.stays or s.is_leased for s in there.values()), "idle ones go first"
            new_bytes, num_new = new_bytes + sum(sizes), num_new + len(sizes)
            assert new_bytes + sum(s.num_bytes for s in there.values()) <= max_bytes
            assert num_new + len(there) <= max_slots
