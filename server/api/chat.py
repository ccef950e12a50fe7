"""POST /v1/chat/completions: chat answers and chunks in OpenAI's shape, with vLLM's and our extensions."""

import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.answers import respond, start
from server.api.choice import ChoiceDelta
from server.api.errors import ERROR_RESPONSES, request_id_of
from server.api.generation import Generation, Prompt
from server.api.logprobs import chat_logprobs, prompt_logprobs
from server.api.prompts import chat_prompt
from server.api.schemas import ChatBody
from server.api.services import InjectedServices
from server.api.streaming import STREAMED_RESPONSES
from server.api.trace import RoutingTrace, new_traces

router = APIRouter(tags=["generation"], responses=ERROR_RESPONSES)


@router.post("/v1/chat/completions", summary="Answer a conversation", responses=STREAMED_RESPONSES)
async def create_chat_completion(body: ChatBody, request: Request, services: InjectedServices) -> Response:
    """Whole answer, or server-sent events with `stream`."""

    async def make_prompts() -> list[Prompt]:
        return [await chat_prompt(services, body)]

    generation = await start(services, request, body, 1, make_prompts)
    return await respond(request, generation, ChatFormat(body, generation, request_id_of(request.scope)))


class ChatFormat:
    """Writes one request's choices as chat messages or message deltas."""

    def __init__(self, body: ChatBody, generation: Generation, request_id: str) -> None:
        self._body = body
        self._prompt = generation.prompts[0]
        self._tokenizer = generation.services.tokenizer
        self._facts = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": generation.model}
        self._traces: Sequence[RoutingTrace] = new_traces(generation)

    def openings(self) -> list[dict[str, Any]]:
        """The role, once per choice; the first also carries the prompt's token ids when asked for."""
        role = {"role": "assistant", "content": ""}
        chunks = [
            self._chunk([{"index": i, "delta": role, "logprobs": None, "finish_reason": None}])
            for i in range(self._body.n)
        ]
        if self._body.return_token_ids:
            chunks[0]["prompt_token_ids"] = list(self._prompt.token_ids)
        return chunks

    def chunk(self, delta: ChoiceDelta) -> dict[str, Any] | None:
        """What one delta adds. Tokens whose text is held back still send what was asked for about them."""
        choice = {"index": delta.index, "delta": {"content": delta.text} if delta.text else {}}
        extras = self._choice_extras(delta)
        prompt = self._prompt_logprobs(delta)
        shows = delta.text or delta.finish_reason or extras or prompt or (self._body.logprobs and delta.logprobs)
        if not shows:
            return None
        logprobs = chat_logprobs(self._tokenizer, delta.logprobs) if self._body.logprobs and delta.logprobs else None
        return {
            **self._chunk([{**choice, "logprobs": logprobs, "finish_reason": delta.finish_reason, **extras}]),
            **prompt,
        }

    def usage_chunk(self) -> dict[str, Any]:
        """Carries no choices."""
        return self._chunk([])

    def answer(self, choices: Sequence[ChoiceDelta]) -> dict[str, Any]:
        """The chat.completion object."""
        answer = {**self._facts, "object": "chat.completion", "choices": (self._whole_choice(c) for c in choices)}
        if self._body.return_token_ids:
            answer["prompt_token_ids"] = list(self._prompt.token_ids)
        return answer | self._prompt_logprobs(choices[0])

    def _whole_choice(self, choice: ChoiceDelta) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": chat_logprobs(self._tokenizer, choice.logprobs) if self._body.logprobs else None,
            "finish_reason": choice.finish_reason,
            **self._choice_extras(choice),
        }

    def _choice_extras(self, delta: ChoiceDelta) -> dict[str, Any]:
        """Fields beyond OpenAI's, present only when there is something to say."""
        extras: dict[str, Any] = {}
        if delta.stop_reason is not None:
            extras["stop_reason"] = delta.stop_reason
        if self._body.return_token_ids and (delta.token_ids or delta.finish_reason):
            extras["token_ids"] = list(delta.token_ids)
        if self._traces and (trace := self._traces[delta.index].describe(delta)) is not None:
            extras["routing"] = trace
        return extras

    def _prompt_logprobs(self, delta: ChoiceDelta) -> dict[str, Any]:
        """All samples share one prompt, so the first one's are enough."""
        if self._body.prompt_logprobs is None or delta.prompt_logprobs is None or delta.index != 0:
            return {}
        return {"prompt_logprobs": prompt_logprobs(self._tokenizer, delta.prompt_logprobs, self._body.prompt_logprobs)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._facts, "object": "chat.completion.chunk", "choices": choices}
