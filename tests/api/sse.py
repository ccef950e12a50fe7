"""A strict reader of server-sent events, independent of the client libraries."""

import json
from collections.abc import Mapping
from typing import Any

import httpx


def stream(client: httpx.Client, path: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All chunks of a stream that ends well; asserts the framing byte by byte."""
    raw = stream_bytes(client, path, body)
    assert raw.endswith(b"data: [DONE]\n\n")
    return [parse_event(event) for event in raw.removesuffix(b"data: [DONE]\n\n").split(b"\n\n")[:-1]]


def stream_bytes(client: httpx.Client, path: str, body: Mapping[str, Any]) -> bytes:
    """The body of a stream as it came."""
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        return b"".join(response.iter_raw())


def parse_event(event: bytes) -> dict[str, Any]:
    """One event: a single `data:` line of JSON."""
    assert event.startswith(b"data: ")
    assert b"\n" not in event
    assert b"\r" not in event
    chunk = json.loads(event.removeprefix(b"data: "))
    assert isinstance(chunk, dict)
    return chunk


def texts(chunks: list[dict[str, Any]]) -> dict[int, str]:
    """Concatenated text per choice, of chat or completion chunks."""
    joined: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            piece = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            joined[choice["index"]] = joined.get(choice["index"], "") + piece
    return joined
