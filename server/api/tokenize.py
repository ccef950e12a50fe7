"""POST /tokenize and /detokenize: text to token ids and back, in vLLM's shapes. Needs the tokenizer only, no model."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response

from server.api.errors import ERROR_RESPONSES, json_response
from server.api.fields import IsNoOp, StrictBody, Text, at_most, never, only
from server.api.models import served_model
from server.api.prompts import chat_token_ids, on_tokenizer_threads
from server.api.sampling import check_continuation
from server.api.schemas import MAX_MESSAGES, ChatMessage, Label
from server.api.services import InjectedServices, Services
from server.api.values import TokenIds
from server.errors import InvalidRequestError

router = APIRouter(tags=["tokens"], responses=ERROR_RESPONSES)


class TokenizeBody(StrictBody):
    """Body of POST /tokenize: `prompt` as /v1/completions reads it, or `messages` as /v1/chat/completions does."""

    unsupported: ClassVar[Mapping[str, IsNoOp]] = {
        "chat_template": never,
        "chat_template_kwargs": only({}),
        "mm_processor_kwargs": only({}),
        "tools": only([]),
    }

    model: Label | None = None
    """Any served model; all share one tokenizer."""
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], at_most(MAX_MESSAGES), Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    """Whether the tokenizer adds its own special tokens; default true for a prompt, and never in a chat, whose template
    places them.
    """
    add_generation_prompt: bool | None = None
    """Chats only, as in /v1/chat/completions."""
    continue_final_message: bool = False
    """Chats only, as in /v1/chat/completions."""
    return_token_strs: bool = False
    """Also every token as text."""


class DetokenizeBody(StrictBody):
    """Body of POST /detokenize."""

    model: Label | None = None
    """Any served model; all share one tokenizer."""
    tokens: TokenIds


@router.post("/tokenize", summary="Token ids of a text or a conversation")
async def tokenize(body: TokenizeBody, services: InjectedServices) -> Response:
    """Token ids, their number, and the longest prompt plus output the model takes."""
    _check_model(services, body.model)
    _check_tokenize(body)
    if body.messages is not None:
        ids = await chat_token_ids(services, body.messages, body.add_generation_prompt, body.continue_final_message)
    else:
        text, adds_special_tokens = body.prompt or "", body.add_special_tokens is not False
        ids = await on_tokenizer_threads(
            services, lambda: services.tokenizer.encode(text, add_special_tokens=adds_special_tokens)
        )
    strings = None
    if body.return_token_strs:
        strings = await on_tokenizer_threads(services, lambda: [services.tokenizer.token_text(id_) for id_ in ids])
    return json_response(
        {"count": len(ids), "max_model_len": services.max_model_len, "tokens": ids, "token_strs": strings}
    )


@router.post("/detokenize", summary="Text of token ids")
async def detokenize(body: DetokenizeBody, services: InjectedServices) -> Response:
    """The text, special tokens included, so that tokenizing it gives the same ids back wherever that is possible."""
    _check_model(services, body.model)
    if max(body.tokens, default=0) >= services.vocab_size:
        raise InvalidRequestError(f"tokens must hold token ids below {services.vocab_size}", param="tokens")
    text = await on_tokenizer_threads(
        services, lambda: services.tokenizer.decode(body.tokens, skip_special_tokens=False)
    )
    return json_response({"prompt": text})


def _check_model(services: Services, model: str | None) -> None:
    if model is not None:
        served_model(services, model)


def _check_tokenize(body: TokenizeBody) -> None:
    """Raise InvalidRequestError for fields that do not go together."""
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("give either prompt or messages", param="prompt")
    if body.messages is None:
        for name in ("add_generation_prompt", "continue_final_message"):
            if getattr(body, name):
                raise InvalidRequestError(f"{name} needs messages", param=name)
        return
    if body.add_special_tokens:
        raise InvalidRequestError(
            "add_special_tokens is only for a prompt: a chat template places them itself", param="add_special_tokens"
        )
    if body.continue_final_message:
        check_continuation(body.messages, body.add_generation_prompt)
