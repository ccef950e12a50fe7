"""Registers adapters while requests stream: the longest gap a client sees, and whether anything was compiled again."""

import asyncio
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.peers.protocol import prompts
from server.api.services import Services
from server.bench.in_process import in_process
from server.bench.load import Answer, Job, Target
from server.config import AdapterSpec, ServerConfig
from server.errors import LoraMixerError

STREAMS = 8
TOKENS_PER_STREAM = 64
"""Streams are renewed while registration goes on, so that there is always load."""


async def stall_over_http(url: str, target: Target, folders: Sequence[Path], settle_s: float) -> dict[str, Any]:
    """Gaps between two tokens of one stream, without and with registrations going on, in ms."""
    quiet = await _streams_during(target, asyncio.sleep(settle_s))
    windows: list[tuple[float, float]] = []
    loaded = await _streams_during(target, _register_over_http(url, folders, windows, settle_s / 4))
    during = [gap for start_s, end_s in windows for gap in gaps_ms(loaded, start_s, end_s)]
    before = gaps_ms(quiet, -float("inf"), float("inf"))
    if not during or not before:
        raise LoraMixerError("no token came while adapters were registered; the load is too small to tell")
    return {
        "streams": STREAMS,
        "registrations": len(folders),
        "register_s": [round(end_s - start_s, 3) for start_s, end_s in windows],
        "gap_without_ms": {"median": round(statistics.median(before), 2), "max": round(max(before), 2)},
        "gap_during_ms": {"median": round(statistics.median(during), 2), "max": round(max(during), 2)},
        "stall_ms": round(max(during), 2),
    }


def gaps_ms(answers: Sequence[Answer], start_s: float, end_s: float) -> list[float]:
    """Gaps between two tokens that overlap the window, those that other streams' prefills cause included."""
    return [
        1e3 * (later - earlier)
        for answer in answers
        for earlier, later in zip(answer.token_s, answer.token_s[1:], strict=False)
        if later >= start_s and earlier <= end_s
    ]


async def recompiled_in_process(config: ServerConfig, folders: Sequence[Path]) -> int:
    """Graphs that torch compiled while adapters were registered under load; 0 where nothing is compiled at all."""
    parts: list[Services] = []
    async with in_process(config, parts.append) as (target, _):
        await _streams_during(target, asyncio.sleep(1.0))
        before = compiled_graphs()

        def register() -> None:
            for folder in folders:
                parts[0].registry.register(AdapterSpec(name=folder.name, source=str(folder)))
                info = parts[0].registry.wait(folder.name)
                if info.state != "READY":
                    raise LoraMixerError(f"{folder.name} is {info.state}: {info.reason}")

        await _streams_during(target, asyncio.to_thread(register))
        return compiled_graphs() - before


def compiled_graphs() -> int:
    """Graphs torch.compile has made in this process so far, recompilations included."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


async def _streams_during(target: Target, work: Any) -> list[Answer]:
    """Keep STREAMS routed requests going until `work` is done; all their answers."""
    doing = asyncio.ensure_future(work)
    answers: list[Answer] = []

    async def stream(index: int) -> None:
        number = 0
        while not doing.done() or not number:
            (ids,) = prompts(1, 64, seed=1000 * index + number)
            salt = f"registration-{time.monotonic_ns()}"
            answers.append(await target.generate(Job("auto", tuple(ids), TOKENS_PER_STREAM, salt)))
            number += 1

    await asyncio.gather(*(stream(index) for index in range(STREAMS)))
    await doing
    if failures := [answer.error for answer in answers if answer.error is not None]:
        raise LoraMixerError(f"{len(failures)} streams failed: {failures[0]}")
    return answers


async def _register_over_http(
    url: str, folders: Sequence[Path], windows: list[tuple[float, float]], pause_s: float
) -> None:
    """POST each folder and wait until it serves; appends when each began and ended."""
    async with httpx.AsyncClient(base_url=url, timeout=120.0, trust_env=False) as client:
        for folder in folders:
            await asyncio.sleep(pause_s)
            started_s = time.perf_counter()
            body = {"name": folder.name, "source": str(folder), "wait": True}
            response = await client.post("/v1/adapters", json=body)
            if response.status_code != httpx.codes.CREATED:
                raise LoraMixerError(
                    f"registering {folder.name} answered {response.status_code}: {response.text[:300]}"
                )
            windows.append((started_s, time.perf_counter()))
        await asyncio.sleep(pause_s)
