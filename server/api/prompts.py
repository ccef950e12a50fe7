"""From a body to prompts: rendering and tokenizing off the event loop, then fitting them into the context."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from server.api.generation import Prompt
from server.api.sampling import Limits, check_vocabulary, sampling_params
from server.api.schemas import ChatBody, ChatMessage, CompletionBody, GenerationBody
from server.api.services import Services
from server.api.values import PromptInput
from server.errors import InvalidRequestError
from server.routing.policy import GatePlan, Policy

T = TypeVar("T")

MAX_LOGPROBS_IN_ANSWER = 2**21
"""Log-probabilities that one request may ask for, alternatives included: about 140 bytes each until they are written,
and some seconds of writing. A hundred prompts of 2,000 tokens with nine alternatives are as many."""


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
    token_ids = await chat_token_ids(services, body.messages, body.add_generation_prompt, body.continue_final_message)
    limits = limits_of(services)
    check_vocabulary(token_ids, limits, "messages")
    return Prompt(tuple(token_ids), sampling_params(body, len(token_ids), limits))


async def chat_token_ids(
    services: Services,
    messages: Sequence[ChatMessage],
    add_generation_prompt: bool | None,
    continue_final_message: bool,
) -> list[int]:
    """The messages through the chat template. Raises InvalidRequestError if the template refuses them."""

    def render() -> list[int]:
        return services.tokenizer.render_chat(
            [_template_message(message) for message in messages],
            add_generation_prompt=not continue_final_message
            if add_generation_prompt is None
            else add_generation_prompt,
            continue_final_message=continue_final_message,
        )

    return await on_tokenizer_threads(services, render)


async def completion_prompts(services: Services, body: CompletionBody) -> list[Prompt]:
    """One prompt per entry of `prompt`."""

    def encode(prompt: PromptInput) -> list[int]:
        if isinstance(prompt, str):
            return services.tokenizer.encode(prompt, add_special_tokens=body.add_special_tokens)
        return prompt

    all_ids = await on_tokenizer_threads(services, lambda: [encode(prompt) for prompt in body.prompt])
    limits = limits_of(services)
    for ids in all_ids:
        check_vocabulary(ids, limits, "prompt")
    return [Prompt(tuple(ids), sampling_params(body, len(ids), limits)) for ids in all_ids]


def check_scores(body: GenerationBody, prompts: Sequence[Prompt], limits: Limits) -> None:
    """Raise InvalidRequestError for more log-probabilities than MAX_LOGPROBS_IN_ANSWER, or than one sequence of the
    longest context may have, if that is more.
    """
    num_scores = body.n * sum(map(_num_scores, prompts))
    most = max(MAX_LOGPROBS_IN_ANSWER, limits.max_model_len * (limits.max_logprobs + 1))
    if num_scores > most:
        names = ("prompt_logprobs", "top_logprobs", "logprobs")
        param = max(names, key=lambda name: getattr(body, name, None) or 0)
        raise InvalidRequestError(
            f"{param} asks for up to {num_scores} log-probabilities over {len(prompts) * body.n} sequences, "
            f"alternatives included; at most {most} fit into one answer. Ask for fewer of them, or for fewer prompts, "
            "n or max_tokens.",
            param=param,
        )


def _num_scores(prompt: Prompt) -> int:
    """Of one sample."""
    params = prompt.params
    return sum(
        num_tokens * (num_alternatives + 1)
        for num_tokens, num_alternatives in (
            (len(prompt.token_ids), params.prompt_logprobs),
            (params.max_tokens, params.logprobs),
        )
        if num_alternatives is not None
    )


async def read_questions(services: Services, plans: Sequence[GatePlan], prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """The prompts, each with what the prompt gate of its plan's router decides; milliseconds for a long question, so
    off the event loop. The requests must hold their plans."""
    if all(plan.policy is not Policy.ROUTED for plan in plans):
        return prompts

    def read() -> list[Prompt]:
        return [
            replace(prompt, course=services.registry.prompt_course(plan, prompt.token_ids))
            for plan, prompt in zip(plans, prompts, strict=True)
        ]

    return await on_tokenizer_threads(services, read)


async def on_tokenizer_threads(services: Services, work: Callable[[], T]) -> T:
    """Run text work that may be long; the event loop goes on."""
    return await asyncio.get_running_loop().run_in_executor(services.tokenizer_threads, work)


def _template_message(message: ChatMessage) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": message.content}
