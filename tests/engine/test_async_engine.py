"""The engine thread and its handles: delivery of events, samples, disconnects."""

import asyncio
import contextlib
import gc
from typing import Any

import pytest

from server.engine.async_engine import AsyncEngine, GenerationHandle
from server.engine.sequence import FinishReason
from server.engine.step_stats import StepStats
from tests.engine.async_clients import StartEngine, consume, request, until
from tests.engine.fakes import CountingLease, FakeRunner, build_engine, scripted, tokens_of

LONG = {"max_model_len": 16_000, "num_blocks": 4001}
"""Limits under which an answer takes longer than `until` waits: that it ends is somebody's doing."""


async def test_a_request_streams_its_tokens_and_ends(start_engine: StartEngine) -> None:
    engine, lease = start_engine(FakeRunner(scripted([1, 2, 3]))), CountingLease()
    events = await consume(engine.submit(request(max_tokens=3, lease=lease)))
    assert {index: tokens_of(found) for index, found in events.items()} == {0: [1, 2, 3]}
    assert events[0][-1].finish_reason is FinishReason.LENGTH
    assert lease.num_releases == 1


async def test_many_requests_at_once_get_their_own_tokens(start_engine: StartEngine) -> None:
    engine = start_engine(limits={"max_num_seqs": 4, "num_blocks": 17})
    alone = [await consume(engine.submit(request(3 + i % 5, max_tokens=2 + i % 7))) for i in range(20)]
    together = await asyncio.gather(
        *(consume(engine.submit(request(3 + i % 5, max_tokens=2 + i % 7))) for i in range(20))
    )
    assert [tokens_of(events[0]) for events in together] == [tokens_of(events[0]) for events in alone]


async def test_eos_tokens_of_the_model_end_a_request(start_engine: StartEngine) -> None:
    engine = start_engine(FakeRunner(scripted([1, 2, 3])), eos_token_ids=frozenset({2}))
    events = await consume(engine.submit(request(max_tokens=9)))
    assert tokens_of(events[0]) == [1, 2]
    assert events[0][-1].finish_reason is FinishReason.STOP


async def test_n_samples_use_successive_seeds_share_the_prompt_and_one_lease(start_engine: StartEngine) -> None:
    engine, lease = start_engine(), CountingLease()
    events = await consume(engine.submit(request(9, n=3, lease=lease, temperature=1.0, seed=7, max_tokens=6)))
    assert lease.num_releases == 1
    assert [events[index][0].num_cached_tokens for index in range(3)] == [0, 8, 8]
    for index in range(3):
        single = await consume(engine.submit(request(9, temperature=1.0, seed=7 + index, max_tokens=6)))
        assert tokens_of(single[0]) == tokens_of(events[index])
    assert len({tuple(tokens_of(found)) for found in events.values()}) == 3


async def test_abort_ends_all_choices_once_and_releases_the_lease(start_engine: StartEngine) -> None:
    runner, lease = FakeRunner(delay_s=0.002), CountingLease()
    engine = start_engine(runner)
    handle = engine.submit(request(n=2, lease=lease, max_tokens=100))
    first = await anext(handle)
    handle.abort()
    handle.abort()
    events = await consume(handle)
    assert first[1].finish_reason is None
    assert {index: found[-1].finish_reason for index, found in events.items()} == dict.fromkeys(
        (0, 1), FinishReason.ABORT
    )
    handle.abort()
    await until(lambda: lease.num_releases == 1)


async def test_one_choice_can_be_aborted_while_the_other_goes_on(start_engine: StartEngine) -> None:
    engine = start_engine(FakeRunner(delay_s=0.002))
    handle = engine.submit(request(n=2, max_tokens=20))
    await anext(handle)
    handle.abort_choice(1)
    handle.abort_choice(1)
    events = await consume(handle)
    assert events[0][-1].finish_reason is FinishReason.LENGTH
    assert events[1][-1].finish_reason is FinishReason.ABORT
    handle.abort_choice(0)


@pytest.mark.parametrize("how", ["cancelled", "closed", "forgotten", "broken out of"])
async def test_a_consumer_that_leaves_frees_everything(start_engine: StartEngine, how: str) -> None:
    lease = CountingLease()
    engine = start_engine(FakeRunner(delay_s=0.002), LONG)
    handle: GenerationHandle | None = engine.submit(request(n=2, lease=lease, max_tokens=LONG["max_model_len"]))
    assert handle is not None
    await anext(handle)
    if how == "cancelled":
        task = asyncio.create_task(consume(handle))
        await asyncio.sleep(0.01)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    elif how == "closed":
        async with contextlib.aclosing(handle):
            await anext(handle)
    elif how == "broken out of":
        async for _ in handle:
            break
        handle = None
    else:
        handle = None
    gc.collect()
    await until(lambda: lease.num_releases == 1 and engine.num_running == 0)


async def test_the_engine_sleeps_while_there_is_nothing_to_do(start_engine: StartEngine) -> None:
    steps: list[StepStats] = []
    engine = start_engine(on_step=steps.append)
    await consume(engine.submit(request(max_tokens=3)))
    assert len(steps) == 3
    await asyncio.sleep(0.05)
    assert len(steps) == 3
    assert sum(step.num_generated_tokens for step in steps) == 3


async def test_a_failing_on_step_ends_no_request(start_engine: StartEngine, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: StepStats) -> None:
        raise ValueError("broken metrics")

    engine = start_engine(on_step=fail)
    events = await consume(engine.submit(request()))
    assert events[0][-1].finish_reason is FinishReason.LENGTH
    assert "broken metrics" in caplog.text


async def test_each_step_wakes_the_event_loop_once(start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, loop = start_engine(), asyncio.get_running_loop()
    calls: list[Any] = []
    original = loop.call_soon_threadsafe

    def counted(callback: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(callback)
        return original(callback, *args, **kwargs)

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    await consume(engine.submit(request(n=5, max_tokens=4)))
    assert len(calls) == 5  # the leader's first step, then four for all


async def test_a_failing_step_ends_with_an_error_and_the_next_request_works(start_engine: StartEngine) -> None:
    errors = [RuntimeError("secret path /root")]
    engine = start_engine(FakeRunner(fail=lambda _: errors.pop() if errors else None))
    lease = CountingLease()
    events = await consume(engine.submit(request(lease=lease)))
    assert [event.error for event in events[0]] == ["the model step failed (RuntimeError)"]
    assert lease.num_releases == 1
    assert (await consume(engine.submit(request())))[0][-1].finish_reason is FinishReason.LENGTH


def test_requests_of_a_closed_event_loop_are_aborted() -> None:
    engine = AsyncEngine(build_engine(FakeRunner(delay_s=0.002), **LONG))
    engine.start()
    lease = CountingLease()
    handles: list[GenerationHandle] = []

    async def submit_and_leave() -> None:
        handles.append(engine.submit(request(max_tokens=LONG["max_model_len"], lease=lease)))

    asyncio.run(submit_and_leave())
    asyncio.run(until(lambda: lease.num_releases == 1 and engine.num_running == 0))
    assert engine.is_alive
    engine.stop()


async def test_two_event_loops_share_one_engine(start_engine: StartEngine) -> None:
    engine = start_engine(FakeRunner(delay_s=0.001))

    async def elsewhere() -> list[int]:
        return tokens_of((await consume(engine.submit(request(max_tokens=8))))[0])

    other = asyncio.to_thread(lambda: asyncio.run(elsewhere()))
    here, there = await asyncio.gather(elsewhere(), other)
    assert here == there == await elsewhere()
