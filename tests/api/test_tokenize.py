"""POST /tokenize and /detokenize."""

import json
from typing import Any

import httpx
import pytest

from tests.api.envelope import refusal
from tests.api.fakes import BASE_NAME, Harness


def tokenize(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/tokenize", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    assert answer["count"] == len(answer["tokens"])
    return answer


def test_prompt_becomes_token_ids_in_vllms_shape(client: httpx.Client) -> None:
    answer = tokenize(client, model=BASE_NAME, prompt="hello world")
    assert answer == {"count": 2, "max_model_len": answer["max_model_len"], "tokens": [258, 259], "token_strs": None}
    assert client.get("/v1/models/auto").json()["max_model_len"] == answer["max_model_len"]
    assert tokenize(client, prompt="hello world", return_token_strs=True)["token_strs"] == ["hello", " world"]
    assert tokenize(client, prompt="")["tokens"] == []


def test_special_tokens_are_added_unless_refused(client: httpx.Client) -> None:
    assert tokenize(client, prompt="BOS")["tokens"][0] == 256
    assert tokenize(client, prompt="BOS", add_special_tokens=False)["tokens"] == list(b"BOS")


@pytest.mark.parametrize("fields", [{}, {"add_generation_prompt": False}, {"continue_final_message": True}])
def test_messages_become_the_prompt_that_chat_computes(client: httpx.Client, fields: dict[str, Any]) -> None:
    messages = [
        {"role": "developer", "content": "Hi"},
        {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
    ]
    body = {"model": "auto", "messages": messages, "max_tokens": 1, "return_token_ids": True, **fields}
    computed = client.post("/v1/chat/completions", json=body).json()["prompt_token_ids"]
    assert tokenize(client, messages=messages, **fields)["tokens"] == computed


def test_detokenize_shows_special_tokens_and_reverses_tokenize(client: httpx.Client) -> None:
    ids = tokenize(client, prompt="<|im_start|>hello wörld")["tokens"]
    response = client.post("/detokenize", json={"model": "gsm8k", "tokens": ids})
    assert (response.status_code, response.json()) == (200, {"prompt": "<|im_start|>hello wörld"})
    assert client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ("/tokenize", {"prompt": ["x"]}, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": "refuse me"}]}, "messages"),
        ("/tokenize", {"prompt": "x", "continue_final_message": True}, "continue_final_message"),
        ("/tokenize", {"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "x"}], "continue_final_message": True},
            "continue_final_message",
        ),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "x"}], "add_special_tokens": True},
            "add_special_tokens",
        ),
        ("/tokenize", {"prompt": "x", "chat_template": "y"}, "chat_template"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "1"}, "tokens"),
        ("/detokenize", {"tokens": [260]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [1.0]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
        ("/detokenize", {"tokens": [2**70]}, "tokens"),
    ],
)
def test_bad_fields_are_refused_by_name(client: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    response = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert refusal(response, 400)["param"] == param


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})])
def test_unknown_model_is_404(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    error = refusal(client.post(path, json={"model": "nope", **body}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_tokenizing_runs_off_the_event_loop(client: httpx.Client, harness: Harness) -> None:
    harness.tokenizer.threads.clear()
    tokenize(client, prompt="x")
    assert all(name.startswith("tokenizer") for name in harness.tokenizer.threads)
