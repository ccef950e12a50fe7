"""32 concurrent streams over all policies while adapters and routers come and go: no failure, no changed token."""

import asyncio
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from tests.integration.conftest import DEMO, RunningServer

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
NAMES = ["arc", "cola", "gsm8k", "mbpp", "pubmedqa", "snips", "sst2", "wikisql"]
QUESTIONS = [
    "How many legs do three spiders have?",
    "Write a function that reverses a string.",
    "Play the latest song by Adele.",
    "Review: an uneven but warm comedy. Positive or negative?",
    "Table: city, population. Which city has more than 1000 people?",
]


def make_requests() -> list[dict[str, Any]]:
    """32 different requests: base, pinned to every adapter, weighted, routed over all and over pools; two sampled."""
    policies: list[dict[str, Any]] = [
        {"model": BASE},
        *({"model": name} for name in NAMES),
        {"model": "auto"},
        {"model": "auto", "top_k_adapters": 1},
        {"model": "auto", "adapters": ["gsm8k", "mbpp", "arc"]},
        {"model": "auto", "adapters": {"snips": 0.6, "wikisql": 0.8}},
        {"model": "auto", "routing": {"trace": "tokens"}},
        {"model": "auto", "temperature": 0.8, "seed": 11},
        {"model": "sst2", "temperature": 1.2, "top_p": 0.9, "seed": 12},
    ]
    requests = []
    for index in range(32):
        question = QUESTIONS[index % len(QUESTIONS)] + " Explain." * (index // 8)
        requests.append(
            {
                "messages": [{"role": "user", "content": question}],
                "max_tokens": 8 + index % 9,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                **policies[index % len(policies)],
            }
        )
    return requests


async def stream_text(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    """Text of one streamed chat completion; asserts that it ended properly."""
    text, finish_reasons = "", []
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
                finish_reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert finish_reasons == ["length"]
    return text


def make_variant(source: Path, folder: Path, scale: float) -> None:
    """A copy of an adapter with other weights, hence another digest."""
    shutil.copytree(source, folder)
    weights = folder / "adapter_model.safetensors"
    save_file({key: value * scale for key, value in load_file(weights).items()}, weights)


async def churn(client: httpx.AsyncClient, root: Path, is_over: Callable[[], bool]) -> int:
    """Register and retire adapters, and swap the router for itself, until the load is over."""
    rounds = 0
    while not is_over() or rounds < 2:
        name = f"churn-{rounds}"
        body = {"name": name, "source": f"variants/{rounds % 3}", "routed": True, "wait": True}
        registered = await client.post("/v1/adapters", json=body)
        assert registered.status_code == 201, registered.text
        swapped = await client.post("/v1/router", json={"path": str(root / "examples" / "demo" / "router")})
        assert swapped.status_code == 200, swapped.text
        retired = await client.delete(f"/v1/adapters/{name}")
        assert retired.status_code in (200, 202, 204), retired.text
        rounds += 1
    return rounds


async def run_load(server: RunningServer, requests: list[dict[str, Any]]) -> tuple[list[str], int]:
    over = asyncio.Event()
    async with httpx.AsyncClient(base_url=server.url, timeout=240) as client:
        churning = asyncio.create_task(churn(client, server.root, over.is_set))
        texts = await asyncio.gather(*(stream_text(client, body) for body in requests))
        over.set()
        return list(texts), await churning


async def run_alone(server: RunningServer, requests: list[dict[str, Any]]) -> list[str]:
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        return [await stream_text(client, body) for body in requests]


def assert_everything_is_returned(server: RunningServer) -> None:
    """Blocks, leases and inbox go back to zero; the last releases may trail the answers by a moment."""
    engine, registry = server.services.engine, server.services.registry
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s and (engine.num_running or engine.num_waiting or registry.has_leases):
        time.sleep(0.05)
    assert (engine.num_running, engine.num_waiting, registry.has_leases) == (0, 0, False)
    assert "lora_mixer_kv_cache_usage_ratio 0.0" in server.get("/metrics").text
    names = {adapter["name"] for adapter in server.get("/v1/adapters").json()["data"]}
    assert names == set(NAMES)


def test_concurrent_streams_equal_the_same_requests_alone_while_adapters_churn(
    start_server: Callable[..., Any],
) -> None:
    with start_server(max_num_seqs=24, max_num_batched_tokens=128) as server:
        for index, scale in enumerate((0.5, 1.5, -1.0)):
            make_variant(DEMO / "adapters" / NAMES[index], server.root / "variants" / str(index), scale)
        requests = make_requests()
        alone = asyncio.run(run_alone(server, requests))
        together, rounds = asyncio.run(run_load(server, requests))
        assert rounds >= 2
        assert together == alone
        assert len(set(alone)) > 20, "the policies must matter for this test to mean anything"
        assert_everything_is_returned(server)


@pytest.mark.parametrize("is_streaming", [True, False])
def test_a_client_that_disconnects_frees_everything(demo_server: RunningServer, is_streaming: bool) -> None:
    body = {"model": "auto", "prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": True}

    async def leave_early() -> None:
        async with httpx.AsyncClient(base_url=demo_server.url) as client:
            if not is_streaming:
                with pytest.raises(httpx.ReadTimeout):
                    await client.post("/v1/completions", json=body, timeout=1.0)
                return
            async with client.stream("POST", "/v1/completions", json={**body, "stream": True}, timeout=60) as response:
                async for _ in response.aiter_lines():
                    break

    asyncio.run(leave_early())
    assert_everything_is_returned(demo_server)
