"""Composition root: the only place that wires model, engine, registry and HTTP surface together."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware import Middleware

from server import __version__
from server.api import adapters, calibrate, chat, completions, models, router, system, tokenize
from server.api.auth import DESCRIBES_KEYS, ApiKeyGate
from server.api.errors import install_error_handlers
from server.api.middleware import BodyGate, HeadAsGet, RequestScope
from server.api.paths import warn_of_missing_roots
from server.api.services import Services
from server.api.warmup import warm_up

logger = logging.getLogger(__name__)


def create_app(services: Services) -> FastAPI:
    """The app around parts that exist already. Its lifespan starts the engine thread, and drains it at the end."""
    app = FastAPI(
        title="LoRA-Mixer server",
        version=__version__,
        docs_url=None,  # Both would load scripts from elsewhere.
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
        middleware=[
            Middleware(RequestScope),
            Middleware(HeadAsGet),
            Middleware(ApiKeyGate, secrets=services.secrets),
            Middleware(
                BodyGate,
                max_body_bytes=services.config.server.max_body_bytes,
                is_draining=lambda: services.engine.is_draining,
            ),
        ],
    )
    app.state.services = services
    warn_of_missing_roots(services.config)
    install_error_handlers(app)
    for module in (chat, completions, tokenize, models, adapters, calibrate, router):
        app.include_router(module.router, dependencies=DESCRIBES_KEYS)
    app.include_router(system.router)
    app.mount("/playground", system.PlaygroundFiles(directory=system.PLAYGROUND_FOLDER))
    services.metrics.watch(
        num_running=lambda: services.engine.num_running,
        num_waiting=lambda: services.engine.num_waiting,
        num_waiting_for_adapters=lambda: services.registry.desk.num_waiting,
        adapters=services.registry.list,
        max_adapters=services.config.server.max_adapters,
    )
    return app


async def drain(services: Services, timeout_s: float | None = None) -> None:
    """Refuse new requests and let running ones finish, for `timeout_s` at most, by default `drain_timeout_s`; then cut
    them off. Idempotent.

    /ready says so from the first moment on, so call it while the server still listens.
    """
    services.lifecycle.mark_not_ready("draining")
    services.registry.desk.refuse_waiting()
    await services.engine.drain(services.config.server.drain_timeout_s if timeout_s is None else timeout_s)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    services.engine.start()
    warming = asyncio.create_task(warm_up(services))
    try:
        yield
    finally:
        warming.cancel()
        await asyncio.gather(warming, return_exceptions=True)
        await drain(services)
        await asyncio.to_thread(services.engine.stop)
        await asyncio.to_thread(services.registry.close)
        services.tokenizer_threads.shutdown(cancel_futures=True)
