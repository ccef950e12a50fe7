"""GET and POST /v1/router: facts about the loaded router artefact, and a hot swap to another one."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response

from server.api.auth import MAY_CHANGE
from server.api.errors import ERROR_RESPONSES, json_response
from server.api.fields import StrictBody, Text
from server.api.paths import router_folder
from server.api.services import InjectedServices

MAX_TRAINING_SIZE = 65_536
"""Values and characters of a training record that an answer carries; the demo's has 7,000. Trainers may write what they
like there."""

router = APIRouter(tags=["router"], responses=ERROR_RESPONSES)


class SwapBody(StrictBody):
    """Body of POST /v1/router."""

    path: Annotated[Text, Field(min_length=1, max_length=1024)]
    """Artefact folder below an adapter root, relative to adapters.yaml."""


@router.get("/v1/router", summary="Facts about the loaded router")
async def get_router(services: InjectedServices) -> Response:
    """Artefact, granularity, k, adapters with trained rows, training record."""
    return _answer(services.registry.router_info())


@router.post("/v1/router", summary="Swap the router while requests run", dependencies=MAY_CHANGE)
async def swap_router(body: SwapBody, services: InjectedServices) -> Response:
    """Requests in flight keep the router that they were admitted under. 422 `router_refused` changes nothing."""
    folder = await asyncio.to_thread(router_folder, services.config, body.path)
    return _answer(await asyncio.to_thread(services.registry.swap_router, folder))


def _answer(facts: dict[str, Any]) -> Response:
    if not _is_short(facts.get("training")):
        facts = {**facts, "training": {"omitted": "too long for an answer; router.json of the artefact has it"}}
    return json_response(facts)


def _is_short(content: object) -> bool:
    """Whether it has MAX_TRAINING_SIZE values and characters at most; looks at no more than that."""
    size, rest = 0, [content]
    while rest:
        value = rest.pop()
        size += len(value) if isinstance(value, str | list | dict) else 1
        if size > MAX_TRAINING_SIZE:
            return False
        if isinstance(value, dict):
            rest += [*value, *value.values()]
        elif isinstance(value, list):
            rest += value
    return True
