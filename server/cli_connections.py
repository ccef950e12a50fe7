"""Connections of `lora-mixer serve`: how long one may say nothing, how many there may be, and what the log says beyond.

Knows uvicorn's HTTP protocol and no route; bodies that do not come are for `api/` to wait for.
"""

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)

HEAD_TIMEOUT_S = 30.0
"""How long a connection may take until the head of its next request is there."""
MAX_OPEN_FILES = 65_536
"""As many as the system allows, up to this."""
LOG_INTERVAL_S = 10.0
_NO_DESCRIPTORS = "socket.accept() out of system resource"
"""What asyncio says, once for every connection that waits, every second."""


class ImpatientProtocol(H11Protocol):
    """Closes connections that do not ask for anything: uvicorn itself waits for ever for a first, or half a, head."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def allow_many_connections() -> None:
    """Raise this process's limit of open files, often 1,024, as far as it may."""
    try:
        import resource
    except ImportError:  # not a POSIX system
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def log_exhaustion_rarely(loop: asyncio.AbstractEventLoop) -> None:
    """Say now and then, and not for every connection that waits, that there are no file descriptors left."""
    said_s = -LOG_INTERVAL_S

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal said_s
        if context.get("message") != _NO_DESCRIPTORS:
            loop.default_exception_handler(context)
        elif loop.time() - said_s >= LOG_INTERVAL_S:
            said_s = loop.time()
            logger.error("no connection can be accepted: this process has as many open files as it may; see ulimit -n")

    loop.set_exception_handler(handle)
