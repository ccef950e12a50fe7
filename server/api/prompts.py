"""From a body to prompts: rendering and tokenizing off the event loop, then fitting them into the context."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from server.api.generation import Prompt
from server.api.sampling import Limits, sampling_params
from server.api.schemas import ChatBody, ChatMessage, CompletionBody
from server.api.services import Services
from server.api.values import PromptInput

T = TypeVar("T")


def limits_of(services: Services) -> Limits:
    """What requests may ask for."""
    settings = services.config.server
    return Limits(
        max_n=settings.max_n,
        max_logprobs=settings.max_logprobs,
        max_model_len=services.max_model_len,
        max_prompt_tokens=settings.max_prompt_tokens or services.max_model_len,
        vocab_size=services.vocab_size,
    )


async def chat_prompt(services: Services, body: ChatBody) -> Prompt:
    """Render the messages with the model's chat template. Raises InvalidRequestError if the template refuses them."""
    adds_generation_prompt = body.add_generation_prompt
    if adds_generation_prompt is None:
        adds_generation_prompt = not body.continue_final_message

    def render() -> list[int]:
        return services.tokenizer.render_chat(
            [_template_message(message) for message in body.messages],
            add_generation_prompt=adds_generation_prompt,
            continue_final_message=body.continue_final_message,
        )

    token_ids = await on_tokenizer_threads(services, render)
    return Prompt(tuple(token_ids), sampling_params(body, len(token_ids), limits_of(services)))


async def completion_prompts(services: Services, body: CompletionBody) -> list[Prompt]:
    """One prompt per entry of `prompt`."""

    def encode(prompt: PromptInput) -> list[int]:
        if isinstance(prompt, str):
            return services.tokenizer.encode(prompt, add_special_tokens=body.add_special_tokens)
        return prompt

    all_ids = await on_tokenizer_threads(services, lambda: [encode(prompt) for prompt in body.prompt])
    limits = limits_of(services)
    return [Prompt(tuple(ids), sampling_params(body, len(ids), limits)) for ids in all_ids]


async def on_tokenizer_threads(services: Services, work: Callable[[], T]) -> T:
    """Run text work that may be long; the event loop goes on."""
    return await asyncio.get_running_loop().run_in_executor(services.tokenizer_threads, work)


def _template_message(message: ChatMessage) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": message.content}
