"""Who may call what, and when: API keys for /v1, the admin key for routes that change the server, loopback as its
stand-in, and no change any more while it drains.

Keys are compared in constant time and never logged.
"""

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from urllib.parse import SplitResult, urlsplit

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import error_response
from server.api.services import services_of
from server.config import Secrets
from server.errors import AuthenticationError, NotReadyError, PermissionDeniedError

PROTECTED_PREFIXES = ("/v1/", "/tokenize", "/detokenize")
PROXY_HEADERS = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip")


class ApiKeyGate:
    """ASGI middleware: with API keys configured, routes below PROTECTED_PREFIXES need one, before a body is read.

    The admin key opens every route as well.
    """

    def __init__(self, app: ASGIApp, secrets: Secrets) -> None:
        self._app = app
        self._is_open = not secrets.api_keys
        self._hashes = _hashes((*secrets.api_keys, *([secrets.admin_key] if secrets.admin_key else [])))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(PROTECTED_PREFIXES) and not self._is_open:
            headers = Headers(scope=scope)
            if not _matches_any(_presented_keys(headers), self._hashes):
                await error_response(scope, _missing_key("an API key"))(scope, receive, send)
                return
        await self._app(scope, receive, send)


def require_admin(request: Request) -> None:
    """Dependency of mutating routes. Raises AuthenticationError or PermissionDeniedError.

    With an admin key: that key. Without: a client on loopback, through no proxy that can be told, that addresses us by
    a loopback name (a page that rebinds its own DNS name to 127.0.0.1 does not). Pages of other origins are refused in
    either case.
    """
    _refuse_foreign_origin(request.headers)
    admin_key = services_of(request).secrets.admin_key
    if admin_key is None:
        _require_loopback(request)
    elif not _matches_any(_presented_keys(request.headers), _hashes([admin_key])):
        raise _missing_key("the admin key")


def refuse_while_draining(request: Request) -> None:
    """Dependency of mutating routes. Raises NotReadyError. A server that starts takes changes already."""
    if services_of(request).engine.is_draining:
        raise NotReadyError("The server is shutting down and takes no changes any more. Try again later.")


_BEARER = HTTPBearer(
    auto_error=False,
    scheme_name="key",
    description="One of LORA_MIXER_API_KEYS, or LORA_MIXER_ADMIN_KEY, which changes need; no key where none is set.",
)
_ADMIN_HEADER = APIKeyHeader(name="X-Admin-Key", auto_error=False, scheme_name="adminKey")
DESCRIBES_KEYS = (Depends(_BEARER),)
"""Dependencies of every route below PROTECTED_PREFIXES. They check nothing: they are what the OpenAPI document says."""

MAY_CHANGE = (Depends(require_admin), Depends(refuse_while_draining), Depends(_ADMIN_HEADER))
"""Dependencies of every route that changes adapters or router."""


def _presented_keys(headers: Headers) -> list[str]:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    keys = [token.strip()] if scheme.lower() == "bearer" else []
    return [key for key in (*keys, headers.get("x-admin-key", "")) if key]


def _hashes(keys: Iterable[str]) -> tuple[bytes, ...]:
    """Equal lengths, so that a comparison tells nothing about a key's length either."""
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)


def _matches_any(keys: Iterable[str], hashes: Iterable[bytes]) -> bool:
    """Compares every pair, so that the time taken does not tell which key was nearly right."""
    is_known = False
    for key in keys:
        # Headers arrive decoded as Latin-1, whatever their bytes meant.
        presented = hashlib.sha256(key.encode("latin-1")).digest()
        for known in hashes:
            is_known |= hmac.compare_digest(presented, known)
    return is_known


def _missing_key(what: str) -> AuthenticationError:
    return AuthenticationError(f"This route needs {what}: send it as 'Authorization: Bearer KEY'.")


def _refuse_foreign_origin(headers: Headers) -> None:
    origin = headers.get("origin")
    if origin is not None and _parts(origin).netloc.lower() != headers.get("host", "").lower():
        raise PermissionDeniedError("Pages of other origins may not change this server.")


def _require_loopback(request: Request) -> None:
    advice = "set LORA_MIXER_ADMIN_KEY and send that key"
    if request.client is None or not _is_loopback(request.client.host):
        raise PermissionDeniedError(f"Without an admin key, only clients on this machine may change it; {advice}.")
    # An nginx with its defaults adds no header and addresses us by a loopback name, but speaks HTTP/1.0.
    if request.scope["http_version"] == "1.0" or any(name in request.headers for name in PROXY_HEADERS):
        raise PermissionDeniedError(f"Without an admin key, requests through a proxy may not change it; {advice}.")
    if not _is_loopback(_parts(f"//{request.headers.get('host', '')}").hostname or ""):
        raise PermissionDeniedError(
            f"Without an admin key, address it as localhost or 127.0.0.1 to change it; {advice}."
        )


def _parts(url: str) -> SplitResult:
    """Of what is no URL, none."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
