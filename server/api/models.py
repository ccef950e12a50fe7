"""GET /v1/models: `auto`, the base model and every ready adapter."""

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from server.adapters.records import AdapterState
from server.adapters.roster import AUTO_MODEL
from server.api.errors import ERROR_RESPONSES, json_response
from server.api.services import InjectedServices, Services
from server.errors import ModelNotFoundError

OWNER = "lora-mixer"

router = APIRouter(tags=["models"], responses=ERROR_RESPONSES)


@router.get("/v1/models", summary="List what `model` may be")
async def list_models(services: InjectedServices) -> Response:
    """OpenAI's list of models."""
    return json_response({"object": "list", "data": list(served_models(services).values())})


@router.get("/v1/models/{model_id:path}", summary="One model")
async def get_model(model_id: str, services: InjectedServices) -> Response:
    """404 `model_not_found` for anything that is not served."""
    return json_response(served_model(services, model_id))


def served_model(services: Services, model_id: str) -> dict[str, Any]:
    """The model object of `model_id`. Raises ModelNotFoundError."""
    model = served_models(services).get(model_id)
    if model is None:
        raise ModelNotFoundError(
            f"The model {model_id[:200]!r} does not exist; GET /v1/models lists them.", param="model"
        )
    return model


def served_models(services: Services) -> dict[str, dict[str, Any]]:
    """Model objects by id, `auto` first."""
    base = services.base_model_name
    models = [_model(services, AUTO_MODEL, root=base, parent=base), _model(services, base, root=base, parent=None)]
    models += [
        _model(services, info.name, root=info.source, parent=base)
        for info in services.registry.list()
        if info.state is AdapterState.READY
    ]
    return {model["id"]: model for model in models}


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
