"""ASGI layers around every route: request ids and a last resort, HEAD, and limits on bodies while they are read."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import error_response, has_route, unexpected_error_response
from server.errors import InvalidRequestError, LoraMixerError, NotReadyError, PayloadTooLargeError

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
DRAIN_LIMIT_BYTES = 64 * 1024**2
DRAIN_LIMIT_S = 5.0
"""How much of a refused body is read and thrown away, so that its sender gets to read the refusal."""
BODY_LIMIT_S = 60.0
"""Longest that a body may take to arrive: `max_body_bytes` by default, at 70 KB a second."""
BODY_POLL_S = 0.5
"""How soon a pending read notices the limit, or that the server drains."""


class RequestScope:
    """Outermost layer: gives the request an id, logs its end, and answers 500 for whatever nobody handled."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started_s, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            response = unexpected_error_response(scope)
            if status == 0:
                await response(scope, receive, send_with_id)
        finally:
            elapsed_ms = 1000 * (time.monotonic() - started_s)
            logger.debug("request %s: %s %s %d %.1f ms", request_id, scope["method"], scope["path"], status, elapsed_ms)


class HeadAsGet:
    """Answers HEAD wherever GET is answered, as RFC 9110 wants it. The HTTP server knows that HEAD was asked for,
    and sends the headers only.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


class _BodyLateError(Exception):
    """A body has not arrived in time; the answer to its sender."""

    def __init__(self, error: LoraMixerError, status: int | None = None) -> None:
        super().__init__(error.message)
        self.error = error
        self.status = status


class BodyGate:
    """Reads bodies before any route sees them: JSON only, at most `max_body_bytes`, within BODY_LIMIT_S, and none that
    is still on its way when the server drains.

    Requiring JSON also keeps web pages of other origins out: a browser sends them cross-origin only after a CORS
    preflight, which this server never answers.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, is_draining: Callable[[], bool]) -> None:
        self._app = app
        self._max_bytes = max_body_bytes
        self._is_draining = is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        if not has_route(scope, scope["method"]):
            await self._app(scope, receive, send)  # 404 or 405, whatever the body is
            return
        headers = Headers(scope=scope)
        if (refusal := _unsupported_media_type(scope, headers)) is not None:
            await refusal(scope, receive, send)
            return
        declared = headers.get("content-length", "")
        try:
            is_too_large = declared.isdigit() and int(declared[:20]) > self._max_bytes
            body = None if is_too_large else await self._read(receive)
        except ClientDisconnect:
            return
        except _BodyLateError as late:
            response = error_response(scope, late.error, late.status)
            response.headers["Connection"] = "close"
            await response(scope, receive, send)
            return
        if body is None:
            await self._refuse(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; None as soon as it is too large. Raises ClientDisconnect if its sender leaves halfway, and
        _BodyLateError.
        """
        parts: list[bytes] = []
        size, deadline_s = 0, time.monotonic() + BODY_LIMIT_S
        while True:
            try:
                async with asyncio.timeout(BODY_POLL_S):
                    message = await receive()
            except TimeoutError:
                message = {"type": "http.request", "more_body": True}
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_bytes:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)
            if self._is_draining():
                raise _BodyLateError(NotReadyError("The server is shutting down. Try again later."))
            if time.monotonic() > deadline_s:
                why = f"The request body did not arrive within {BODY_LIMIT_S:g} seconds."
                raise _BodyLateError(InvalidRequestError(why, code="request_timeout"), 408)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the refusal first and end the response only after reading on for a while: closing a connection with
        unread bytes resets it, and the client would never see why.
        """
        response = error_response(
            scope, PayloadTooLargeError(f"The request body is larger than the limit of {self._max_bytes} bytes.")
        )
        response.headers["Connection"] = "close"
        await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": response.body, "more_body": True})
        try:
            async with asyncio.timeout(DRAIN_LIMIT_S):
                await _discard(receive)
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _discard(receive: Receive) -> None:
    size = 0
    while size < DRAIN_LIMIT_BYTES:
        message = await receive()
        size += len(message.get("body", b""))
        if not message.get("more_body", False):
            return


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then whatever else the connection says."""
    is_replayed = False

    async def replay() -> Message:
        nonlocal is_replayed
        if is_replayed:
            return await receive()
        is_replayed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _unsupported_media_type(scope: Scope, headers: Headers) -> Response | None:
    """The refusal of a body that is compressed or no JSON."""
    coding = headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        compressed = InvalidRequestError(f"Bodies must not be compressed, got Content-Encoding {coding[:40]!r}.")
        response = error_response(scope, compressed, 415)
        response.headers["Accept-Encoding"] = "identity"  # as RFC 9110, 15.5.16, wants it
        return response
    found = headers.get("content-type", "none")
    if _is_json(found):
        return None
    error = InvalidRequestError(f"Bodies must be JSON: send 'Content-Type: application/json', not {found[:80]!r}.")
    return error_response(scope, error, 415)


def _is_json(content_type: str) -> bool:
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json"))
