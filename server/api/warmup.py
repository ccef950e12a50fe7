"""The first token: generated before any client asks, so that /ready means what it says."""

import logging

from server.api.services import Services
from server.engine.async_engine import GenerationRequest
from server.engine.lease import NoLease
from server.engine.sequence import FinishReason, SamplingParams
from server.errors import EngineError, LoraMixerError
from server.routing.policy import BASE_PLAN

logger = logging.getLogger(__name__)

WARM_UP_TEXT = "Hello"


async def warm_up(services: Services) -> None:
    """Serve one token of the base model, then mark the server ready; if that fails, say why in /ready."""
    services.lifecycle.mark_not_ready("warming up")
    try:
        with services.metrics.without_steps():
            await _first_token(services)
    except LoraMixerError as error:
        logger.error("warm-up failed, the server stays unready: %s", error.message)
        services.lifecycle.mark_not_ready("warm-up failed; see the server's log")
    else:
        services.lifecycle.mark_ready()
        logger.info("ready")


async def _first_token(services: Services) -> None:
    request = GenerationRequest(
        prompt_token_ids=tuple(services.tokenizer.encode(WARM_UP_TEXT, add_special_tokens=True)),
        params=SamplingParams(temperature=0.0, max_tokens=1),
        plan=BASE_PLAN,
        lease=NoLease(),
        request_id="warm-up",
    )
    async for _, event in services.engine.submit(request):
        if event.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            raise EngineError(event.error or "the first token was aborted")
