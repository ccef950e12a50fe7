"""GET /v1/models: `auto`, the base model and every ready adapter."""

import asyncio
import contextlib
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from server.adapters.records import AdapterInfo, AdapterState
from server.adapters.roster import AUTO_MODEL
from server.api.errors import ERROR_RESPONSES, json_response
from server.api.services import InjectedServices, Services
from server.errors import AdapterNotFoundError, ModelNotFoundError

OWNER = "lora-mixer"

router = APIRouter(tags=["models"], responses=ERROR_RESPONSES)


@router.get("/v1/models", summary="List what `model` may be")
async def list_models(services: InjectedServices) -> Response:
    """OpenAI's list of models."""
    # Not on the event loop: of a thousand adapters it takes tens of milliseconds, and streams would stand still.
    return await asyncio.to_thread(lambda: json_response({"object": "list", "data": served_models(services)}))


@router.get("/v1/models/{model_id:path}", summary="One model")
async def get_model(model_id: str, services: InjectedServices) -> Response:
    """404 `model_not_found` for anything that is not served."""
    return json_response(served_model(services, model_id))


def served_model(services: Services, model_id: str) -> dict[str, Any]:
    """The model object of `model_id`. Raises ModelNotFoundError."""
    for own in _own_models(services):
        if own["id"] == model_id:
            return own
    with contextlib.suppress(AdapterNotFoundError):
        info = services.registry.get(model_id)
        if info.state is AdapterState.READY:
            return _adapter_model(services, info)
    raise ModelNotFoundError(f"The model {model_id[:200]!r} does not exist; GET /v1/models lists them.", param="model")


def served_models(services: Services) -> list[dict[str, Any]]:
    """All model objects, `auto` first."""
    ready = [info for info in services.registry.list() if info.state is AdapterState.READY]
    return [*_own_models(services), *(_adapter_model(services, info) for info in ready)]


def _own_models(services: Services) -> list[dict[str, Any]]:
    base = services.base_model_name
    return [_model(services, AUTO_MODEL, root=base, parent=base), _model(services, base, root=base, parent=None)]


def _adapter_model(services: Services, info: AdapterInfo) -> dict[str, Any]:
    return _model(services, info.name, root=info.source, parent=services.base_model_name)


def _model(services: Services, model_id: str, *, root: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": model_id,
        "object": "model",
        "created": services.created_s,
        "owned_by": OWNER,
        "root": root,
        "parent": parent,
        "max_model_len": services.max_model_len,
    }
