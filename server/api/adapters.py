"""Adapters over HTTP: list, register, retire; and vLLM's load and unload payloads with the same effect.

The registry does the work, on worker threads; this module knows statuses and what a client may name.
"""

import asyncio
import contextlib
import functools
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Header
from pydantic import Field
from starlette.responses import PlainTextResponse, Response

from server.adapters.examples import MAX_EXAMPLES
from server.adapters.records import AdapterInfo, AdapterState
from server.adapters.sameness import ANY_ETAG
from server.api.auth import MAY_CHANGE
from server.api.errors import ERROR_RESPONSES, json_response
from server.api.fields import IsNoOp, StrictBody, Text, only
from server.api.paths import checked_source
from server.api.services import InjectedServices, Services
from server.config import AdapterSpec
from server.errors import (
    AdapterDownloadError,
    AdapterRefusedError,
    InvalidRequestError,
    LoraMixerError,
    NotReadyError,
    RegistryFileError,
)
from server.naming import ADAPTER_NAME_PATTERN, reserved_by

WAIT_LIMIT_S = 600.0
"""Longest that a registration with `wait` is waited for; after that it answers 202 and goes on."""
INTERNAL_FAILURE = "internal_error"
"""`code` of a registration that failed for no reason that a client could mend."""
WAIT_SLICE_S = 1.0
"""How often a request that waits looks whether the server drains."""

router = APIRouter(tags=["adapters"], responses=ERROR_RESPONSES)

AdapterName = Annotated[str, Field(pattern=ADAPTER_NAME_PATTERN)]
IfMatch = Annotated[str | None, Header(max_length=2000)]
"""Etags as GET answers them, or `*`."""
Examples = Annotated[list[Any], Field(max_length=MAX_EXAMPLES)]
"""Each a prompt, `{"prompt": text}` or `{"messages": [...]}`; `adapters.examples` checks them."""
SourceText = Annotated[Text, Field(min_length=1, max_length=1024)]


class RegisterBody(StrictBody):
    """Body of POST /v1/adapters."""

    name: AdapterName
    source: SourceText
    """Hub id `org/name`, or a folder below an adapter root."""
    revision: SourceText | None = None
    """Hub sources: branch, tag or commit."""
    subfolder: SourceText | None = None
    routed: bool = True
    """Whether `auto` may route to it; false serves it by name only."""
    pinned: bool = False
    """Whether it stays in memory however rarely it is used."""
    max_gate_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Largest share of the routed traffic that it may take; beyond, `auto` leaves it out until it is let in again."""
    description: Annotated[Text, Field(max_length=1000)] = ""
    examples: Examples = Field(default_factory=list)
    """For a gate row without retraining: none, or 2 to 64 prompts or chats that the adapter is for."""
    wait: bool = False
    """Answer when the adapter is served or refused, and its gate row made or not, instead of at once."""


class LoadBody(StrictBody):
    """vLLM's body of POST /v1/load_lora_adapter."""

    unsupported: ClassVar[Mapping[str, IsNoOp]] = {"is_3d_lora_weight": only(False)}

    lora_name: AdapterName
    lora_path: SourceText
    """As `source` of POST /v1/adapters."""
    load_inplace: bool = False
    """Replace the adapter of this name, whatever it is."""


class UnloadBody(StrictBody):
    """vLLM's body of POST /v1/unload_lora_adapter."""

    lora_name: AdapterName
    lora_int_id: Annotated[int, Field(ge=0)] | None = None
    """vLLM's own number of the adapter; the name is enough here, as it is there."""


@router.get("/v1/adapters", summary="List adapters")
async def list_adapters(services: InjectedServices) -> Response:
    """Every registered adapter, whatever its state."""

    def render() -> Response:
        return json_response({"object": "list", "data": [info.to_dict() for info in services.registry.list()]})

    # Not on the event loop: of a thousand adapters it takes tens of milliseconds, and streams would stand still.
    return await asyncio.to_thread(render)


@router.get("/v1/adapters/{name}", summary="One adapter")
async def get_adapter(name: str, services: InjectedServices) -> Response:
    """Poll this after a registration that answered 202."""
    return _answer(services.registry.get(name), 200)


@router.post(
    "/v1/adapters",
    summary="Register an adapter",
    dependencies=MAY_CHANGE,
    status_code=201,
    responses={202: {"description": "In progress: poll GET /v1/adapters/{name}."}},
)
async def register_adapter(body: RegisterBody, services: InjectedServices, if_match: IfMatch = None) -> Response:
    """201 served, 202 in progress, 409 name taken by other content, 422 refused, with every reason.

    With If-Match, other content replaces the adapter as its next generation; 412 when it is not the one named.
    """
    info = await _register(services, body, expected=_etags(if_match))
    if body.wait:
        info = await settled(services, info)
    newest = info.replacement or info
    _raise_failure(newest)
    return _answer(info, 201 if newest.state is AdapterState.READY else 202)


@router.delete("/v1/adapters/{name}", summary="Retire an adapter", dependencies=MAY_CHANGE)
async def retire_adapter(name: str, services: InjectedServices, if_match: IfMatch = None) -> Response:
    """No new request gets it; its memory is freed when the last running one ends. If-Match guards it: 412."""
    retire = functools.partial(services.registry.retire, name, expected=_etags(if_match))
    return json_response((await asyncio.to_thread(retire)).to_dict())


@router.post(
    "/v1/load_lora_adapter",
    summary="Register an adapter, as vLLM does",
    dependencies=MAY_CHANGE,
    response_class=PlainTextResponse,
    responses={202: {"description": "Still in progress."}},
)
async def load_lora_adapter(body: LoadBody, services: InjectedServices) -> Response:
    """Waits until the adapter is served; 202 where that takes longer than a request may."""
    registration = RegisterBody(name=body.lora_name, source=body.lora_path)
    with _vllms_params():
        is_known = any(info.name == body.lora_name for info in services.registry.list())
        expected = (ANY_ETAG,) if body.load_inplace and is_known else None
        info = await settled(services, await _register(services, registration, expected=expected))
        newest = info.replacement or info
        _raise_failure(newest)
    if newest.state is not AdapterState.READY:
        where = f"GET /v1/adapters/{body.lora_name} tells when it serves"
        return PlainTextResponse(f"LoRA adapter '{body.lora_name}' is still {newest.state.value}; {where}.", 202)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post(
    "/v1/unload_lora_adapter",
    summary="Retire an adapter, as vLLM does",
    dependencies=MAY_CHANGE,
    response_class=PlainTextResponse,
)
async def unload_lora_adapter(body: UnloadBody, services: InjectedServices) -> Response:
    """Running requests keep it until they end."""
    with _vllms_params():
        await asyncio.to_thread(services.registry.retire, body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@contextlib.contextmanager
def _vllms_params() -> Iterator[None]:
    """What goes wrong with a field is told of the one that vLLM's clients have sent."""
    try:
        yield
    except LoraMixerError as error:
        error.param = {"name": "lora_name", "source": "lora_path"}.get(error.param or "", error.param)
        raise


async def _register(services: Services, body: RegisterBody, *, expected: Collection[str] | None) -> AdapterInfo:
    if reserved_by(body.name, services.base_model_name):
        raise InvalidRequestError(f"the name {body.name!r} is reserved; choose another", param="name")
    spec = AdapterSpec(
        name=body.name,
        source=body.source,
        revision=body.revision,
        subfolder=body.subfolder,
        pinned=body.pinned,
        max_gate_share=body.max_gate_share,
        description=body.description,
        **({"routed": body.routed} if "routed" in body.model_fields_set else {}),  # said or not makes a difference
    )
    return await asyncio.to_thread(
        lambda: services.registry.register(checked_source(services.config, spec), body.examples, expected=expected)
    )


def _answer(info: AdapterInfo, status: int) -> Response:
    return json_response(info.to_dict(), status, {"ETag": info.etag})


def _etags(header: str | None) -> tuple[str, ...] | None:
    """The etags of an If-Match header as sent; None without one."""
    if header is None:
        return None
    return tuple(part.strip() for part in header.split(","))


async def settled(services: Services, info: AdapterInfo) -> AdapterInfo:
    """Its state once registration, replacement and calibration have ended, or after WAIT_LIMIT_S.

    Holds no thread meanwhile: asyncio has few, and many downloads may be slow. Raises NotReadyError when the server
    begins to drain before that, AdapterNotFoundError when the adapter is gone.
    """
    deadline_s = time.monotonic() + WAIT_LIMIT_S
    outcome = asyncio.wrap_future(services.registry.settling(info.name))
    while not outcome.done() and time.monotonic() < deadline_s:
        if services.engine.is_draining:
            raise NotReadyError(f"The server is shutting down before {info.name!r} has settled. Ask again later.")
        await asyncio.wait([outcome], timeout=WAIT_SLICE_S)
    return services.registry.get(info.name)


def _raise_failure(info: AdapterInfo) -> None:
    """A FAILED registration as the error that it would have been, had it not happened in the background."""
    if info.state is not AdapterState.FAILED:
        return
    if info.code == AdapterDownloadError.default_code:
        raise AdapterDownloadError(info.reason or "the download failed", param="source")
    if info.code == RegistryFileError.default_code:
        raise RegistryFileError(info.reason or "the registration could not be kept")
    if info.code == INTERNAL_FAILURE:
        raise LoraMixerError(info.reason or "internal error", code=info.code)
    if not info.reasons:
        raise InvalidRequestError(info.reason or "the registration failed", param="source", code=info.code)
    raise AdapterRefusedError(info.name, info.reasons)
