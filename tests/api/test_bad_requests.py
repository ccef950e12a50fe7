"""Every malformed, absurd or unsupported request: right status, OpenAI's envelope, the field, and helpful words."""

import dataclasses
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from server.api import prompts
from tests.api.envelope import refusal
from tests.api.fakes import BASE_NAME, Harness

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]


def post_json(client: httpx.Client, path: str, body: Any) -> httpx.Response:
    """Escapes everything outside ASCII, so that lone surrogates can be sent."""
    return client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})


def refuse_chat(client: httpx.Client, fields: dict[str, Any], status: int = 400) -> dict[str, Any]:
    return refusal(post_json(client, CHAT, {"model": "auto", "messages": MESSAGES, **fields}), status)


def refuse_completion(client: httpx.Client, fields: dict[str, Any], status: int = 400) -> dict[str, Any]:
    return refusal(post_json(client, COMPLETIONS, {"model": "auto", "prompt": "Hi", **fields}), status)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": -0.1}, "must be at least 0, got -0.1"),
        ({"temperature": 2.1}, "must be at most 2, got 2.1"),
        ({"temperature": "1"}, "must be a number, not a string"),
        ({"temperature": True}, "must be a number, not a boolean"),
        ({"top_p": 0}, "must be greater than 0, got 0"),
        ({"top_p": 1.01}, "must be at most 1"),
        ({"top_k": -2}, "must be at least -1"),
        ({"top_k": 1.5}, "must be an integer, not a number"),
        ({"min_p": 1.5}, "must be at most 1"),
        ({"presence_penalty": 2.5}, "must be at most 2"),
        ({"frequency_penalty": -3}, "must be at least -2"),
        ({"repetition_penalty": 0}, "must be at least 0.01"),
        ({"repetition_penalty": 1e-38}, "must be at least 0.01"),
        ({"repetition_penalty": 11}, "must be at most 10"),
        ({"seed": 2**63}, "must be at most 9223372036854775807"),
        ({"seed": 1.0}, "must be an integer, not a number"),
        ({"max_tokens": 0}, "must be at least 1"),
        ({"max_tokens": -5}, "must be at least 1"),
        ({"max_completion_tokens": 10**30}, "must be at most"),
        ({"max_tokens": True}, "must be an integer, not a boolean"),
        ({"n": 0}, "must be at least 1"),
        ({"n": 17}, "must be at most 16, got 17"),
        ({"n": 10**9}, "must be at most 16"),
        ({"stop": ""}, "must not hold an empty string"),
        ({"stop": ["a", ""]}, "must not hold an empty string"),
        ({"stop": ["x"] * 17}, "must have at most 16 entries, got 17"),
        ({"stop": 3}, "must be a string or a list of strings"),
        ({"stop": "x" * 1025}, "at most 1024 characters"),
        ({"stop_token_ids": [260]}, "must be below 260"),
        ({"stop_token_ids": "1"}, "must be a list, not a string"),
        ({"logit_bias": {"260": 1}}, "must name token ids below 260"),
        ({"logit_bias": {"x": 1}}, "key 'x' must be a token id"),
        ({"logit_bias": {"01": 1}}, "key '01' must be a token id"),
        ({"logit_bias": {"1": 101}}, "must be a number from -100 to 100"),
        ({"logit_bias": {"1": 10**400}}, "must be a number from -100 to 100"),
        ({"logit_bias": {"1": -(10**400)}}, "must be a number from -100 to 100"),
        ({"logit_bias": [1]}, "must be an object of token ids and biases"),
        ({"min_tokens": -1}, "must be at least 0"),
        ({"min_tokens": 9, "max_tokens": 8}, "must be at most 8"),
        ({"ignore_eos": "yes"}, "must be true or false, not a string"),
        ({"prompt_logprobs": 21}, "must be at most 20, got 21"),
        ({"prompt_logprobs": -1}, "must be at least 0"),
        ({"cache_salt": ""}, "at least 1 characters"),
        ({"priority": 0.5}, "must be an integer"),
        ({"user": 5}, "must be a string"),
        ({"adapters": ["gsm8k"], "model": "gsm8k"}, "is only for model 'auto', not for 'gsm8k'"),
        ({"adapters": {"gsm8k": 1}, "model": BASE_NAME}, "is only for model 'auto'"),
        ({"adapters": []}, "must name 1 to"),
        ({"adapters": {}}, "must name 1 to"),
        ({"adapters": "gsm8k"}, "must be a list of adapter names or an object"),
        ({"adapters": ["gsm8k", "gsm8k"]}, "must not name an adapter twice"),
        ({"adapters": [1]}, "must hold adapter names, as strings"),
        ({"adapters": {"gsm8k": 2.5}}, "must be a finite number from 0 to 2"),
        ({"adapters": {"gsm8k": -0.1}}, "must be a finite number from 0 to 2"),
        ({"adapters": {"gsm8k": 10**400}}, "must be a finite number from 0 to 2"),
        ({"temperature": 10**400}, "must be a number"),
        ({"adapters": {"base": 0.5, "gsm8k": 0.5}}, "must not weigh 'base': the base model is always there"),
        ({"adapters": {"gsm8k": True}}, "must be a finite number"),
        ({"adapters": ["nobody"]}, "nobody"),
        ({"top_k_adapters": 0}, "must be at least 1"),
        ({"top_k_adapters": 2, "model": "gsm8k"}, "is only for routed requests"),
        ({"top_k_adapters": 2, "adapters": {"gsm8k": 1}}, "is only for routed requests"),
        ({"stream_options": {"include_usage": True}}, "needs stream to be true"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_common_fields_are_refused_by_name(client: httpx.Client, path: str, fields: dict[str, Any], words: str) -> None:
    if path == COMPLETIONS and fields in ({"max_tokens": 0}, {"max_tokens": -5}):
        words = "must be at least"
    if path == COMPLETIONS and "max_completion_tokens" in fields:
        words = "is not a known field"
    refuse = refuse_chat if path == CHAT else refuse_completion
    error = refuse(client, fields)
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] in fields


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "must have at least 1 entries"),
        ({"messages": None}, "messages", "is required"),
        ({"messages": "Hi"}, "messages", "must be a list, not a string"),
        ({"messages": ["Hi"]}, "messages[0]", "must be an object, not a string"),
        ({"messages": [{}]}, "messages[0].role", "messages[0].content is required"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "got 'tool'"),
        ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "messages[0].name", "is not supported"),
        ({"messages": [{"role": "user", "content": "x", "type": "audio"}]}, "messages[0].type", "is not supported"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "must be a string or a list"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "must have 1 to 1024 parts"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            "messages[0].content",
            "part 0 has type 'image_url', which is not supported",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]}]},
            "messages[0].content",
            "part 0 has the field 'cache_control', which is not a known field",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content",
            "part 0 must have a text",
        ),
        ({"messages": [{"role": "assistant", "content": "x", "annotations": [{}]}]},
         "messages[0].annotations", "is not supported"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "lone surrogate"),
        ({"messages": [{"role": "user", "content": "refuse me"}]}, "messages", "roles must alternate"),
        ({"messages": [MESSAGES[0]] * 2049}, "messages", "must have at most 2048 entries, got 2049"),
        ({"logprobs": 3}, "logprobs", "must be true or false, not an integer"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs to be true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "must be at most 20, got 21"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens", "the two differ"),
        ({"continue_final_message": True}, "continue_final_message", "needs the last message to be the assistant's"),
        (
            {"continue_final_message": True, "add_generation_prompt": True,
             "messages": [{"role": "assistant", "content": "x"}]},
            "continue_final_message",
            "exclude each other",
        ),
        ({"routing": {"trace": "all"}}, "routing.trace", "must be 'summary', 'tokens' or 'layers', got 'all'"),
        ({"routing": {}}, "routing.trace", "is required"),
        ({"routing": {"trace": "tokens", "depth": 1}}, "routing.depth", "is not a known field"),
        (
            {"stream": True, "stream_options": {"includes_usage": True}},
            "stream_options.includes_usage",
            "did you mean 'include_usage'?",
        ),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
            "needs include_usage",
        ),
        ({"tools": [{"type": "function"}]}, "tools", "is not supported by this server"),
        ({"tool_choice": "required"}, "tool_choice", "is not supported"),
        ({"functions": [{}]}, "functions", "is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "is not supported"),
        ({"store": True}, "store", "is not supported"),
        ({"service_tier": "flex"}, "service_tier", "is not supported"),
        ({"metadata": {"a": 1}}, "metadata.a", "must be a string"),
        ({"metadata": {str(key): 1 for key in range(17)}}, "metadata", "must have at most 16 entries, got 17"),
        ({"modalities": ["text", "audio"]}, "modalities", "is not supported"),
        ({"chat_template": "{{ x }}"}, "chat_template", "is not supported"),
        ({"tempreature": 1}, "tempreature", "is not a known field; did you mean 'temperature'?"),
        ({"\ud800": 1}, "\ufffd" * 3, "is not a known field"),
        ({"model": ""}, "model", "at least 1 characters"),
        ({"model": None}, "model", "model is required"),
        ({"model": 5}, "model", "must be a string, not an integer"),
    ],
)  # fmt: skip
def test_chat_fields_are_refused_by_name(client: httpx.Client, fields: dict[str, Any], param: str, words: str) -> None:
    error = refuse_chat(client, fields)
    assert words in error["message"]
    assert error["param"] == param


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": None}, "prompt", "is required"),
        ({"prompt": ""}, "prompt", "has no tokens"),
        ({"prompt": []}, "prompt", "must not be an empty list"),
        ({"prompt": [[]]}, "prompt", "must not hold an empty list of token ids in entry 0"),
        ({"prompt": [[1]] * 4097}, "prompt", "must have at most 4096 entries, got 4097"),
        ({"prompt": [1, "a"]}, "prompt", "the one at 1 is not"),
        ({"prompt": ["a", 1]}, "prompt", "entry 1 is neither"),
        ({"prompt": [1, True]}, "prompt", "the one at 1 is not"),
        ({"prompt": [-1]}, "prompt", "non-negative integers"),
        ({"prompt": [260]}, "prompt", "must hold token ids below 260"),
        ({"prompt": [[1], [10**20]]}, "prompt", "in entry 1"),
        ({"prompt": {"a": 1}}, "prompt", "must be a string, a list of strings"),
        ({"prompt": "\udfff"}, "prompt", "lone surrogate"),
        ({"prompt": ["a"] * 65, "n": 16}, "prompt", "at most 1024 completions, got 1040"),
        ({"logprobs": True}, "logprobs", "must be an integer, not a boolean"),
        ({"logprobs": 21}, "logprobs", "must be at most 20, got 21"),
        ({"max_tokens": 0}, "max_tokens", "must be at least 1, got 0 (0 only scores a prompt"),
        ({"suffix": "x"}, "suffix", "is not supported"),
        ({"best_of": 3, "n": 2}, "best_of", "is not supported"),
        ({"best_of": True}, "best_of", "is not supported"),
        ({"top_logprobs": 1}, "top_logprobs", "is not a known field"),
        ({"messages": MESSAGES}, "messages", "is not a known field"),
    ],
)
def test_completion_fields_are_refused_by_name(
    client: httpx.Client, fields: dict[str, Any], param: str, words: str
) -> None:
    error = refuse_completion(client, fields)
    assert words in error["message"]
    assert error["param"] == param


def test_unknown_fields_have_one_code_wherever_they_are(client: httpx.Client) -> None:
    part = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}
    for fields in (
        {"foo": 1},
        {"messages": [{"role": "user", "content": "x", "foo": 1}]},
        {"messages": [{"role": "user", "content": [part]}]},
    ):
        assert refuse_chat(client, fields)["code"] == "unknown_field"


def test_all_problems_are_told_at_once(client: httpx.Client) -> None:
    error = refuse_chat(client, {"temperature": 9, "n": "two", "tools": [1], "frequency": 1})
    for words in (
        "temperature must be at most 2",
        "n must be an integer",
        "tools is not supported",
        "frequency is not",
    ):
        assert words in error["message"]
    error = refuse_chat(client, {"n": 99, "top_logprobs": 3})
    assert "n must be at most 16" in error["message"]
    assert "top_logprobs needs logprobs" in error["message"]


def test_thousands_of_problems_are_cut_short(client: httpx.Client) -> None:
    fields = {"model": "auto", **{f"field{i}": i for i in range(20_000)}, "messages": [5] * 2000}
    error = refusal(client.post(CHAT, json=fields), 400)
    assert len(error["message"]) < 1000


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_unknown_model_is_404_and_names_the_field(client: httpx.Client, path: str) -> None:
    error = refusal(client.post(path, json={"model": "nobody", "messages": MESSAGES, "prompt": "x"}), 400)
    body = {"model": "nobody", "messages": MESSAGES} if path == CHAT else {"model": "nobody", "prompt": "x"}
    error = refusal(client.post(path, json=body), 404)
    assert (error["code"], error["param"], error["type"]) == ("model_not_found", "model", "invalid_request_error")


def test_unknown_adapter_in_the_pool_has_its_own_code(client: httpx.Client) -> None:
    error = refuse_chat(client, {"adapters": ["gsm8k", "nobody"]})
    assert (error["code"], error["param"]) == ("adapter_not_found", "adapters")


def test_too_long_prompt_tells_the_numbers(client: httpx.Client) -> None:
    error = refuse_chat(client, {"messages": [{"role": "user", "content": "x" * 600}]})
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "619 tokens; at most 511" in error["message"]
    assert "This model's maximum context length is 512 tokens" in error["message"]  # litellm and others look for it
    error = refuse_completion(client, {"prompt": [1] * 512})
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_prompt_and_max_tokens_too_long_together_tell_what_fits(client: httpx.Client, name: str) -> None:
    error = refuse_chat(client, {name: 500})
    assert (error["code"], error["param"]) == ("context_length_exceeded", name)
    assert "Ask for at most 491." in error["message"]


def test_configured_prompt_limit_is_enforced() -> None:
    harness = Harness(max_prompt_tokens=10)
    with harness.serve() as client:
        error = refuse_completion(client, {"prompt": "x" * 11})
        assert "11 tokens; at most 10" in error["message"]
        assert client.post(COMPLETIONS, json={"model": "auto", "prompt": "x" * 10}).status_code == 200


def test_refusals_leave_no_lease_and_are_counted(client: httpx.Client, harness: Harness) -> None:
    before = harness.metric("requests_rejected_total", {"reason": "context_length_exceeded"}) or 0
    refuse_chat(client, {"messages": [{"role": "user", "content": "x" * 600}]})
    refuse_completion(client, {"prompt": ["a", "b", "x" * 600]})
    assert harness.registry.num_open_leases == 0
    assert len(harness.registry.leases) == 4
    assert harness.metric("requests_rejected_total", {"reason": "context_length_exceeded"}) == before + 2


def test_full_queue_is_503_with_retry_after_and_takes_back_the_rest() -> None:
    harness = Harness(max_waiting_requests=0)
    with harness.serve() as client:
        harness.runner.step_s = 0.01
        with ThreadPoolExecutor() as pool:
            body = {"model": "auto", "prompt": "a", "max_tokens": 100, "ignore_eos": True}
            running = pool.submit(client.post, COMPLETIONS, json=body)
            while not harness.engine.num_running:
                time.sleep(0.005)
            # 16 sequences may run at once: 15 seats are free, and the second of these waits for nobody but the first.
            together = pool.submit(client.post, COMPLETIONS, json={**body, "prompt": ["a"] * 17})
            while harness.engine.num_waiting + harness.engine.num_running < 18:
                time.sleep(0.005)
            response = client.post(COMPLETIONS, json={"model": "auto", "prompt": ["a"] * 3})
        assert running.result().status_code == together.result().status_code == 200
        error = refusal(response, 503)
        assert (error["code"], error["type"]) == ("server_overloaded", "overloaded_error")
        assert response.headers["retry-after"] == "1"
        harness.settle()
        assert harness.metric("requests_rejected_total", {"reason": "server_overloaded"}) == 1


@pytest.mark.parametrize("fields", [{"prompt": ["a"] * 64}, {"prompt": "a", "n": 16}, {"prompt": ["ab", "c"], "n": 9}])
def test_an_idle_server_takes_what_is_larger_than_its_queue(fields: dict[str, Any]) -> None:
    harness = Harness(max_waiting_requests=1)
    with harness.serve() as client:
        response = client.post(COMPLETIONS, json={"model": "auto", "max_tokens": 2, **fields})
        assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"chat_template": "{{ ().__class__ }}"}, "chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254"}}]}]},
         "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"pattern": "(a+)+$"}}}]}, "tools"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"structured_outputs": {"regex": "(a+)+$"}}, "structured_outputs"),
        ({"prompt_embeds": "gASV"}, "prompt_embeds"),
        ({"n": 10**9}, "n"),
        ({"best_of": 10**9}, "best_of"),
    ],
)  # fmt: skip
def test_no_route_takes_templates_images_or_unbounded_counts(
    client: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    error = refuse_chat(client, fields)
    assert str(error["param"]).startswith(param)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["abc", "za"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "z"}]}),
    ],
)
def test_tokens_that_the_model_does_not_know_are_refused_in_texts_too(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    """A tokenizer may have more of them than the model has embeddings."""
    known = prompts.limits_of

    def fewer(services: Any) -> Any:
        return dataclasses.replace(known(services), vocab_size=ord("z"))

    monkeypatch.setattr(prompts, "limits_of", fewer)
    response = client.post(path, json={"model": "auto", "max_tokens": 1, **body})
    assert response.status_code == 400
    error = response.json()["error"]
    assert "the model knows ids below 122" in error["message"]
    assert error["param"] in body
