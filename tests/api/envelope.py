"""OpenAI's error envelope, checked."""

from typing import Any

import httpx


def refusal(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object, after checks that hold for every refusal."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    envelope = response.json()
    assert envelope.keys() == {"error"}
    error: dict[str, Any] = envelope["error"]
    assert error.keys() >= {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    return error
