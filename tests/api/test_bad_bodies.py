"""Bodies that are no JSON, numbers that are none, and routes that do not exist."""

import gzip

import httpx
import pytest

from tests.api.envelope import refusal
from tests.api.fakes import Harness

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
JSON = "application/json"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not valid JSON"),
        (b'{"model": "auto",}', "not valid JSON"),
        (b"", "needs a JSON body"),
        (b'{"a": "\xff"}', "could not be parsed as JSON"),
        (b"[" * 100_000, "could not be parsed as JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "could not be parsed as JSON"),
        (b"[]", "must be an object, not a list"),
        (b"null", "must be an object, not null"),
        (b'"text"', "must be an object, not a string"),
    ],
)
def test_malformed_json_is_refused_in_words(client: httpx.Client, content: bytes, words: str) -> None:
    response = client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    error = refusal(response, 400)
    assert words in error["message"]
    assert error["param"] is None


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(client: httpx.Client, value: str) -> None:
    for field in ("temperature", "seed"):
        content = f'{{"model": "auto", "prompt": "x", "{field}": {value}}}'
        response = client.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
        assert refusal(response, 400)["param"] == field
    content = f'{{"model": "auto", "prompt": "x", "adapters": {{"gsm8k": {value}}}}}'
    response = client.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
    assert refusal(response, 400)["param"] == "adapters"


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"])
def test_bodies_that_are_not_json_are_415(client: httpx.Client, content_type: str) -> None:
    response = client.post(CHAT, content=b"{}", headers={"Content-Type": content_type} if content_type else {})
    assert "application/json" in refusal(response, 415)["message"]


def test_bodies_that_cannot_be_read_are_counted_as_rejections(client: httpx.Client, harness: Harness) -> None:
    def count() -> float:
        labels = {"reason": "invalid_request"}
        return harness.metrics.registry.get_sample_value("lora_mixer_requests_rejected_total", labels) or 0

    before = count()
    for content, content_type in ((b"{", JSON), (b'"\xff"', JSON), (b"[" * 100_000, JSON), (b"{}", "text/plain")):
        client.post(CHAT, content=content, headers={"Content-Type": content_type})
    assert count() == before + 4


def test_json_with_a_charset_is_accepted(client: httpx.Client) -> None:
    headers = {"Content-Type": "application/json; charset=utf-8"}
    content = b'{"model": "auto", "prompt": "x", "max_tokens": 1}'
    assert client.post(COMPLETIONS, content=content, headers=headers).status_code == 200


def test_unknown_route_and_wrong_method_have_envelopes(client: httpx.Client) -> None:
    assert refusal(client.get("/v1/nothing"), 404)["code"] == "route_not_found"
    assert refusal(client.get("/v1/models/"), 404)["code"] in ("route_not_found", "model_not_found")
    response = client.get(CHAT)
    assert refusal(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


def test_an_absurd_path_is_not_echoed_whole(client: httpx.Client) -> None:
    assert len(refusal(client.get("/" + "a" * 5000), 404)["message"]) < 400


def test_a_body_does_not_hide_that_there_is_no_such_route_or_method(client: httpx.Client) -> None:
    assert refusal(client.post("/v1/embeddings", data={"a": "b"}), 404)["code"] == "route_not_found"
    refused = client.put("/v1/chat/completions", content=b"x")
    assert refusal(refused, 405)["code"] == "method_not_allowed"
    assert refused.headers["allow"] == "POST"


def test_compressed_bodies_are_415(client: httpx.Client) -> None:
    content = gzip.compress(b'{"model": "auto", "prompt": "x", "max_tokens": 1}')
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert "compressed" in refusal(client.post("/v1/completions", content=content, headers=headers), 415)["message"]


def test_allow_names_every_method_of_the_path(client: httpx.Client) -> None:
    assert client.delete("/v1/adapters").headers["allow"] == "GET, HEAD, POST"
    assert client.patch("/v1/adapters/gsm8k", json={}).headers["allow"] == "DELETE, GET, HEAD"
