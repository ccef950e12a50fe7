"""Request ids, the last resort for unexpected exceptions, and the limit on bodies while they are read."""

import asyncio
import contextlib
import logging
import select
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from server.api import middleware
from server.app import drain
from tests.api.fakes import Harness

COMPLETIONS = "/v1/completions"
LIMIT = 4 * 1024**2


def test_request_id_is_echoed(client: httpx.Client) -> None:
    response = client.get("/health", headers={"X-Request-Id": "abc-123"})
    assert response.headers["x-request-id"] == "abc-123"


@pytest.mark.parametrize("given", ["", "has space", "a" * 129, "new\tline", "<script>"])
def test_unusable_request_id_is_replaced(client: httpx.Client, given: str) -> None:
    replaced = client.get("/health", headers={"X-Request-Id": given}).headers["x-request-id"]
    assert len(replaced) == 32
    assert replaced != client.get("/health").headers["x-request-id"]


def test_request_id_names_the_answer_and_the_sequence(client: httpx.Client, harness: Harness) -> None:
    body = {"model": "auto", "prompt": "x", "max_tokens": 1}
    assert client.post(COMPLETIONS, json=body, headers={"X-Request-Id": "mine"}).json()["id"] == "cmpl-mine"
    assert harness.runner.seen[-1].request_id == "mine"


def test_refusals_are_logged_with_their_id_but_without_their_message(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="server")
    client.post(COMPLETIONS, json={"model": "auto", "prompt": "x", "n": "oops"}, headers={"X-Request-Id": "refused-1"})
    assert "request refused-1 refused: 400 invalid_request (param n)" in caplog.text
    assert "oops" not in caplog.text


def test_unexpected_exception_is_500_without_internals(
    harness: Harness, client: httpx.Client, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object, **__: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(harness.registry, "lease_now", explode)
    response = client.post(COMPLETIONS, json={"model": "auto", "prompt": "x"}, headers={"X-Request-Id": "boom"})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert response.headers["x-request-id"] == "boom"
    assert "request boom failed unexpectedly" in caplog.text
    assert "secret detail" in caplog.text  # for the operator
    assert harness.metric("requests_rejected_total", {"reason": "internal_error"}) == 1


def chunks(size: int) -> Iterator[bytes]:
    for _ in range(size // 2**16):
        yield b" " * 2**16


@pytest.mark.parametrize("is_chunked", [False, True])
def test_ten_megabytes_are_413(client: httpx.Client, is_chunked: bool) -> None:
    size = 10 * 1024**2
    content = chunks(size) if is_chunked else b" " * size
    response = client.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    error = response.json()["error"]
    assert (error["code"], error["type"]) == ("payload_too_large", "invalid_request_error")
    assert str(LIMIT) in error["message"]
    assert response.headers["connection"] == "close"
    assert client.get("/health").status_code == 200


def test_body_at_the_limit_is_read(client: httpx.Client) -> None:
    body = b'{"model": "auto", "prompt": "x", "max_tokens": 1}'
    content = body + b" " * (LIMIT - len(body))
    headers = {"Content-Type": "application/json"}
    assert client.post(COMPLETIONS, content=content, headers=headers).status_code == 200
    assert client.post(COMPLETIONS, content=content + b" ", headers=headers).status_code == 413


def test_refusal_comes_before_the_body_has_been_sent(client: httpx.Client) -> None:
    head = (
        f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {100 * 1024**2}\r\n\r\n"
    )
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=3) as connection:
        connection.sendall(head.encode())
        started_s = time.monotonic()
        assert connection.recv(64).startswith(b"HTTP/1.1 413")
        assert time.monotonic() - started_s < 2


def test_client_that_leaves_halfway_through_its_body_reaches_no_route(client: httpx.Client, harness: Harness) -> None:
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=3) as connection:
        connection.sendall(head.encode() + b'{"model"')
    assert client.get("/health").status_code == 200
    assert harness.registry.leases == []


def test_a_body_that_never_ends_is_408_and_its_connection_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY_LIMIT_S", 0.2)
    monkeypatch.setattr(middleware, "BODY_POLL_S", 0.05)
    harness = Harness()
    with harness.serve() as client, half_sent(client) as connection:
        answer = whole_answer(connection)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"code":"request_timeout"' in answer
        assert harness.registry.leases == []


def test_a_body_that_drips_is_408_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY_LIMIT_S", 0.2)
    with Harness().serve() as client, half_sent(client) as connection:
        while not select.select([connection], [], [], 0.02)[0]:
            connection.sendall(b" ")
        assert whole_answer(connection).startswith(b"HTTP/1.1 408")


def test_a_pending_body_is_refused_when_the_server_drains() -> None:
    harness = Harness()
    with harness.serve() as client, half_sent(client) as connection:
        asyncio.run(drain(harness.services))
        answer = whole_answer(connection)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"retry-after: 5" in answer


@contextlib.contextmanager
def half_sent(client: httpx.Client) -> Iterator[socket.socket]:
    """A connection whose request's body has begun."""
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=5) as connection:
        connection.sendall(head.encode() + b'{"model"')
        yield connection


def whole_answer(connection: socket.socket) -> bytes:
    """Until the server closes."""
    answer = b""
    while part := connection.recv(4096):
        answer += part
    return answer


READABLE = """/ /health /ready /metrics /openapi.json /v1/models /v1/models/auto /v1/adapters /v1/adapters/gsm8k
/v1/router /playground/dom.js"""


@pytest.mark.parametrize("path", READABLE.split())
def test_head_is_get_without_the_body(client: httpx.Client, path: str) -> None:
    head, get = client.head(path), client.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    if path != "/metrics":  # which counts the time between the two
        assert head.headers["content-length"] == get.headers["content-length"]


def test_head_of_what_cannot_be_read_is_refused_as_get_is(client: httpx.Client) -> None:
    assert client.head("/v1/nothing").status_code == 404
    refused = client.head(COMPLETIONS)
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    assert "head" not in client.get("/openapi.json").json()["paths"]["/health"]
