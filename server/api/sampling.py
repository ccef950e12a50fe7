"""From a validated body to the engine's sampling parameters: what fields mean together, and within our limits.

Ranges of single fields are already checked (`api/schemas.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from server.adapters.roster import AUTO_MODEL
from server.api.schemas import ChatBody, ChatMessage, CompletionBody, GenerationBody
from server.engine.sequence import SamplingParams, TraceLevel
from server.errors import ContextLengthError, InvalidRequestError

GREEDY_BELOW = 1e-5
"""Temperatures below are greedy, as in vLLM: dividing logits by them leaves the range of float32."""
PROMPTS_PER_SAMPLE_LIMIT = 64
"""One completions request may ask for `max_n` times this many sequences; see `ServerSettings.max_n`."""


@dataclass(frozen=True)
class Limits:
    """What configuration, model and vocabulary allow."""

    max_n: int
    max_logprobs: int
    max_model_len: int
    max_prompt_tokens: int
    vocab_size: int


@dataclass(frozen=True)
class _Problem:
    param: str
    reason: str


def check_body(body: GenerationBody, limits: Limits) -> None:
    """Raise InvalidRequestError for everything that does not fit together or exceeds a limit."""
    problems = _common_problems(body, limits)
    problems += _chat_problems(body, limits) if isinstance(body, ChatBody) else []
    problems += _completion_problems(body, limits) if isinstance(body, CompletionBody) else []
    _raise_any(problems)


def _raise_any(problems: Sequence[_Problem]) -> None:
    if problems:
        message = "; ".join(f"{problem.param} {problem.reason}" for problem in problems)
        raise InvalidRequestError(message, param=problems[0].param)


def _common_problems(body: GenerationBody, limits: Limits) -> list[_Problem]:
    is_weighted = isinstance(body.adapters, dict)
    checks = [
        (body.n > limits.max_n, "n", f"must be at most {limits.max_n}, got {body.n}"),
        (body.stream_options is not None and not body.stream, "stream_options", "needs stream to be true"),
        (
            body.has_continuous_usage and not body.includes_usage,
            "stream_options.continuous_usage_stats",
            "needs include_usage to be true",
        ),
        (
            (body.prompt_logprobs or 0) > limits.max_logprobs,
            "prompt_logprobs",
            f"must be at most {limits.max_logprobs}, got {body.prompt_logprobs}",
        ),
        (
            body.adapters is not None and body.model != AUTO_MODEL,
            "adapters",
            f"is only for model '{AUTO_MODEL}', not for {body.model!r}",
        ),
        (
            body.top_k_adapters is not None and (body.model != AUTO_MODEL or is_weighted),
            "top_k_adapters",
            f"is only for routed requests: model '{AUTO_MODEL}' without fixed adapter weights",
        ),
        (
            any(token_id >= limits.vocab_size for token_id, _ in body.logit_bias),
            "logit_bias",
            f"must name token ids below {limits.vocab_size}",
        ),
        (
            any(token_id >= limits.vocab_size for token_id in body.stop_token_ids),
            "stop_token_ids",
            f"must be below {limits.vocab_size}",
        ),
    ]
    return [_Problem(param, reason) for is_wrong, param, reason in checks if is_wrong]


def _chat_problems(body: ChatBody, limits: Limits) -> list[_Problem]:
    checks = [
        (
            None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens,
            "max_tokens",
            "is another name of max_completion_tokens; the two differ",
        ),
        (body.top_logprobs is not None and not body.logprobs, "top_logprobs", "needs logprobs to be true"),
        (
            (body.top_logprobs or 0) > limits.max_logprobs,
            "top_logprobs",
            f"must be at most {limits.max_logprobs}, got {body.top_logprobs}",
        ),
    ]
    problems = [_Problem(param, reason) for is_wrong, param, reason in checks if is_wrong]
    if body.continue_final_message:
        problems += _continuation_problems(body.messages, body.add_generation_prompt)
    return problems


def check_continuation(messages: Sequence[ChatMessage], add_generation_prompt: bool | None) -> None:
    """Raise InvalidRequestError if `continue_final_message` cannot be had together with these."""
    _raise_any(_continuation_problems(messages, add_generation_prompt))


def _continuation_problems(messages: Sequence[ChatMessage], add_generation_prompt: bool | None) -> list[_Problem]:
    checks = [
        (add_generation_prompt is True, "and add_generation_prompt exclude each other"),
        (messages[-1].role != "assistant", "needs the last message to be the assistant's"),
    ]
    return [_Problem("continue_final_message", reason) for is_wrong, reason in checks if is_wrong]


def _completion_problems(body: CompletionBody, limits: Limits) -> list[_Problem]:
    max_sequences = limits.max_n * PROMPTS_PER_SAMPLE_LIMIT
    num_sequences = len(body.prompt) * body.n
    scores_prompt = body.echo or body.prompt_logprobs is not None
    checks = [
        (
            num_sequences > max_sequences,
            "prompt",
            f"times n must ask for at most {max_sequences} completions, got {num_sequences}",
        ),
        (
            (body.logprobs or 0) > limits.max_logprobs,
            "logprobs",
            f"must be at most {limits.max_logprobs}, got {body.logprobs}",
        ),
        (
            body.max_tokens == 0 and not scores_prompt,
            "max_tokens",
            "must be at least 1, got 0 (0 only scores a prompt: with echo or prompt_logprobs)",
        ),
        (
            any(isinstance(prompt, list) and max(prompt) >= limits.vocab_size for prompt in body.prompt),
            "prompt",
            f"must hold token ids below {limits.vocab_size}",
        ),
    ]
    return [_Problem(param, reason) for is_wrong, param, reason in checks if is_wrong]


def requested_max_tokens(body: GenerationBody) -> int | None:
    """`max_tokens` as the request has it; None asks for all that fits."""
    if isinstance(body, ChatBody):
        return body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    assert isinstance(body, CompletionBody)
    return body.max_tokens


def check_vocabulary(token_ids: Sequence[int], limits: Limits, param: str) -> None:
    """Raises InvalidRequestError for the field `param` if its text has a token that the model knows nothing of: some
    tokenizers have more, a padding token mostly, than the model has embeddings."""
    if max(token_ids, default=0) >= limits.vocab_size:
        unknown = next(token_id for token_id in token_ids if token_id >= limits.vocab_size)
        raise InvalidRequestError(
            f"{param} has token {unknown} of the tokenizer in its text, and the model knows ids below "
            f"{limits.vocab_size}; leave that control token out",
            param=param,
        )


def sampling_params(body: GenerationBody, num_prompt_tokens: int, limits: Limits) -> SamplingParams:
    """Parameters for one prompt. Raises ContextLengthError, and InvalidRequestError for an empty prompt."""
    trace = None if body.routing is None else TraceLevel(body.routing.trace)
    return SamplingParams(
        temperature=0.0 if body.temperature < GREEDY_BELOW else body.temperature,
        top_p=body.top_p,
        top_k=max(0, body.top_k),
        min_p=body.min_p,
        seed=body.seed,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=body.logit_bias,
        max_tokens=_fitting_max_tokens(body, num_prompt_tokens, limits),
        min_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
        stop_token_ids=tuple(body.stop_token_ids),
        logprobs=num_logprobs(body),
        prompt_logprobs=_num_prompt_logprobs(body),
        trace_routing=trace,
    )


def num_logprobs(body: GenerationBody) -> int | None:
    """Alternatives per generated token; None for no logprobs at all."""
    if isinstance(body, ChatBody):
        return (body.top_logprobs or 0) if body.logprobs else None
    assert isinstance(body, CompletionBody)
    return body.logprobs


def _num_prompt_logprobs(body: GenerationBody) -> int | None:
    """Echoing a completion with logprobs needs the prompt's as well."""
    wanted = [] if body.prompt_logprobs is None else [body.prompt_logprobs]
    if isinstance(body, CompletionBody) and body.echo and body.logprobs is not None:
        wanted.append(body.logprobs)
    return max(wanted, default=None)


def _fitting_max_tokens(body: GenerationBody, num_prompt_tokens: int, limits: Limits) -> int:
    param = "messages" if isinstance(body, ChatBody) else "prompt"
    if num_prompt_tokens == 0:
        raise InvalidRequestError(f"{param} has no tokens; send at least one", param=param)
    wanted = requested_max_tokens(body)
    longest = min(limits.max_prompt_tokens, limits.max_model_len - (0 if wanted == 0 else 1))
    if num_prompt_tokens > longest:
        raise ContextLengthError(
            f"{_context_words(limits)} {param} has {num_prompt_tokens} tokens; at most {longest} are allowed",
            param=param,
        )
    room = limits.max_model_len - num_prompt_tokens
    is_default = body.model_fields_set.isdisjoint(("max_tokens", "max_completion_tokens"))
    if wanted is None or (is_default and wanted > room):
        wanted = room
    if wanted > room:
        name = "max_completion_tokens" if "max_completion_tokens" in body.model_fields_set else "max_tokens"
        raise ContextLengthError(
            f"{_context_words(limits)} {param} has {num_prompt_tokens} tokens and {name} asks for {wanted} more. "
            f"Ask for at most {room}.",
            param=name,
        )
    if body.min_tokens > wanted:
        raise InvalidRequestError(f"min_tokens must be at most {wanted}, got {body.min_tokens}", param="min_tokens")
    return wanted


def _context_words(limits: Limits) -> str:
    """OpenAI's and vLLM's own words: litellm and others know a prompt that is too long by them, not by the code."""
    return f"This model's maximum context length is {limits.max_model_len} tokens."
