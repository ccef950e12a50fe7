"""Keys, the loopback rule and its traps: proxies, DNS rebinding, pages of other origins."""

import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.adapters.records import AdapterState
from server.config import Secrets
from tests.api.fakes import Harness

API_KEY, ADMIN_KEY = "api-key-1", "admin-key-ü"
CHAT_BODY = {"model": "auto", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
REGISTER_BODY = {"name": "new", "source": "org/new"}


@pytest.fixture(scope="module")
def guarded() -> Iterator[httpx.Client]:
    """A server with both kinds of keys."""
    secrets = Secrets(api_keys=("another", API_KEY), admin_key=ADMIN_KEY)
    with Harness(secrets=secrets).serve() as client:
        yield client


def bearer(key: str) -> dict[bytes, bytes]:
    return {b"Authorization": f"Bearer {key}".encode()}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong"),
        {"Authorization": "Bearer"},
        {"Authorization": API_KEY},
        {"Authorization": f"Basic {API_KEY}"},
        bearer("api-key"),
    ],
)
def test_v1_routes_need_an_api_key(guarded: httpx.Client, headers: Any) -> None:
    for response in (
        guarded.post("/v1/chat/completions", json=CHAT_BODY, headers=headers),
        guarded.get("/v1/models", headers=headers),
        guarded.get("/v1/adapters", headers=headers),
        guarded.get("/v1/no-such-route", headers=headers),
        guarded.post("/v1/completions", content=b"not json", headers=headers),
        guarded.post("/tokenize", json={"prompt": "x"}, headers=headers),
        guarded.post("/detokenize", json={"tokens": [1]}, headers=headers),
    ):
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "headers", [bearer(API_KEY), bearer("another"), bearer(ADMIN_KEY), {b"X-Admin-Key": ADMIN_KEY.encode()}]
)
def test_any_api_key_or_the_admin_key_opens_v1(guarded: httpx.Client, headers: Any) -> None:
    assert guarded.post("/v1/chat/completions", json=CHAT_BODY, headers=headers).status_code == 200


def test_operators_routes_stay_open(guarded: httpx.Client) -> None:
    assert {guarded.get(path).status_code for path in ("/health", "/ready", "/metrics", "/", "/openapi.json")} == {200}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (bearer(ADMIN_KEY), 201),
        ({**bearer(API_KEY), b"X-Admin-Key": ADMIN_KEY.encode()}, 201),
        (bearer(API_KEY), 401),
        ({**bearer(API_KEY), b"X-Admin-Key": b"wrong"}, 401),
    ],
)
def test_changes_need_the_admin_key(guarded: httpx.Client, headers: Any, status: int) -> None:
    response = guarded.post("/v1/adapters", json={**REGISTER_BODY, "wait": True}, headers=headers)
    assert response.status_code == status


MUTATIONS = [
    ("POST", "/v1/adapters", REGISTER_BODY),
    ("DELETE", "/v1/adapters/gsm8k", None),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "org/new"}),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "gsm8k"}),
    ("POST", "/v1/router", {"path": "."}),
]


@pytest.mark.parametrize(("method", "path", "body"), MUTATIONS)
@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"Host": "evil.example:8000"}, "localhost or 127.0.0.1"),
        ({"X-Forwarded-For": "127.0.0.1"}, "through a proxy"),
        ({"X-Forwarded-Proto": "https"}, "through a proxy"),
        ({"Via": "1.1 gateway"}, "through a proxy"),
        ({"Forwarded": "for=127.0.0.1"}, "through a proxy"),
        ({"X-Real-IP": "127.0.0.1"}, "through a proxy"),
        ({"Origin": "https://evil.example"}, "other origins"),
        ({"Origin": "null"}, "other origins"),
        ({"Origin": "http://["}, "other origins"),
        ({"Host": "["}, "localhost or 127.0.0.1"),
    ],
)
def test_every_change_without_an_admin_key_is_for_direct_local_clients(
    client: httpx.Client, harness: Harness, method: str, path: str, body: Any, headers: Any, words: str
) -> None:
    response = client.request(method, path, json=body, headers=headers)
    assert response.status_code == 403
    error = response.json()["error"]
    assert error["code"] == "permission_denied"
    assert words in error["message"]
    assert not harness.registry.registered
    assert harness.registry.infos["gsm8k"].state is AdapterState.READY


@pytest.mark.parametrize(("version", "status"), [("1.0", b"403"), ("1.1", b"202")])
def test_changes_in_http_1_0_may_come_through_a_silent_proxy(client: httpx.Client, version: str, status: bytes) -> None:
    body = b'{"name": "new", "source": "org/new"}'
    head = f"POST /v1/adapters HTTP/{version}\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=5) as connection:
        connection.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert connection.recv(4096).split()[1] == status


async def test_remote_clients_may_not_change_anything_without_an_admin_key(harness: Harness) -> None:
    for host, status in [
        ("192.168.1.5", 403),
        ("10.0.0.1", 403),
        ("::ffff:127.0.0.1", 202),
        ("::1", 202),
        ("127.0.0.9", 202),
    ]:
        transport = httpx.ASGITransport(harness.app, client=(host, 40000))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as remote:
            assert (await remote.post("/v1/adapters", json=REGISTER_BODY)).status_code == status
            assert (await remote.get("/v1/adapters")).status_code == 200


async def test_remote_clients_may_change_with_the_admin_key() -> None:
    app = Harness(secrets=Secrets(admin_key=ADMIN_KEY)).app
    transport = httpx.ASGITransport(app, client=("192.168.1.5", 40000))
    async with httpx.AsyncClient(transport=transport, base_url="http://server.example") as remote:
        assert (await remote.post("/v1/adapters", json=REGISTER_BODY, headers=bearer(ADMIN_KEY))).status_code == 202
        headers = {**bearer(ADMIN_KEY), b"Origin": b"https://evil.example"}
        assert (await remote.post("/v1/adapters", json=REGISTER_BODY, headers=headers)).status_code == 403


def test_the_servers_own_page_may_change_it(client: httpx.Client) -> None:
    port = client.base_url.port
    for origin, host in (("localhost", "localhost"), ("LOCALHOST", "localhost"), ("localhost", "LocalHost")):
        headers = {"Origin": f"http://{origin}:{port}", "Host": f"{host}:{port}"}
        assert client.post("/v1/adapters", json=REGISTER_BODY, headers=headers).status_code == 202


def test_a_form_of_another_page_cannot_change_anything(client: httpx.Client) -> None:
    content = b'{"name": "x", "source": "org/x"}'
    assert client.post("/v1/adapters", content=content, headers={"Content-Type": "text/plain"}).status_code == 415


def test_keys_and_prompts_never_reach_the_log(
    guarded: httpx.Client, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    del tmp_path
    caplog.set_level(logging.DEBUG)
    body = {"model": "auto", "messages": [{"role": "user", "content": "my secret prompt"}], "max_tokens": 1}
    guarded.post("/v1/chat/completions", json=body, headers=bearer(API_KEY))
    guarded.post("/v1/chat/completions", json={**body, "temperature": "my secret prompt"}, headers=bearer(API_KEY))
    guarded.post("/v1/adapters", json=REGISTER_BODY, headers=bearer("wrong-secret-key"))
    for secret in (API_KEY, ADMIN_KEY, "wrong-secret-key", "my secret prompt", "Hello"):
        assert secret not in caplog.text
    assert "request " in caplog.text
