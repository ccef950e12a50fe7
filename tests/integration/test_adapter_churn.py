"""Registrations and retirements by the hundred under 16 streams: no failure, no changed token, no growing memory."""

import asyncio
import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.adapters.folders import BASE
from tests.integration.conftest import RunningServer
from tests.integration.tiny import make_tiny_root, serve_here

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

NUM_STREAMS = 16
MAX_GROWTH_MIB = 24
"""Resident memory may wander by what allocators hold back; a leaked adapter of each registration would be far more in
sum over 500, and the bank's own sizes are compared exactly."""

POLICIES: list[dict[str, Any]] = [
    {"model": BASE},
    {"model": "a0"},
    {"model": "a1"},
    {"model": "auto"},
    {"model": "auto", "adapters": ["a0", "a2"]},
    {"model": "auto", "adapters": {"a1": 0.5, "a2": 1.5}},
]


@dataclass
class Load:
    """What the streams saw."""

    texts: dict[int, set[str]] = field(default_factory=dict)
    gaps_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    num_answers: int = 0


def request(index: int) -> dict[str, Any]:
    """The index-th of `NUM_STREAMS` different greedy requests."""
    prompt = f"request {index}: " + "lorem ipsum " * (index % 4)
    return {"prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True, "stream": True,
            **POLICIES[index % len(POLICIES)]}  # fmt: skip


async def stream(client: httpx.AsyncClient, index: int, load: Load) -> None:
    """One answer, token by token, into `load`."""
    text, last_s = "", 0.0
    async with client.stream("POST", "/v1/completions", json=request(index)) as response:
        if response.status_code != 200:
            load.failures.append((await response.aread()).decode())
            return
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                load.failures.append(line)
                return
            now_s = time.monotonic()
            if last_s:
                load.gaps_s.append(now_s - last_s)
            last_s = now_s
            text += "".join(choice["text"] for choice in chunk["choices"])
    load.texts.setdefault(index, set()).add(text)
    load.num_answers += 1


async def run_streams(url: str, until: Callable[[], bool]) -> Load:
    """All streams at once, each starting over until it is told to end."""
    load = Load()

    async def repeat(client: httpx.AsyncClient, index: int) -> None:
        while True:
            await stream(client, index, load)
            if until() or load.failures:
                return

    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        await asyncio.gather(*(repeat(client, index) for index in range(NUM_STREAMS)))
    return load


async def churn(client: httpx.AsyncClient, start: int, count: int) -> None:
    """Register and retire `count` adapters, every fourth one replaced in between."""
    for index in range(start, start + count):
        name, source = f"churn-{index}", f"sources/a{3 + index % 3}"
        answer = await client.post("/v1/adapters", json={"name": name, "source": source, "wait": True})
        assert answer.status_code == 201, answer.text
        if index % 4 == 0:
            other = {"name": name, "source": f"sources/a{3 + (index + 1) % 3}", "wait": True}
            answer = await client.post("/v1/adapters", json=other, headers={"If-Match": answer.headers["ETag"]})
            assert answer.status_code == 201, answer.text
        answer = await client.delete(f"/v1/adapters/{name}")
        assert answer.status_code == 200, answer.text


def resident_mib() -> float:
    """Resident memory of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def sizes(server: RunningServer) -> dict[str, Any]:
    """What must be the same before and after, to the element."""
    registry = server.services.registry
    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s and (registry.has_leases or len(registry.list()) > 3):
        time.sleep(0.02)
    registry._publisher.run(lambda: None)  # behind the last collection in the lane
    bank = registry._routed.bank.snapshot
    return {
        "slots": bank.slots,
        "ranks": {name: tuple(block.a.shape) for name, block in bank.projections.items()},
        "superseded": len(registry._state.superseded),
        "leases": registry.has_leases,
        "names": [info.name for info in registry.list()],
    }


async def run_both(server: RunningServer, count: int) -> tuple[Load, list[float]]:
    """The streams and the churn; resident memory after a fifth of the churn, and at its end."""
    is_over = False
    streams = asyncio.create_task(run_streams(server.url, lambda: is_over))
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        await churn(client, 0, count // 5)
        memory = [resident_mib()]
        await churn(client, count // 5, count - count // 5)
        memory.append(resident_mib())
    is_over = True
    return await streams, memory


def p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * len(values))]


@pytest.mark.parametrize("count", [30, pytest.param(500, marks=pytest.mark.slow)])
def test_churn_under_streams_changes_nothing(
    count: int,
    tiny_llama: "Callable[..., LlamaForCausalLM]",
    make_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    make_tiny_root(tmp_path, tiny_llama, make_adapter, num_adapters=6, num_configured=3, max_num_seqs=NUM_STREAMS)
    with serve_here(tmp_path) as server:
        rounds = iter(range(NUM_STREAMS * (3 if count < 100 else 20)))
        alone = asyncio.run(run_streams(server.url, lambda: next(rounds, None) is None))
        before = sizes(server)
        together, memory = asyncio.run(run_both(server, count))
        assert alone.failures == together.failures == []
        assert all(len(texts) == 1 for texts in alone.texts.values())
        assert together.texts == alone.texts
        assert len({text for texts in alone.texts.values() for text in texts}) > NUM_STREAMS / 2
        assert sizes(server) == before
        assert memory[1] - memory[0] < MAX_GROWTH_MIB
        print(
            f"{count} registrations, {together.num_answers} answers; p99 between tokens {p99(alone.gaps_s) * 1e3:.1f} "
            f"-> {p99(together.gaps_s) * 1e3:.1f} ms; resident {memory[0]:.0f} -> {memory[1]:.0f} MiB"
        )
