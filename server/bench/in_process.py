"""The engine in this process as a benchmark target: no HTTP, no text."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING

from server.bench.load import Answer, Job
from server.config import Secrets, ServerConfig
from server.engine.async_engine import AsyncEngine, GenerationRequest
from server.engine.sequence import FinishReason, SamplingParams
from server.errors import LoraMixerError

if TYPE_CHECKING:
    from server.adapters.registry import AdapterRegistry
    from server.api.services import Services


class InProcessTarget:
    """Submits to a started `AsyncEngine`, with leases from the registry as the HTTP routes take them."""

    mode = "in-process"

    def __init__(
        self,
        engine: AsyncEngine,
        registry: "AdapterRegistry",
        *,
        base_model: str,
        adapters: Sequence[str],
        vocab_size: int,
    ) -> None:
        self.base_model = base_model
        self.adapters = adapters
        self.vocab_size = vocab_size
        self._engine = engine
        self._registry = registry

    async def generate(self, job: Job) -> Answer:
        """Run one request; times are when this process' event loop got each token."""
        params = SamplingParams(temperature=0.0, max_tokens=job.max_tokens, ignore_eos=True)
        token_s: list[float] = []
        error = None
        sent_s = time.perf_counter()
        try:
            (lease,) = await self._registry.desk.lease_when_resident(job.model)
            request = GenerationRequest(
                job.prompt_token_ids,
                params,
                lease.plan,
                lease,
                request_id=job.salt,
                cache_salt=job.salt,
                course=self._registry.prompt_course(lease.plan, job.prompt_token_ids),
            )
            async with aclosing(self._engine.submit(request)) as events:
                async for _, event in events:
                    token_s += [time.perf_counter()] * len(event.token_ids)
                    if event.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                        error = event.error or str(event.finish_reason)
        except LoraMixerError as failure:
            error = failure.message
        return Answer(sent_s, tuple(token_s), error)


@asynccontextmanager
async def in_process(
    config: ServerConfig, on_started: Callable[["Services"], object] = lambda _: None
) -> AsyncIterator[tuple[InProcessTarget, list[str]]]:
    """Everything that the server runs except HTTP, started, and the digests of its adapters.

    `on_started` gets the parts once the engine runs, on a thread of its own. Raises what a start of the server raises.
    """
    from server.assembly import build_services, settle

    # Registrations over HTTP are a running server's; a measurement is of what the configuration says.
    settings = config.server.model_copy(update={"registry_file": None})
    config = config.model_copy(update={"server": settings})
    services = await asyncio.to_thread(build_services, config, Secrets())
    settle()
    services.engine.start()
    try:
        await asyncio.to_thread(on_started, services)
        ready = [info for info in services.registry.list() if info.state == "READY"]
        target = InProcessTarget(
            services.engine,
            services.registry,
            base_model=services.base_model_name,
            adapters=[info.name for info in ready],
            vocab_size=services.vocab_size,
        )
        yield target, [info.digest or "" for info in ready]
    finally:
        await asyncio.to_thread(services.engine.stop)
        await asyncio.to_thread(services.registry.close)
