"""An engine on its thread that is stopped after the test, and checked to have given everything back."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from server.engine.async_engine import AsyncEngine
from tests.engine.async_clients import StartEngine
from tests.engine.fakes import FakeRunner, build_engine


@pytest.fixture
async def start_engine() -> AsyncIterator[StartEngine]:
    """`start_engine(runner, limits={...}, **settings)`: a started engine, stopped after the test with nothing left."""
    started: list[tuple[AsyncEngine, FakeRunner, Any]] = []

    def start(runner: FakeRunner | None = None, limits: dict[str, Any] | None = None, **settings: Any) -> AsyncEngine:
        runner = runner or FakeRunner()
        engine = build_engine(runner, **(limits or {}))
        async_engine = AsyncEngine(engine, **settings)
        async_engine.start()
        started.append((async_engine, runner, engine))
        return async_engine

    yield start
    for async_engine, runner, engine in started:
        runner.gate.set()
        await asyncio.to_thread(async_engine.stop)
        assert not async_engine.is_alive
        assert (async_engine.num_running, async_engine.num_waiting) == (0, 0)
        assert (engine.scheduler.kv_usage_ratio, engine.scheduler.waiting_tokens) == (0, 0)
        assert threading.get_ident() not in runner.threads
