"""Every failure as OpenAI's envelope: which exception becomes which HTTP status, and what its body says.

The one place that knows statuses. Messages of unexpected exceptions never leave the process.
"""

import json
import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match, Mount
from starlette.types import Scope

from server import errors
from server.api.explain import explain_validation

if TYPE_CHECKING:
    from server.api.services import Services

logger = logging.getLogger(__name__)


class ErrorKind(NamedTuple):
    """HTTP status and the envelope's `type`."""

    status: int
    type: str


ERROR_KINDS: Mapping[type[errors.LoraMixerError], ErrorKind] = {
    errors.InvalidRequestError: ErrorKind(400, "invalid_request_error"),
    errors.AuthenticationError: ErrorKind(401, "authentication_error"),
    errors.PermissionDeniedError: ErrorKind(403, "permission_error"),
    errors.ModelNotFoundError: ErrorKind(404, "invalid_request_error"),
    errors.AdapterNotFoundError: ErrorKind(404, "invalid_request_error"),
    errors.AdapterConflictError: ErrorKind(409, "conflict_error"),
    errors.PreconditionFailedError: ErrorKind(412, "conflict_error"),
    errors.PayloadTooLargeError: ErrorKind(413, "invalid_request_error"),
    errors.AdapterRefusedError: ErrorKind(422, "adapter_error"),
    errors.RouterArtefactError: ErrorKind(422, "router_error"),
    errors.AdapterDownloadError: ErrorKind(502, "adapter_error"),
    errors.TooManyRegistrationsError: ErrorKind(429, "rate_limit_error"),
    errors.OverloadedError: ErrorKind(503, "overloaded_error"),
    errors.NotReadyError: ErrorKind(503, "overloaded_error"),
    errors.RegistryFileError: ErrorKind(507, "server_error"),
    errors.LoraMixerError: ErrorKind(500, "server_error"),
}
"""Looked up along an exception's class hierarchy, so a subclass needs a row only if it differs."""

INTERNAL_MESSAGE = "The server failed on this request. Its log has the details under the same request id."
CLIENT_LEFT = 499
"""Status that nobody receives; nginx's word for it in logs."""
NOT_READY_RETRY_S = 5
"""Retry-After of a server that starts or drains; a hint, since neither has a known end."""


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorEnvelope(BaseModel):
    """Body of every answer with status 400 or above."""

    error: ErrorBody


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorEnvelope, "description": "The request was refused; the error says why."},
    "5XX": {"model": ErrorEnvelope, "description": "The server failed or is overloaded."},
}
"""For the OpenAPI document; every route shares it."""


def kind_of(error: errors.LoraMixerError) -> ErrorKind:
    """Row of the table for `error`."""
    return next(ERROR_KINDS[cls] for cls in type(error).__mro__ if cls in ERROR_KINDS)


def envelope_of(error: errors.LoraMixerError) -> dict[str, Any]:
    """The JSON body for `error`; an internal failure keeps its details to itself."""
    kind = kind_of(error)
    message = INTERNAL_MESSAGE if kind.status == 500 else error.message
    body: dict[str, Any] = {"message": message, "type": kind.type, "param": error.param, "code": error.code}
    if isinstance(error, errors.AdapterRefusedError):
        body["reasons"] = [{"code": r.code, "message": r.message, "where": r.where} for r in error.reasons]
    return {"error": body}


def encode_json(content: object) -> bytes:
    """Compact UTF-8 JSON. What that cannot say fails no answer, which may be a list of much else: a lone surrogate
    (from a client's own key) stays an escape, a number that is not finite becomes null.
    """
    try:
        text = _dump(content)
    except ValueError:
        text = _dump(_finite(content))
    return text.encode("utf-8", "backslashreplace")


def _dump(content: object) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _finite(content: object) -> object:
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(entry) for entry in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(encode_json(content), status_code=status, headers=headers, media_type="application/json")


def error_response(scope: Scope, error: errors.LoraMixerError, status: int | None = None) -> Response:
    """The answer to a request that failed with `error`; logs it and counts it. `status` overrides the table's."""
    kind = kind_of(error)
    if status is not None:
        kind = kind._replace(status=status)
    details = error.message if kind.status == 500 else ""
    logger.log(
        logging.ERROR if kind.status == 500 else logging.INFO,
        "request %s refused: %d %s (param %s) %s",
        request_id_of(scope), kind.status, error.code, error.param, details,
    )  # fmt: skip
    _count_rejection(scope, type(error).default_code or "server_error")
    return json_response(envelope_of(error), kind.status, _headers_of(error))


def unexpected_error_response(scope: Scope) -> Response:
    """500 for the exception being handled, counted; its traceback goes to the log only."""
    logger.exception("request %s failed unexpectedly", request_id_of(scope))
    _count_rejection(scope, "internal_error")
    body = {"message": INTERNAL_MESSAGE, "type": "server_error", "param": None, "code": "internal_error"}
    return json_response({"error": body}, 500)


def request_id_of(scope: Scope) -> str:
    """Id of the request, as the response header carries it."""
    return str(scope.get("state", {}).get("request_id", "-"))


def has_route(scope: Scope, method: str) -> bool:
    """Whether `method` is served at the request's path, by a route and not by a folder of files."""
    routes = (route for route in scope["app"].routes if not isinstance(route, Mount))
    return any(route.matches({**scope, "method": method})[0] is Match.FULL for route in routes)


def _methods_of(scope: Scope) -> list[str]:
    """What is served at the request's path; the framework's own Allow has the methods of one route only."""
    methods = [method for method in ("DELETE", "GET", "PATCH", "POST", "PUT") if has_route(scope, method)]
    return sorted([*methods, "HEAD"]) if "GET" in methods else methods


def install_error_handlers(app: FastAPI) -> None:
    """Route every exception that a handler may raise through the table."""

    async def on_known(request: Request, error: Exception) -> Response:
        assert isinstance(error, errors.LoraMixerError)
        return error_response(request.scope, error)

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(request.scope, explain_validation(error))

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _http_error_response(request, error)

    async def on_left(_request: Request, _error: Exception) -> Response:
        return Response(status_code=CLIENT_LEFT)

    app.add_exception_handler(errors.LoraMixerError, on_known)
    app.add_exception_handler(ClientDisconnect, on_left)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)


def _count_rejection(scope: Scope, reason: str) -> None:
    services: Services | None = getattr(scope["app"].state, "services", None)
    if services is not None:
        services.metrics.count_rejection(reason)


def _headers_of(error: errors.LoraMixerError) -> dict[str, str]:
    if isinstance(error, errors.OverloadedError):
        return {"Retry-After": str(error.retry_after_s)}
    if isinstance(error, errors.NotReadyError):
        return {"Retry-After": str(NOT_READY_RETRY_S)}
    if isinstance(error, errors.AuthenticationError):
        return {"WWW-Authenticate": "Bearer"}
    return {}


def _http_error_response(request: Request, error: HTTPException) -> Response:
    """The framework's own errors: no such route, wrong method, a body that it could not parse."""
    if error.status_code == 400:
        unparsed = "The request body could not be parsed as JSON."
        return error_response(request.scope, errors.InvalidRequestError(unparsed, code="invalid_json"))
    what = f"{request.method} {request.url.path[:200]}"
    messages = {
        404: (f"No such route: {what}. GET /openapi.json lists what is served.", "route_not_found"),
        405: (f"{what} is not allowed; see the Allow header.", "method_not_allowed"),
    }
    message, code = messages.get(error.status_code, (str(error.detail), None))
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    headers = error.headers
    if error.status_code == 405 and (methods := _methods_of(request.scope)):
        headers = {"Allow": ", ".join(methods)}
    return json_response({"error": body}, error.status_code, headers)
