"""The official openai-python client against the served app: typed answers, streams, and its exception classes."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from server.config import Secrets
from tests.api.fakes import BASE_NAME, Harness


@pytest.fixture
def sdk(client: httpx.Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="unused", max_retries=0) as sdk:
        yield sdk


def test_chat(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(model="auto", messages=[{"role": "user", "content": "Hi"}], n=2)
    assert [choice.message.content for choice in answer.choices] == ["Hello, wörld!"] * 2
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.total_tokens == 21 + 30


def test_an_answer_can_be_sent_back_as_it_came(sdk: openai.OpenAI) -> None:
    question: Any = {"role": "user", "content": "Hi"}
    answer = sdk.chat.completions.create(model="auto", messages=[question])
    dumped: Any = answer.choices[0].message.model_dump()
    assert "annotations" in dumped
    sdk.chat.completions.create(model="auto", messages=[question, dumped, question])


def test_chat_stream(sdk: openai.OpenAI) -> None:
    stream = sdk.chat.completions.create(
        model="gsm8k",
        messages=[{"role": "user", "content": "Hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == "Hello, wörld!"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 15


def test_chat_logprobs(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model="auto", messages=[{"role": "user", "content": "Hi"}], logprobs=True, top_logprobs=3, max_tokens=2
    )
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert [entry.token for entry in answer.choices[0].logprobs.content] == ["H", "e"]
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 3


def test_completion(sdk: openai.OpenAI) -> None:
    answer = sdk.completions.create(model=BASE_NAME, prompt=["a", "b"], echo=True, logprobs=2, max_tokens=5)
    assert [choice.text for choice in answer.choices] == ["aHello", "bHello"]
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.text_offset == [0, 1, 2, 3, 4, 5]


def test_completion_stream(sdk: openai.OpenAI) -> None:
    stream = sdk.completions.create(model="auto", prompt="a", stream=True, max_tokens=5)
    assert "".join(chunk.choices[0].text for chunk in stream) == "Hello"


def test_extensions_pass_through_extra_body(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model="auto",
        messages=[{"role": "user", "content": "Hi"}],
        extra_body={"adapters": {"gsm8k": 0.5, "mbpp": 0.5}, "routing": {"trace": "summary"}},
    )
    extra = answer.choices[0].model_extra
    assert extra is not None
    assert extra["routing"]["adapters"] == {"gsm8k": 0.5, "mbpp": 0.5}


def test_models(sdk: openai.OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == ["auto", BASE_NAME, "gsm8k", "mbpp", "sst2"]
    assert sdk.models.retrieve(BASE_NAME).owned_by == "lora-mixer"


def test_unknown_model_is_not_found(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        sdk.completions.create(model="nobody", prompt="x")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("nobody")


def test_bad_value_is_bad_request_with_its_param(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature must be at most 2, got 3") as caught:
        sdk.completions.create(model="auto", prompt="x", temperature=3)
    assert caught.value.param == "temperature"
    assert caught.value.request_id


def test_failure_of_a_stream_is_an_api_error(sdk: openai.OpenAI, harness: Harness) -> None:
    harness.runner.fail_after = 2
    stream = sdk.completions.create(model="auto", prompt="x", stream=True)
    with pytest.raises(openai.APIError, match="failed"):
        list(stream)


def test_failure_of_a_whole_answer_is_an_internal_server_error(sdk: openai.OpenAI, harness: Harness) -> None:
    harness.runner.fail_after = 2
    with pytest.raises(openai.InternalServerError):
        sdk.completions.create(model="auto", prompt="x")


def test_overload_is_retried_by_the_client(harness: Harness) -> None:
    del harness
    crowded = Harness(max_waiting_requests=0)
    with crowded.serve() as client, openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="x", max_retries=0) as sdk:
        first = threading.Thread(target=lambda: sdk.completions.create(model="auto", prompt="x"))
        with crowded.held():
            first.start()
            while not crowded.engine.num_waiting:
                time.sleep(0.005)
            with pytest.raises(openai.InternalServerError) as caught:
                sdk.completions.create(model="auto", prompt=["x"] * 30)
        assert caught.value.status_code == 503
        first.join()


def test_missing_key_is_an_authentication_error() -> None:
    guarded = Harness(secrets=Secrets(api_keys=("right",)))
    with guarded.serve() as client:
        url = f"{client.base_url}/v1"
        with (
            openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as sdk,
            pytest.raises(openai.AuthenticationError),
        ):
            sdk.models.list()
        with openai.OpenAI(base_url=url, api_key="right", max_retries=0) as sdk:
            assert sdk.models.list().data[0].id == "auto"


async def test_async_client_that_stops_reading_aborts(harness: Harness, client: httpx.Client) -> None:
    harness.runner.step_s = 0.02
    async with openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="x", max_retries=0) as sdk:
        stream = await sdk.completions.create(
            model="auto", prompt="x", stream=True, max_tokens=400, extra_body={"ignore_eos": True}
        )
        async for chunk in stream:
            assert chunk.choices[0].text
            break
        await stream.close()
    harness.settle(timeout_s=3.0)
