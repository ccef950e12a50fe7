"""Connections of `lora-mixer serve`: how long one may say nothing or read nothing, how many there may be, and what the
log says beyond.

Knows uvicorn's HTTP protocol and no route; bodies that do not come are for `api/` to wait for.
"""

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)

HEAD_TIMEOUT_S = 30.0
"""How long a connection may take until the head of its next request is there."""
UNREAD_TIMEOUT_S = 60.0
MIN_READ_BYTES = 65_536
"""An answer waits in memory until it is read: this much of it in this time, or the connection is cut."""
MAX_OPEN_FILES = 65_536
"""As many as the system allows, up to this."""
LOG_INTERVAL_S = 10.0
_NO_DESCRIPTORS = "socket.accept() out of system resource"
"""What asyncio says, once for every connection that waits, every second."""


class ImpatientProtocol(H11Protocol):
    """Closes connections that do not ask for anything, and cuts those that do not read their answers: uvicorn itself
    waits for ever for a first, or half a, head, and for a reader.
    """

    _timer: asyncio.TimerHandle | None = None
    _unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # `pause_writing` whenever the kernel does not take all at once
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self._stop_unread()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_unread()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_unread()

    def _unsupported_upgrade_warning(self) -> None:
        """An `Upgrade` that is not known is to be ignored (RFC 9110, 7.8); uvicorn's advice would fill the log."""

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch_unread(self) -> None:
        size = self.transport.get_write_buffer_size()
        self._unread_timer = self.loop.call_later(UNREAD_TIMEOUT_S, self._judge_reader, size)

    def _judge_reader(self, size_before: int) -> None:
        if size_before - self.transport.get_write_buffer_size() < MIN_READ_BYTES:
            self.transport.abort()  # `close` would wait until all of it is read.
        else:
            self._watch_unread()

    def _stop_unread(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None


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
