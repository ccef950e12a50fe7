"""POST /v1/completions: text completions in OpenAI's shape, with echo, logprobs and token ids as vLLM has them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.answers import respond, start
from server.api.choice import ChoiceDelta
from server.api.errors import ERROR_RESPONSES, request_id_of
from server.api.generation import Generation
from server.api.logprobs import completion_logprobs, prompt_logprobs
from server.api.prompts import completion_prompts, on_tokenizer_threads
from server.api.schemas import CompletionBody
from server.api.services import InjectedServices
from server.api.streaming import STREAMED_RESPONSES
from server.api.trace import new_traces
from server.engine.sequence import TokenLogprobs
from server.model.detokenizer import IncrementalDetokenizer, TokenDecoder

router = APIRouter(tags=["generation"], responses=ERROR_RESPONSES)


@router.post("/v1/completions", summary="Continue a text", responses=STREAMED_RESPONSES)
async def create_completion(body: CompletionBody, request: Request, services: InjectedServices) -> Response:
    """Whole answer, or server-sent events with `stream`."""
    generation = await start(services, request, body, len(body.prompt), lambda: completion_prompts(services, body))
    echoes: list[EchoedPrompt] = []
    if body.echo:
        try:
            echoes = await on_tokenizer_threads(
                services, lambda: [echo(services.tokenizer, prompt.token_ids) for prompt in generation.prompts]
            )
        except BaseException:
            generation.close()
            raise
    return await respond(request, generation, CompletionFormat(body, generation, echoes, request_id_of(request.scope)))


@dataclass(frozen=True)
class EchoedPrompt:
    """A prompt as text, special tokens included, and where each of its tokens starts in it."""

    text: str
    offsets: tuple[int, ...]


class OffsetTracker:
    """Where in a choice's text each token starts: the length of all complete text before it, in characters.

    Stop strings play no part, so a token inside a removed stop string keeps the place it would have had.
    """

    def __init__(
        self, tokenizer: TokenDecoder, start: int, *, skip_special_tokens: bool, context: Sequence[int] = ()
    ) -> None:
        """`context` as `IncrementalDetokenizer` takes it."""
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens, context=context)
        self._length = start

    def push(self, token_ids: Sequence[int]) -> list[int]:
        """Offset of each token."""
        offsets = []
        for token_id in token_ids:
            offsets.append(self._length)
            self._length += len(self._detokenizer.push((token_id,)).text)
        return offsets


def echo(tokenizer: TokenDecoder, token_ids: Sequence[int]) -> EchoedPrompt:
    """The prompt's tokens as text."""
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    text, offsets = "", []
    for token_id in token_ids:
        offsets.append(len(text))
        text += detokenizer.push((token_id,)).text
    return EchoedPrompt(text + detokenizer.finish().text, tuple(offsets))


class CompletionFormat:
    """Writes one request's choices as completions, whole or in chunks."""

    def __init__(
        self, body: CompletionBody, generation: Generation, echoes: Sequence[EchoedPrompt], request_id: str
    ) -> None:
        self._body = body
        self._prompts = generation.prompts
        self._echoes = echoes
        self._tokenizer = generation.services.tokenizer
        self._facts = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": generation.model,
        }
        self._traces = new_traces(generation)
        self._begun: set[int] = set()
        self._offsets = [
            OffsetTracker(
                self._tokenizer,
                len(echoes[choice.index // body.n].text) if echoes else 0,
                skip_special_tokens=body.skip_special_tokens,
                context=generation.prompts[choice.index // body.n].token_ids,
            )
            for choice in generation.choices
        ]

    def openings(self) -> list[dict[str, Any]]:
        """A completion starts with its first text."""
        return []

    def chunk(self, delta: ChoiceDelta) -> dict[str, Any] | None:
        """What one delta adds; None while its text is held back and nothing else was asked for."""
        choice = self._choice(delta)
        silent = choice.keys() == {"index", "text", "logprobs", "finish_reason"} and choice["logprobs"] is None
        if silent and not choice["text"] and choice["finish_reason"] is None:
            return None
        return {**self._facts, "choices": [choice]}

    def usage_chunk(self) -> dict[str, Any]:
        """Carries no choices."""
        return {**self._facts, "choices": []}

    def answer(self, choices: Sequence[ChoiceDelta]) -> dict[str, Any]:
        """The text_completion object."""
        return {**self._facts, "choices": (self._choice(choice) for choice in choices)}

    def _choice(self, delta: ChoiceDelta) -> dict[str, Any]:
        is_first = delta.index not in self._begun
        self._begun.add(delta.index)
        prompt_index = delta.index // self._body.n
        echoed = self._echoes[prompt_index] if self._echoes and is_first else None
        choice: dict[str, Any] = {
            "index": delta.index,
            "text": (echoed.text if echoed else "") + delta.text,
            "logprobs": self._logprobs(delta, echoed),
            "finish_reason": delta.finish_reason,
        }
        if delta.stop_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if self._body.return_token_ids and (delta.token_ids or is_first or delta.finish_reason):
            choice["token_ids"] = list(delta.token_ids)
            if is_first:
                choice["prompt_token_ids"] = list(self._prompts[prompt_index].token_ids)
        if self._body.prompt_logprobs is not None and delta.prompt_logprobs is not None:
            num_top = self._body.prompt_logprobs
            choice["prompt_logprobs"] = prompt_logprobs(self._tokenizer, delta.prompt_logprobs, num_top)
        if self._traces and (trace := self._traces[delta.index].describe(delta)) is not None:
            choice["routing"] = trace
        return choice

    def _logprobs(self, delta: ChoiceDelta, echoed: EchoedPrompt | None) -> dict[str, Any] | None:
        num_top = self._body.logprobs
        if num_top is None:
            return None
        token_ids = list(delta.token_ids)
        entries: list[TokenLogprobs | None] = list(delta.logprobs)
        offsets = self._offsets[delta.index].push(delta.token_ids)
        if echoed is not None:
            assert delta.prompt_logprobs is not None, "echo with logprobs asks the engine for the prompt's"
            token_ids = [*self._prompts[delta.index // self._body.n].token_ids, *token_ids]
            entries = [*delta.prompt_logprobs, *entries]
            offsets = [*echoed.offsets, *offsets]
        elif not token_ids and delta.finish_reason is None:
            return None
        return completion_logprobs(self._tokenizer, token_ids, entries, offsets, num_top)
