"""Bodies of chat and completions requests: OpenAI's fields, vLLM's sampling extras, and the routing extensions.

Checks what one field can say alone. What depends on other fields, the configuration or the vocabulary is checked in
`api/sampling.py`. `user`, `safety_identifier`, `metadata` and `prompt_cache_key` are the caller's own labels and hints,
which change no answer: accepted, never used.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from server.api.fields import IsNoOp, StrictBody, Text, at_most, never, only
from server.api.values import AdapterPool, Content, LogitBias, Prompts, StopStrings

INT32 = 2**31 - 1
MAX_MESSAGES = 2048
MAX_STOP_TOKEN_IDS = 128
MAX_METADATA = 16
"""As OpenAI has it."""
MIN_REPETITION_PENALTY = 0.01
"""Logits are divided by it: much less, and they leave the range of float32."""

Label = Annotated[Text, Field(min_length=1, max_length=512)]
TokenCount = Annotated[int, Field(ge=1, le=INT32)]
TokenId = Annotated[int, Field(ge=0, le=INT32)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


def _is_n(value: Any, body: Mapping[str, Any]) -> bool:
    """`best_of` equal to `n` asks for nothing more."""
    return type(value) is int and value == (1 if body.get("n") is None else body["n"])


UNSUPPORTED_EVERYWHERE: Mapping[str, IsNoOp] = {
    "store": only(False),
    "service_tier": only("auto", "default"),
    "best_of": _is_n,
    "suffix": only(""),
    "response_format": only({"type": "text"}),
    "structured_outputs": never,
    "guided_json": never,
    "guided_regex": never,
    "guided_choice": never,
    "guided_grammar": never,
    "prompt_cache_options": never,
    "prompt_cache_retention": never,
    "use_beam_search": only(False),
    "length_penalty": only(1, 1.0),
    "bad_words": only([]),
    "allowed_token_ids": never,
    "truncate_prompt_tokens": never,
    "spaces_between_special_tokens": only(True),
    "detokenize": only(True),
    "return_tokens_as_token_ids": only(False),
    "logits_processors": only([]),
    "mm_processor_kwargs": only({}),
    "vllm_xargs": only({}),
    "kv_transfer_params": never,
    "prompt_embeds": never,
    "request_id": never,
}
"""Fields of OpenAI and vLLM that we do not serve, with the values that ask for nothing."""

UNSUPPORTED_IN_CHAT: Mapping[str, IsNoOp] = {
    **UNSUPPORTED_EVERYWHERE,
    "tools": only([]),
    "tool_choice": only("none", "auto"),  # says nothing without tools
    "parallel_tool_calls": only(True, False),  # nor does this
    "functions": only([]),
    "function_call": only("none", "auto"),
    "audio": never,
    "modalities": only(["text"]),
    "prediction": never,
    "reasoning_effort": only("none"),
    "verbosity": only("medium"),
    "web_search_options": never,
    "moderation": never,
    "chat_template": never,
    "chat_template_kwargs": only({}),
    "documents": only([]),
    "echo": only(False),
    "add_special_tokens": only(False),
}


class StreamOptions(StrictBody):
    """What a stream carries besides text."""

    unsupported: ClassVar[Mapping[str, IsNoOp]] = {"include_obfuscation": only(False)}

    include_usage: bool = False
    """End with a chunk that has no choices and the token counts of the request."""
    continuous_usage_stats: bool = False
    """Token counts so far in every chunk; needs include_usage."""


class RoutingOptions(StrictBody):
    """What to tell about the routing decision."""

    trace: Literal["summary", "tokens", "layers"]
    """Mean share per adapter; also the shares of every token; also those of every layer of every token."""


class GenerationBody(StrictBody):
    """What chat and completions requests share."""

    model: Label
    """`auto` (routed over all adapters), the base model's name (no adapter) or the name of one adapter."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: TokenCount = 1
    """Samples per prompt."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    """0 is greedy, and so is anything below 0.00001."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=INT32)] = 0
    """Number of most likely tokens kept; 0 and -1 keep all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    """Sample i of n uses seed + i."""
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(ge=MIN_REPETITION_PENALTY, le=10)] = 1.0
    logit_bias: LogitBias = Field(default=(), json_schema_extra={"default": {}})

    stop: StopStrings = ()
    stop_token_ids: Annotated[list[TokenId], at_most(MAX_STOP_TOKEN_IDS)] = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    min_tokens: Annotated[int, Field(ge=0, le=INT32)] = 0
    """No end of sequence and no stop before this many tokens."""
    ignore_eos: bool = False
    skip_special_tokens: bool = True

    prompt_logprobs: Annotated[int, Field(ge=0)] | None = None
    return_token_ids: bool = False
    cache_salt: Label | None = None
    """Requests share cached prompt prefixes only with requests of the same salt."""
    priority: Annotated[int, Field(ge=-INT32, le=INT32)] = 0
    """Lower runs first."""

    adapters: AdapterPool | None = None
    """Only with model `auto`: a list narrows the routed pool, an object fixes the weights."""
    top_k_adapters: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Only with routing: adapters mixed per token, instead of the router's own number."""
    routing: RoutingOptions | None = None

    user: Text | None = None
    """Opaque label; not used."""
    safety_identifier: Text | None = None
    """Opaque label; not used."""
    metadata: Annotated[dict[str, Text] | None, at_most(MAX_METADATA)] = None
    """Opaque labels; not used."""
    prompt_cache_key: Text | None = None
    """Hint for servers behind a balancer; not used: equal prefixes are found without it, see `cache_salt`."""

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def has_continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


class ChatMessage(StrictBody):
    """One message. `name` is refused: the chat template has no place for it, so it would be ignored.

    `type` may say what a message is anyway; lm-evaluation-harness sends `text`, OpenAI's newer API `message`.
    """

    unsupported: ClassVar[Mapping[str, IsNoOp]] = {
        "type": only("text", "message"),
        "name": never,
        "tool_calls": only([]),
        "tool_call_id": never,
        "function_call": never,
        "refusal": never,
        "annotations": only([]),
        "audio": never,
        "reasoning_content": never,
    }

    role: Literal["system", "developer", "user", "assistant"]
    """`developer` is OpenAI's newer word for `system` and is rendered as such."""
    content: Content
    """Text, or a list of text parts, which newlines join."""


class ChatBody(GenerationBody):
    """Body of POST /v1/chat/completions."""

    unsupported: ClassVar[Mapping[str, IsNoOp]] = UNSUPPORTED_IN_CHAT

    messages: Annotated[list[ChatMessage], at_most(MAX_MESSAGES), Field(min_length=1)]
    max_completion_tokens: TokenCount | None = None
    max_tokens: TokenCount | None = None
    """Older name of max_completion_tokens. Default: all that fits the context."""
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    add_generation_prompt: bool | None = None
    """Whether the prompt ends with the start of an answer; default: unless continue_final_message."""
    continue_final_message: bool = False
    """Continue the last message, an assistant's, instead of starting an answer."""


class CompletionBody(GenerationBody):
    """Body of POST /v1/completions."""

    unsupported: ClassVar[Mapping[str, IsNoOp]] = UNSUPPORTED_EVERYWHERE

    prompt: Prompts
    """Text, token ids, or a list of either; choice index = prompt index * n + sample index."""
    max_tokens: Annotated[int, Field(ge=0, le=INT32)] = 16
    """0 only scores the prompt; needs echo or prompt_logprobs."""
    echo: bool = False
    """Put the prompt before the completion; with logprobs, also the prompt's logprobs."""
    logprobs: Annotated[int, Field(ge=0)] | None = None
    add_special_tokens: bool = True
    """Whether the tokenizer adds its own special tokens (such as a start token) to text prompts."""
