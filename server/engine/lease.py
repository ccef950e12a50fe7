"""What a sequence holds of the registry while it runs, as far as the engine cares."""

from typing import Protocol


class Lease(Protocol):
    """What keeps a request's roster alive. `release` is called exactly once and must not raise.

    On the engine thread, except for a request that `AsyncEngine.submit` refuses: then on the caller's thread.
    """

    def release(self) -> None: ...


class NoLease:
    """Lease of a request that needs none (tests, base-only servers)."""

    def release(self) -> None:
        return None
