"""Streams on the wire: framing, failures after the first byte, and clients that leave."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import httpx
import pytest
from starlette.types import Message

from server.api.streaming import EventStream, sse
from server.errors import EngineError
from tests.api.fakes import BASE_NAME, Harness
from tests.api.sse import parse_event, stream_bytes

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize("text", ["a\nb", "a\r\nb", "data: [DONE]\n\n", "\u2028\u2029", "\0", '"\\', "🙂"])
def test_an_event_is_one_line_whatever_its_text(text: str) -> None:
    event = sse({"text": text})
    assert event.endswith(b"\n\n")
    assert parse_event(event[:-2]) == {"text": text}


def test_stream_headers_keep_proxies_from_buffering(client: httpx.Client) -> None:
    with client.stream("POST", CHAT, json={**BODY, "stream": True}) as response:
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["x-request-id"]
        response.read()


def test_events_arrive_while_the_rest_is_still_computed(client: httpx.Client, harness: Harness) -> None:
    harness.runner.step_s = 0.05
    with client.stream("POST", CHAT, json={**BODY, "stream": True}) as response:
        events = response.iter_raw()
        next(events)
        assert harness.engine.num_running + harness.engine.num_waiting == 1
        assert list(events)[-1].endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("fails_after", [0, 3])
def test_failure_in_a_stream_is_an_error_event_without_done(
    client: httpx.Client, harness: Harness, fails_after: int
) -> None:
    harness.runner.fail_after = fails_after
    raw = stream_bytes(client, CHAT, BODY)
    assert b"[DONE]" not in raw
    assert b"secret" not in raw
    events = [parse_event(event) for event in raw.split(b"\n\n")[:-1]]
    assert events[-1]["error"]["type"] == "server_error"
    assert len(events) == 1 + fails_after + 1  # role, tokens, error


@pytest.mark.parametrize("fails_after", [0, 3])
def test_failure_of_a_whole_answer_is_500_without_internals(
    client: httpx.Client, harness: Harness, fails_after: int
) -> None:
    harness.runner.fail_after = fails_after
    response = client.post(CHAT, json=BODY)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "engine_error"
    assert "secret" not in response.text
    assert response.headers["x-request-id"]


def test_failures_are_counted_as_such(client: httpx.Client, harness: Harness) -> None:
    labels = {"model": "sst2", "finish_reason": "error"}
    before = harness.metric("requests_total", labels) or 0
    harness.runner.fail_after = 1
    client.post(CHAT, json={**BODY, "model": "sst2"})
    assert harness.metric("requests_total", labels) == before + 1


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize("streams", [True, False])
def test_client_that_leaves_aborts_its_generation(
    client: httpx.Client, harness: Harness, path: str, streams: bool
) -> None:
    harness.runner.step_s = 0.02
    prompt = {"messages": BODY["messages"]} if path == CHAT else {"prompt": ["a", "b"]}
    body = {"model": "mbpp", **prompt, "n": 2, "ignore_eos": True, "max_tokens": 400, "stream": streams}
    labels = {"model": "mbpp", "finish_reason": "abort"}
    before = harness.metric("requests_total", labels) or 0
    with raw_request(client, path, body) as connection:
        if streams:
            assert connection.recv(64).startswith(b"HTTP/1.1 200 OK")
        wait_until_running(harness)
    harness.settle(timeout_s=3.0)  # All 400 tokens would take 8 s.
    assert harness.metric("requests_total", labels) == before + (2 if path == CHAT else 4)


def test_client_that_leaves_while_waiting_frees_its_place() -> None:
    harness = Harness()
    with harness.serve() as client:
        harness.runner.step_s = 0.02
        endless = {**BODY, "model": BASE_NAME, "n": 16, "ignore_eos": True, "max_tokens": 400}
        with raw_request(client, CHAT, endless):
            wait_until(lambda: harness.engine.num_running == 16)  # Every seat is taken before the next one comes.
            with raw_request(client, CHAT, {**BODY, "model": "mbpp"}):
                wait_until(lambda: harness.metrics.usage.names()[1] == ["mbpp"])
        harness.settle(timeout_s=3.0)
        assert harness.metrics.usage.names() == ([], [])


def test_metrics_name_the_adapters_in_flight(client: httpx.Client, harness: Harness) -> None:
    harness.runner.step_s = 0.01
    body = {**BODY, "adapters": ["gsm8k", "sst2"], "ignore_eos": True, "max_tokens": 400, "stream": True}
    with raw_request(client, CHAT, body) as connection:
        read_until(connection, b'"content":"H"')
        assert 'running_lora_adapters="gsm8k,sst2",waiting_lora_adapters=""' in client.get("/metrics").text
    harness.settle()
    assert 'running_lora_adapters="",waiting_lora_adapters=""' in client.get("/metrics").text


async def test_a_stream_that_never_begins_is_closed_all_the_same() -> None:
    closed: list[bool] = []

    async def events() -> AsyncGenerator[bytes, None]:
        yield b"never read"

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(_: Message) -> None:
        await asyncio.sleep(60)

    await EventStream(events(), lambda: closed.append(True))({"type": "http"}, receive, send)
    assert closed == [True]


async def test_events_end_before_the_stream_is_closed() -> None:
    order: list[str] = []
    sent: list[Message] = []

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            yield sse({"n": 1})
            raise EngineError("hidden")
        finally:
            order.append("events ended")

    async def receive() -> Message:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await EventStream(events(), lambda: order.append("closed"))({"type": "http"}, receive, send)
    assert order == ["events ended", "closed"]
    assert [message.get("more_body") for message in sent] == [None, True, True, False]
    assert b"hidden" not in sent[2]["body"]


class raw_request:  # noqa: N801, a context manager
    """A request over a bare socket, which is closed on leaving, whatever has been answered."""

    def __init__(self, client: httpx.Client, path: str, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        self._connection = socket.create_connection((client.base_url.host, client.base_url.port), timeout=5)
        self._connection.sendall(head.encode() + content)

    def __enter__(self) -> socket.socket:
        return self._connection

    def __exit__(self, *_: object) -> None:
        self._connection.close()


def read_until(connection: socket.socket, wanted: bytes) -> None:
    received = b""
    while wanted not in received:
        received += connection.recv(4096)


def wait_until_running(harness: Harness) -> None:
    wait_until(lambda: harness.engine.num_running > 0)


def wait_until(has_happened: Callable[[], bool]) -> None:
    for _ in ticks():
        if has_happened():
            return


def ticks() -> Iterator[None]:
    for _ in range(500):
        yield
        time.sleep(0.01)
    raise AssertionError("it did not happen within 5 s")
