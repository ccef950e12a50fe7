"""Who may still queue: counts what waits and runs, and refuses what exceeds the limits. Thread-safe.

Knows numbers only. Event loops call `enter`, the engine thread the rest.
"""

import threading

from server.errors import OverloadedError


class Admission:
    """Load as other threads see it. What was submitted counts as waiting from that moment on, and only once."""

    def __init__(self, *, max_waiting_requests: int, max_waiting_tokens: int, max_running: int) -> None:
        """Limits in sequences, prompt plus max_tokens of queued sequences, and sequences."""
        self._max_waiting_requests = max_waiting_requests
        self._max_waiting_tokens = max_waiting_tokens
        self._max_running = max_running
        self._lock = threading.Lock()
        self._on_the_way = 0
        self._tokens_on_the_way = 0
        self._waiting = 0
        self._waiting_tokens = 0
        self._running = 0

    @property
    def num_running(self) -> int:
        return self._running

    @property
    def num_waiting(self) -> int:
        """Sequences that were submitted and are not being computed."""
        with self._lock:
            return self._on_the_way + self._waiting

    def enter(self, num_sequences: int, num_tokens: int) -> None:
        """Count in all that one client asks for together, or raise OverloadedError.

        Free seats do not count as queue. What finds nobody waiting and a free seat starts at once and is taken whole,
        whatever the limits: its own sequences may wait for each other. So an idle server refuses nothing for good. Nor
        does the token limit stop what waits for nobody.
        """
        with self._lock:
            num_queued = self._on_the_way + self._waiting
            num_seats = max(0, self._max_running - self._running)
            starts_at_once = num_queued == 0 and num_seats > 0
            if not starts_at_once and num_queued + num_sequences > self._max_waiting_requests + num_seats:
                raise OverloadedError(
                    f"{num_queued} requests are waiting and {self._running} running already; retry later"
                )
            queued_tokens = self._tokens_on_the_way + self._waiting_tokens
            if num_queued and queued_tokens + num_tokens > self._max_waiting_tokens:
                raise OverloadedError(f"requests for {queued_tokens} tokens are waiting already; retry later")
            self._on_the_way += num_sequences
            self._tokens_on_the_way += num_tokens

    def update(self, *, running: int, waiting: int, waiting_tokens: int, arrived: tuple[int, int] = (0, 0)) -> None:
        """Take over the scheduler's numbers; `arrived` (sequences, tokens) are now among them, no longer on the way."""
        with self._lock:
            self._on_the_way -= arrived[0]
            self._tokens_on_the_way -= arrived[1]
            self._running, self._waiting, self._waiting_tokens = running, waiting, waiting_tokens
