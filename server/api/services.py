"""What the HTTP handlers work with: the parts that `app.py` wired together, and whether the server takes requests."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from server.config import Secrets, ServerConfig
from server.metrics import Metrics

if TYPE_CHECKING:
    from server.adapters.registry import AdapterRegistry
    from server.engine.async_engine import AsyncEngine
    from server.model.tokenizer import ChatTokenizer


class Lifecycle:
    """Starting, ready or draining. Changed on the event loop only."""

    def __init__(self) -> None:
        self._reason: str | None = "starting"

    @property
    def not_ready_reason(self) -> str | None:
        """Why no request is taken now; None when ready."""
        return self._reason

    def mark_ready(self) -> None:
        self._reason = None

    def mark_not_ready(self, reason: str) -> None:
        self._reason = reason


def _tokenizer_threads() -> ThreadPoolExecutor:
    # Two, so that one huge prompt does not hold up all others; more would only compete with the model for cores. Apart
    # from asyncio's default threads, since those may all read adapters, or wait for a disk.
    return ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenizer")


@dataclass(frozen=True, eq=False)
class Services:
    """Everything a handler may use. Built by `app.build_services`, or by a test from parts of its own."""

    config: ServerConfig
    secrets: Secrets
    engine: "AsyncEngine"
    registry: "AdapterRegistry"
    tokenizer: "ChatTokenizer"
    metrics: Metrics
    max_model_len: int
    """Longest prompt plus output, in tokens."""
    vocab_size: int
    created_s: int
    """Unix time of the start; `created` of every model."""
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    tokenizer_threads: ThreadPoolExecutor = field(default_factory=_tokenizer_threads)

    @property
    def base_model_name(self) -> str:
        return self.config.base_model.name

    @property
    def not_ready_reason(self) -> str | None:
        """Why the server takes no generation requests now; None when it does."""
        if not self.engine.is_alive and self.lifecycle.not_ready_reason is None:
            return "the engine has stopped"
        return "draining" if self.engine.is_draining else self.lifecycle.not_ready_reason


def services_of(request: Request) -> Services:
    """The services of the app that serves `request`."""
    services: Services = request.app.state.services
    return services


InjectedServices = Annotated[Services, Depends(services_of)]
"""Parameter type of handlers."""
