"""Trying again what the Hub may yet do: waits that grow, that the Hub may lengthen, and that can be abandoned.

Goes by class names and status codes, as `hub_errors` does.
"""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from server.adapters.hub_errors import asked_wait_s, causes, is_storages, status_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

TRANSIENT_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
TRANSIENT_NAMES = ("Timeout", "ConnectError", "ReadError", "WriteError", "CloseError", "RemoteProtocolError")
"""Parts of the names of exceptions for connections that failed or broke."""

MAX_RETRY_AFTER_S = 60.0
"""Longest wait that the Hub may ask for; beyond, the registration fails and says so."""

SLICE_S = 0.2
"""How often a wait looks whether it was abandoned."""


class CutShortError(OSError):
    """A body ended before its stated length."""


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how patiently."""

    num_retries: int = 4
    first_wait_s: float = 0.5
    """Doubles with every failure, up to `max_wait_s`; up to a quarter less, so that servers do not march in step."""
    max_wait_s: float = 8.0

    def call(self, attempt: Callable[[], T], *, what: str, check: Callable[[], object]) -> T:
        """The first result of `attempt`; raises its last error, its first permanent one, or what `check` raises.

        `check` is called often while waiting and raises to abandon the whole.
        """
        for failures in range(self.num_retries):
            try:
                return attempt()
            except Exception as error:
                wait_s = self._wait_s(error, failures)
                if wait_s is None:
                    raise
                names = [type(cause).__name__ for cause in causes(error)]
                problem = f"HTTP {status}" if (status := status_of(error)) is not None else names[-1]
                logger.warning(
                    "%s failed (%s), try %d of %d in %.1f s", what, problem, failures + 2, self.num_retries + 1, wait_s
                )
            _wait(wait_s, check)
        return attempt()

    def _wait_s(self, error: Exception, failures: int) -> float | None:
        """Seconds until the next try; None when another one is pointless."""
        if not is_transient(error):
            return None
        wait_s: float = min(self.max_wait_s, self.first_wait_s * 2.0**failures) * random.uniform(0.75, 1.0)
        asked_s = asked_wait_s(error)
        if asked_s is None:
            return wait_s
        return None if asked_s > MAX_RETRY_AFTER_S else max(wait_s, asked_s)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    status = status_of(error)
    if status is not None:
        # The Hub's links expire. The next try asks it for a new one.
        return status in TRANSIENT_STATUSES or (status == 403 and is_storages(error))
    return any(
        isinstance(cause, CutShortError) or any(part in type(cause).__name__ for part in TRANSIENT_NAMES)
        for cause in causes(error)
    )


def _wait(seconds: float, check: Callable[[], object]) -> None:
    until_s = time.monotonic() + seconds
    check()
    while (left_s := until_s - time.monotonic()) > 0:
        time.sleep(min(SLICE_S, left_s))
        check()
