"""GET and POST /v1/router: facts about the loaded router artefact, and a hot swap to another one."""

import asyncio
from typing import Annotated

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response

from server.api.auth import MAY_CHANGE
from server.api.errors import ERROR_RESPONSES, json_response
from server.api.fields import StrictBody, Text
from server.api.paths import router_folder
from server.api.services import InjectedServices

router = APIRouter(tags=["router"], responses=ERROR_RESPONSES)


class SwapBody(StrictBody):
    """Body of POST /v1/router."""

    path: Annotated[Text, Field(min_length=1, max_length=1024)]
    """Artefact folder below an adapter root, relative to adapters.yaml."""


@router.get("/v1/router", summary="Facts about the loaded router")
async def get_router(services: InjectedServices) -> Response:
    """Artefact, granularity, k, adapters with trained rows, training record."""
    return json_response(services.registry.router_info())


@router.post("/v1/router", summary="Swap the router while requests run", dependencies=MAY_CHANGE)
async def swap_router(body: SwapBody, services: InjectedServices) -> Response:
    """Requests in flight keep the router that they were admitted under. 422 `router_refused` changes nothing."""
    folder = await asyncio.to_thread(router_folder, services.config, body.path)
    return json_response(await asyncio.to_thread(services.registry.swap_router, folder))
