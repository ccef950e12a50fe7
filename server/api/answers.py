"""What both generation routes do around their own formats: start, stream or wait, and always clean up."""

import functools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from server.api.choice import ChoiceDelta
from server.api.errors import CLIENT_LEFT, request_id_of
from server.api.generation import Generation, Leases, Prompt, collect, submit
from server.api.long_json import encode_long
from server.api.prompts import check_scores, limits_of, on_tokenizer_threads, read_questions
from server.api.sampling import check_body
from server.api.schemas import GenerationBody
from server.api.services import Services
from server.api.streaming import DONE, EventStream, framed, sse, until_disconnect
from server.errors import NotReadyError

MAX_TOLD_ON_LOOP = 256
"""Tokens with log probabilities or gates that are written on the event loop; those of a long prompt are several MB, and
other requests must not wait for them."""


class AnswerFormat(Protocol):
    """How one route writes choices as JSON. One instance per request; it may keep state per choice."""

    def openings(self) -> Sequence[dict[str, Any]]:
        """Chunks that a stream starts with."""
        ...

    def chunk(self, delta: ChoiceDelta) -> dict[str, Any] | None:
        """The chunk for one delta; None if it has nothing to show yet."""
        ...

    def usage_chunk(self) -> dict[str, Any]:
        """A chunk without choices, for the usage of the whole request."""
        ...

    def answer(self, choices: Sequence[ChoiceDelta]) -> dict[str, Any]:
        """The whole answer without its usage; its `choices` are written one at a time, when it is their turn."""
        ...


async def start(
    services: Services,
    request: Request,
    body: GenerationBody,
    num_prompts: int,
    make_prompts: Callable[[], Awaitable[Sequence[Prompt]]],
) -> Generation:
    """Check, lease, tokenize, submit. Whatever fails on the way leaves no lease behind.

    Raises ClientDisconnect when the client leaves while its adapters come into memory.
    """
    arrival_s = time.monotonic()
    if (reason := services.not_ready_reason) is not None:
        raise NotReadyError(f"The server takes no requests now: {reason}. Try again later.")
    check_body(body, limits_of(services))
    with Leases(services, body, num_prompts) as leases:
        if not leases.take_now():
            await until_disconnect(request, leases.take())
        prompts = await make_prompts()
        check_scores(body, prompts, limits_of(services))
        prompts = await read_questions(services, leases.plans, prompts)
        return submit(services, body, prompts, leases, request_id=request_id_of(request.scope), arrival_s=arrival_s)


async def respond(request: Request, generation: Generation, answer_format: AnswerFormat) -> Response:
    """The stream, or the whole answer once it is there; a client that leaves aborts either."""
    if generation.body.stream:
        return EventStream(_events(generation, answer_format), generation.close)
    try:
        choices = await until_disconnect(request, collect(generation))
    except ClientDisconnect:
        return Response(status_code=CLIENT_LEFT)
    finally:
        generation.close()

    def written() -> Response:
        answer = {**answer_format.answer(choices), "usage": generation.usage()}
        return Response(encode_long(answer), media_type="application/json")

    if sum(map(_num_told, choices)) <= MAX_TOLD_ON_LOOP:
        return written()
    return await on_tokenizer_threads(generation.services, written)


def _num_told(delta: ChoiceDelta) -> int:
    """Tokens whose log probabilities or gates are to be written."""
    return len(delta.logprobs) + len(delta.prompt_logprobs or ()) + len(delta.routing)


async def _events(generation: Generation, answer_format: AnswerFormat) -> AsyncGenerator[bytes, None]:
    body = generation.body

    def with_usage(chunk: dict[str, Any]) -> dict[str, Any]:
        if body.includes_usage:
            chunk["usage"] = generation.usage() if body.has_continuous_usage else None
        return chunk

    def long_event(delta: ChoiceDelta) -> bytes | None:
        chunk = answer_format.chunk(delta)
        return None if chunk is None else framed(encode_long(with_usage(chunk)))

    for opening in answer_format.openings():
        yield sse(with_usage(opening))
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            if _num_told(delta) > MAX_TOLD_ON_LOOP:
                event = await on_tokenizer_threads(generation.services, functools.partial(long_event, delta))
            else:
                chunk = answer_format.chunk(delta)
                event = None if chunk is None else sse(with_usage(chunk))
            if event is not None:
                yield event
    if body.includes_usage:
        yield sse({**answer_format.usage_chunk(), "usage": generation.usage()})
    yield DONE
