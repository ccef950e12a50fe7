"""POST /v1/chat/completions against the real engine: shapes, defaults and what every field does."""

from typing import Any

import httpx
import pytest

from server.routing.policy import Policy
from tests.api.fakes import BASE_NAME, Harness
from tests.api.sse import stream, texts

PATH = "/v1/chat/completions"


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "auto", "messages": [{"role": "user", "content": "Hi"}], **fields}


def ask(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post(PATH, json=body(**fields))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_whole_answer_has_openais_shape(client: httpx.Client) -> None:
    answer = ask(client, model=BASE_NAME, cache_salt="fresh")
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("created") > 1_700_000_000
    message = {"role": "assistant", "content": "Hello, wörld!", "refusal": None}
    assert answer == {
        "object": "chat.completion",
        "model": BASE_NAME,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 21,
            "completion_tokens": 15,  # 14 bytes and the end token
            "total_tokens": 36,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_stream_opens_with_the_role_and_joins_to_the_whole_answer(client: httpx.Client) -> None:
    chunks = stream(client, PATH, body(n=2))
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:2]] == [{"role": "assistant", "content": ""}] * 2
    assert {choice["index"] for chunk in chunks for choice in chunk["choices"]} == {0, 1}
    assert texts(chunks) == {0: "Hello, wörld!", 1: "Hello, wörld!"}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert [reason for reason in reasons if reason] == ["stop", "stop"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


def test_usage_comes_in_a_last_chunk_without_choices(client: httpx.Client) -> None:
    chunks = stream(client, PATH, body(stream_options={"include_usage": True}, max_tokens=3))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_continuous_usage_counts_up_in_every_chunk(client: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = stream(client, PATH, body(stream_options=options, max_tokens=3))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [0, 1, 2, 3, 3]


def test_message_roles_and_parts_reach_the_template(client: httpx.Client, harness: Harness) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    ask(client, messages=[{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}])
    rendered = harness.tokenizer.decode(harness.runner.seen[-1].prompt_token_ids, skip_special_tokens=False)
    assert rendered == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("fields", "ending"),
    [
        ({"continue_final_message": True}, "<|im_start|>assistant\nSure"),
        ({"continue_final_message": True, "add_generation_prompt": False}, "<|im_start|>assistant\nSure"),
        ({"add_generation_prompt": False}, "<|im_start|>assistant\nSure<|im_end|>\n"),
        ({}, "Sure<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_end_of_the_prompt_follows_the_request(
    client: httpx.Client, harness: Harness, fields: dict[str, Any], ending: str
) -> None:
    ask(client, messages=[{"role": "user", "content": "Go"}, {"role": "assistant", "content": "Sure"}], **fields)
    rendered = harness.tokenizer.decode(harness.runner.seen[-1].prompt_token_ids, skip_special_tokens=False)
    assert rendered.endswith(ending)


@pytest.mark.parametrize("kind", ["text", "message", None])
def test_a_message_may_say_that_it_is_one(client: httpx.Client, kind: str | None) -> None:
    ask(client, messages=[{"role": "user", "content": "Hi", "type": kind}])


def test_rendering_runs_off_the_event_loop(client: httpx.Client, harness: Harness) -> None:
    ask(client)
    # The warm-up, before anybody is served, is the only text that the loop's own thread encodes.
    assert any(name.startswith("tokenizer") for name in harness.tokenizer.threads)


def test_max_tokens_defaults_to_all_that_fits(client: httpx.Client, harness: Harness) -> None:
    answer = ask(client, ignore_eos=True)
    assert harness.runner.seen[-1].params.max_tokens == 512 - 21
    assert answer["usage"]["total_tokens"] == 512
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_max_tokens_limit_the_answer(client: httpx.Client, name: str) -> None:
    choice = ask(client, **{name: 5})["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello", "length")


@pytest.mark.parametrize(
    ("fields", "text", "reason", "num_tokens"),
    [
        ({"stop": "wö"}, "Hello, ", "wö", 10),
        ({"stop": ["xyz", ", "]}, "Hello", ", ", 7),
        ({"stop": ", ", "include_stop_str_in_output": True}, "Hello, ", ", ", 7),
        ({"stop": "l", "min_tokens": 5}, "Hello, wör", "l", 12),
        ({"stop_token_ids": [ord("o")]}, "Hell", ord("o"), 5),
        ({"stop_token_ids": [ord("o")], "include_stop_str_in_output": True}, "Hello", ord("o"), 5),
    ],
)
def test_stopping_cuts_text_and_token_count_alike_in_both_forms(
    client: httpx.Client, fields: dict[str, Any], text: str, reason: str | int, num_tokens: int
) -> None:
    answer = ask(client, **fields)
    choice = answer["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == (text, "stop", reason)
    assert answer["usage"]["completion_tokens"] == num_tokens
    chunks = stream(client, PATH, body(stream_options={"include_usage": True}, **fields))
    assert texts(chunks) == {0: text}
    assert chunks[-2]["choices"][0]["stop_reason"] == reason
    assert chunks[-1]["usage"]["completion_tokens"] == num_tokens


def test_end_token_is_hidden_even_when_special_tokens_are_shown(client: httpx.Client, harness: Harness) -> None:
    harness.runner.reply = "a<|im_start|>b"
    assert ask(client)["choices"][0]["message"]["content"] == "ab"
    assert ask(client, skip_special_tokens=False)["choices"][0]["message"]["content"] == "a<|im_start|>b"


@pytest.mark.parametrize("reply", ["naïve 🙂 déjà", "日本語テキスト", "a\nb\r\n\u2028c", 'data: "x"\n\n'])
def test_streamed_text_is_the_whole_text_for_any_reply(client: httpx.Client, harness: Harness, reply: str) -> None:
    harness.runner.reply = reply
    assert ask(client)["choices"][0]["message"]["content"] == reply
    assert texts(stream(client, PATH, body())) == {0: reply}


def test_logprobs_describe_every_token_with_its_alternatives(client: httpx.Client) -> None:
    content = ask(client, logprobs=True, top_logprobs=2, max_tokens=2)["choices"][0]["logprobs"]["content"]
    assert content[0] == {
        "token": "H",
        "logprob": -1.5,
        "bytes": [72],
        "top_logprobs": [
            {"token": "Z", "logprob": -0.25, "bytes": [90]},
            {"token": "H", "logprob": -1.5, "bytes": [72]},
        ],
    }
    assert len(content) == 2


def test_streamed_logprobs_join_to_those_of_the_whole_answer(client: httpx.Client, harness: Harness) -> None:
    harness.runner.reply = "ö stop"
    fields = {"logprobs": True, "top_logprobs": 1, "stop": "st"}
    whole = ask(client, **fields)["choices"][0]["logprobs"]["content"]
    chunks = stream(client, PATH, body(**fields))
    streamed = [
        entry for c in chunks if c["choices"][0]["logprobs"] for entry in c["choices"][0]["logprobs"]["content"]
    ]
    assert streamed == whole
    assert [entry["token"] for entry in whole] == ["bytes:\\xc3", "bytes:\\xb6", " ", "s", "t"]


def test_token_ids_come_back_on_request(client: httpx.Client, harness: Harness) -> None:
    answer = ask(client, return_token_ids=True, max_tokens=3)
    prompt = harness.tokenizer.render_chat([{"role": "user", "content": "Hi"}])
    assert answer["prompt_token_ids"] == prompt
    assert answer["choices"][0]["token_ids"] == [*b"Hel"]
    chunks = stream(client, PATH, body(return_token_ids=True, max_tokens=3))
    assert chunks[0]["prompt_token_ids"] == prompt
    assert [i for chunk in chunks for i in chunk["choices"][0].get("token_ids", [])] == [*b"Hel"]


def test_prompt_logprobs_have_vllms_shape(client: httpx.Client) -> None:
    scored = ask(client, prompt_logprobs=1, max_tokens=1)["prompt_logprobs"]
    assert scored[0] is None
    assert len(scored) == 21
    assert scored[1] == {
        str(ord("u")): {"logprob": -1.5, "rank": 2, "decoded_token": "u"},
        "90": {"logprob": -0.25, "rank": 1, "decoded_token": "Z"},
    }
    chunks = stream(client, PATH, body(prompt_logprobs=1, max_tokens=1))
    assert [chunk["prompt_logprobs"] for chunk in chunks if "prompt_logprobs" in chunk] == [scored]


def test_every_sampling_field_reaches_the_engine(client: httpx.Client, harness: Harness) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.05, "seed": -3, "presence_penalty": 0.1,
        "frequency_penalty": -0.2, "repetition_penalty": 1.1, "min_tokens": 2, "ignore_eos": True,
    }  # fmt: skip
    ask(client, **fields, logit_bias={"65": -100, "66": 1.5}, max_tokens=4, priority=-2, cache_salt="tenant", user="u")
    sequence = harness.runner.seen[-1]
    assert {name: getattr(sequence.params, name) for name in fields} == fields
    assert sequence.params.logit_bias == ((65, -100.0), (66, 1.5))
    assert (sequence.params.max_tokens, sequence.priority, sequence.cache_salt) == (4, -2, "tenant")


@pytest.mark.parametrize("temperature", [0, 1e-320, 9.9e-6])
def test_temperatures_that_float32_cannot_divide_by_are_greedy(
    client: httpx.Client, harness: Harness, temperature: float
) -> None:
    ask(client, temperature=temperature)
    assert harness.runner.seen[-1].params.temperature == 0


def test_values_of_unsupported_fields_that_ask_for_nothing_are_accepted(client: httpx.Client) -> None:
    no_ops: dict[str, Any] = {
        "detokenize": True, "return_tokens_as_token_ids": False, "logits_processors": [], "mm_processor_kwargs": {},
        "vllm_xargs": {}, "kv_transfer_params": None, "prompt_embeds": None, "request_id": None,
        "parallel_tool_calls": False, "echo": False, "add_special_tokens": False, "truncate_prompt_tokens": None,
        "tools": [], "tool_choice": "auto", "function_call": "auto", "suffix": "", "nobody_knows_this": None,
    }  # fmt: skip
    ask(client, **no_ops)
    for field in ("detokenize", "return_tokens_as_token_ids", "add_special_tokens"):
        response = client.post(PATH, json=body(**{field: not no_ops[field]}))
        assert response.json()["error"]["code"] == "unsupported_field"


def test_labels_and_hints_change_nothing(client: httpx.Client) -> None:
    labels = {"user": "u", "safety_identifier": "s", "metadata": {"job": "7"}, "prompt_cache_key": "k"}
    assert ask(client, **labels)["choices"] == ask(client)["choices"]


def test_null_asks_for_nothing_in_messages_and_parts_too(client: httpx.Client) -> None:
    parts = [{"type": "text", "text": "x", "cache_control": None}]
    nothing: dict[str, Any] = {"annotations": [], "refusal": None, "audio": None, "reasoning": None}
    answered = {"role": "assistant", "content": "y", **nothing}
    ask(client, messages=[{"role": "user", "content": parts}, answered, {"role": "user", "content": "z", "foo": None}])


def test_defaults_are_openais(client: httpx.Client, harness: Harness) -> None:
    ask(client, temperature=None, seed=None, stop=None, n=None, tools=[], response_format={"type": "text"}, store=False)
    params = harness.runner.seen[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.seed, params.logprobs) == (1.0, 1.0, 0, None, None)


@pytest.mark.parametrize(
    ("fields", "policy"),
    [
        ({"model": "auto"}, Policy.ROUTED),
        ({"model": BASE_NAME}, Policy.BASE),
        ({"model": "mbpp"}, Policy.PINNED),
        ({"model": "auto", "adapters": {"gsm8k": 0.7, "mbpp": 0.3}}, Policy.WEIGHTED),
        ({"model": "auto", "adapters": ["gsm8k"]}, Policy.ROUTED),
    ],
)
def test_model_and_adapters_choose_the_policy(
    client: httpx.Client, harness: Harness, fields: dict[str, Any], policy: Policy
) -> None:
    answer = ask(client, **fields)
    assert answer["model"] == fields["model"]
    assert harness.runner.seen[-1].plan.policy is policy


def test_top_k_adapters_reaches_the_plan(client: httpx.Client, harness: Harness) -> None:
    ask(client, adapters=["gsm8k", "mbpp", "sst2"], top_k_adapters=3)
    assert harness.runner.seen[-1].plan.top_k == 3
    assert harness.runner.seen[-1].plan.allowed_slots == (1, 2, 3)


def test_second_equal_prompt_reports_cached_tokens(client: httpx.Client) -> None:
    assert ask(client, cache_salt="mine")["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    usage = ask(client, cache_salt="mine")["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 16  # one full block of the 21 tokens


def test_samples_of_one_prompt_count_its_tokens_once(client: httpx.Client) -> None:
    usage = ask(client, n=3, max_tokens=2)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (21, 6)
