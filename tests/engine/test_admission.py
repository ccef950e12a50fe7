"""Who may still queue, in numbers alone."""

import pytest

from server.engine.admission import Admission
from server.errors import OverloadedError


def test_what_finds_every_seat_taken_queues_though_nobody_waits() -> None:
    admission = Admission(max_waiting_requests=2, max_waiting_tokens=100, max_running=4)
    admission.enter(9, 90)
    admission.update(running=4, waiting=0, waiting_tokens=0, arrived=(9, 90))
    with pytest.raises(OverloadedError, match="0 requests are waiting and 4 running"):
        admission.enter(3, 30)
    admission.enter(2, 20)
    assert (admission.num_running, admission.num_waiting) == (4, 2)


def test_a_free_seat_takes_whatever_comes_together() -> None:
    admission = Admission(max_waiting_requests=2, max_waiting_tokens=100, max_running=4)
    admission.update(running=3, waiting=0, waiting_tokens=0)
    admission.enter(9, 900)
    with pytest.raises(OverloadedError, match="9 requests are waiting"):
        admission.enter(1, 1)
