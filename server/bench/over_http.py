"""A running server as a benchmark target: streaming completions over HTTP, as a client sees them."""

import json
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import httpx

from server.bench.load import Answer, Job
from server.cli_flags import is_loopback_url
from server.errors import ConfigError, LoraMixerError

ASSUMED_VOCAB_SIZE = 32_000
"""Token ids are drawn below this: the API does not tell the vocabulary's size, and few models have fewer."""

READ_TIMEOUT_S = 300.0
"""Longest silence between two tokens, and before the first one, queueing included."""


class HttpTarget:
    """POST /v1/completions with token-id prompts and `stream`; counts tokens by the ids in the answer."""

    mode = "http"
    vocab_size = ASSUMED_VOCAB_SIZE

    def __init__(self, client: httpx.AsyncClient, *, base_model: str, adapters: Sequence[str]) -> None:
        self.base_model = base_model
        self.adapters = adapters
        self._client = client

    @classmethod
    async def connect(cls, url: str, api_key: str | None) -> Self:
        """Ask the server what it serves. Raises ConfigError for a bad URL, LoraMixerError if it does not answer."""
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(READ_TIMEOUT_S, connect=10.0)
        # No limit on connections: the clients of a closed loop are the limit.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        try:
            client = httpx.AsyncClient(
                base_url=url, headers=headers, timeout=timeout, limits=limits, trust_env=not is_loopback_url(url)
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise ConfigError(f"--url {url!r} is not a URL: {error}") from error
        try:
            response = await client.get("/v1/models")
            response.raise_for_status()
            models = response.json()["data"]
        except (httpx.HTTPError, ValueError, KeyError) as error:
            await client.aclose()
            raise LoraMixerError(f"{url} did not list its models: {error or type(error).__name__}") from error
        adapters = [model["id"] for model in models if model.get("parent") and model["id"] != "auto"]
        base_model = next(model["id"] for model in models if model["id"] not in {"auto", *adapters})
        return cls(client, base_model=base_model, adapters=adapters)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _t: type[BaseException] | None, _e: BaseException | None, _b: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def generate(self, job: Job) -> Answer:
        """Stream one completion; times are when its chunks arrived here."""
        body = {
            "model": job.model,
            "prompt": list(job.prompt_token_ids),
            "max_tokens": job.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            "cache_salt": job.salt,
        }
        token_s: list[float] = []
        sent_s = time.perf_counter()
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != httpx.codes.OK:
                    text = (await response.aread()).decode("utf-8", "replace")
                    return Answer(sent_s, (), f"status {response.status_code}: {text[:200]}")
                error = await _read_stream(response, token_s)
        except httpx.HTTPError as failure:
            error = f"{type(failure).__name__}: {failure}"
        return Answer(sent_s, tuple(token_s), error)


async def _read_stream(response: httpx.Response, token_s: list[float]) -> str | None:
    """Append the arrival time of every token; returns why the stream did not end well, or None."""
    async for line in response.aiter_lines():
        if not line.startswith("data: "):
            continue
        now_s = time.perf_counter()
        if line == "data: [DONE]":
            return None
        chunk: dict[str, Any] = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            return str(chunk["error"].get("message"))
        token_s += [now_s] * sum(len(choice.get("token_ids", ())) for choice in chunk.get("choices", ()))
    return "the stream ended without [DONE]"
