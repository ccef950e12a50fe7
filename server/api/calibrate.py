"""POST /v1/adapters/{name}/calibrate: examples for an adapter that is served already, and a gate row from them."""

import asyncio

from fastapi import APIRouter
from starlette.responses import Response

from server.api.adapters import Examples, settled
from server.api.auth import MAY_CHANGE
from server.api.errors import ERROR_RESPONSES, json_response
from server.api.fields import StrictBody
from server.api.services import InjectedServices

router = APIRouter(tags=["adapters"], responses=ERROR_RESPONSES)


class CalibrateBody(StrictBody):
    """Body of POST /v1/adapters/{name}/calibrate."""

    examples: Examples
    """2 to 64 prompts or chats that the adapter is for; they add to those it has."""
    wait: bool = False
    """Answer when the row is made or refused, not at once."""


@router.post(
    "/v1/adapters/{name}/calibrate",
    summary="Route to an adapter by examples",
    dependencies=MAY_CHANGE,
    responses={202: {"description": "In progress: poll GET /v1/adapters/{name}."}},
)
async def calibrate_adapter(name: str, body: CalibrateBody, services: InjectedServices) -> Response:
    """200 done, 202 in progress; whether it is routed now, or why not, stands in the adapter object."""
    info = await asyncio.to_thread(services.registry.calibrate, name, body.examples)
    if body.wait:
        info = await settled(services, info)
    return json_response(info.to_dict(), 200 if info.is_settled else 202)
