"""Health, readiness, metrics and the playground: routes for operators and people, none of which need an API key."""

from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from server import __version__
from server.api.errors import json_response
from server.api.services import InjectedServices

PLAYGROUND_FOLDER = Path(__file__).parent.parent / "playground"

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""The page loads nothing from elsewhere, runs no inline script and cannot be framed."""

router = APIRouter(tags=["system"])


@router.get("/health", summary="Whether the process can still serve", responses={503: {"description": "It cannot."}})
async def health(services: InjectedServices) -> Response:
    """200 while the engine thread lives, 503 otherwise: restart it then."""
    is_alive = services.engine.is_alive
    return json_response({"status": "ok" if is_alive else "the engine has stopped"}, 200 if is_alive else 503)


@router.get("/ready", summary="Whether to send requests here", responses={503: {"description": "Not now."}})
async def ready(services: InjectedServices) -> Response:
    """503 with a reason until the first token could be served, and while draining."""
    reason = services.not_ready_reason
    content: dict[str, Any] = {"ready": reason is None, "reason": reason, "version": __version__}
    return json_response(content, 200 if reason is None else 503)


@router.get("/metrics", summary="Prometheus metrics", response_class=PlainTextResponse)
async def metrics(services: InjectedServices) -> Response:
    """Text exposition format."""
    body, content_type = await run_in_threadpool(services.metrics.render)
    return Response(body, headers={"Content-Type": content_type})


@router.get("/", include_in_schema=False)
async def playground() -> Response:
    """The playground page."""
    return FileResponse(PLAYGROUND_FOLDER / "index.html", headers=SECURITY_HEADERS)


class PlaygroundFiles(StaticFiles):
    """The page's script and style sheet, under the page's own security headers."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(SECURITY_HEADERS)
        return response
