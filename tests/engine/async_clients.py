"""Requests to an `AsyncEngine`, and consumers that check what every consumer may rely on."""

import asyncio
from collections.abc import Callable
from typing import Any

from server.engine.async_engine import AsyncEngine, GenerationHandle, GenerationRequest
from server.engine.sequence import SamplingParams, TokenEvent
from server.routing.policy import BASE_PLAN
from tests.engine.fakes import CountingLease

StartEngine = Callable[..., AsyncEngine]
"""The fixture `start_engine`."""


def request(num_prompt: int = 5, *, n: int = 1, lease: CountingLease | None = None, **params: Any) -> GenerationRequest:
    return GenerationRequest(
        prompt_token_ids=tuple(range(num_prompt)),
        params=SamplingParams(**{"temperature": 0.0, "max_tokens": 4, **params}),
        plan=BASE_PLAN,
        lease=lease or CountingLease(),
        request_id="test",
        n=n,
    )


async def consume(handle: GenerationHandle) -> dict[int, list[TokenEvent]]:
    """All events by choice; each list ends with its only terminal event."""
    events: dict[int, list[TokenEvent]] = {}
    async for index, event in handle:
        events.setdefault(index, []).append(event)
    for found in events.values():
        assert [event.finish_reason is not None for event in found] == [False] * (len(found) - 1) + [True]
    return events


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)
