"""Server-sent events over ASGI, and work that ends when its client leaves. Knows nothing of what is sent."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.errors import INTERNAL_MESSAGE, encode_json, envelope_of, kind_of, request_id_of
from server.errors import LoraMixerError

logger = logging.getLogger(__name__)

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
"""OpenAI's last event of a stream that ended well."""

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # Tells nginx to pass events on at once.
}

STREAMED_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The whole answer, or its events with `stream`, `[DONE]` being the last.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}
"""For the OpenAPI document, of routes that may stream."""


def sse(content: object) -> bytes:
    """One event."""
    return framed(encode_json(content))


def framed(encoded: bytes) -> bytes:
    """Encoded JSON as an event. JSON escapes every line break, so the framing holds whatever the text is."""
    return b"data: " + encoded + b"\n\n"


class EventStream(Response):
    """Sends events as they come. `close` runs exactly when the response is over, even if it never began.

    A failure after the first byte can no longer change the status: it becomes an event `{"error": ...}`, and the stream
    ends without [DONE]. When the client leaves, the iterator is closed.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], close: Callable[[], None]) -> None:
        self._events = events
        self._close = close
        self.status_code = 200
        self.background = None
        self.init_headers(HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless_disconnected(receive, self._send_all(scope, send))
        except (ClientDisconnect, OSError):
            logger.debug("request %s: the client left", request_id_of(scope))
        finally:
            self._close()

    async def _send_all(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with aclosing(self._events) as events:
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        except LoraMixerError as error:
            status = kind_of(error).status
            logger.error("request %s: the stream ended with %d: %s", request_id_of(scope), status, error.message)
            await send({"type": "http.response.body", "body": sse(envelope_of(error)), "more_body": True})
        except (asyncio.CancelledError, OSError):
            raise
        except Exception:
            logger.exception("request %s: the stream failed unexpectedly", request_id_of(scope))
            error_body = {"message": INTERNAL_MESSAGE, "type": "server_error", "param": None, "code": "internal_error"}
            await send({"type": "http.response.body", "body": sse({"error": error_body}), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Result of `work`; raises ClientDisconnect, with `work` cancelled, when the client leaves first."""
    return await _unless_disconnected(request.receive, work)


async def _unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    working = asyncio.create_task(work)
    listening = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait((working, listening), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        listening.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
