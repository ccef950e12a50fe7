"""The engine thread from outside its requests: admission, calls between steps, drain, stop and death."""

import asyncio
import random
import threading

import pytest

from server.engine.async_engine import AsyncEngine
from server.engine.sequence import FinishReason, ScheduledBatch
from server.errors import ContextLengthError, EngineError, InvalidRequestError, NotReadyError, OverloadedError
from tests.engine.async_clients import StartEngine, consume, request, until
from tests.engine.fakes import CountingLease, FakeRunner, build_engine

# Admission


async def test_submit_refuses_before_start_and_releases_the_lease() -> None:
    engine, lease = AsyncEngine(build_engine()), CountingLease()
    with pytest.raises(NotReadyError):
        engine.submit(request(lease=lease))
    assert lease.num_releases == 1
    assert not engine.is_alive
    engine.stop()


@pytest.mark.parametrize(("num_prompt", "error"), [(0, InvalidRequestError), (500, ContextLengthError)])
async def test_submit_refuses_prompts_that_cannot_be_computed(
    start_engine: StartEngine, num_prompt: int, error: type[Exception]
) -> None:
    engine, lease = start_engine(), CountingLease()
    with pytest.raises(error):
        engine.submit(request(num_prompt, lease=lease))
    assert lease.num_releases == 1
    assert engine.num_waiting == 0


async def test_sequences_beyond_the_seats_and_the_queue_are_refused(start_engine: StartEngine) -> None:
    runner = FakeRunner()
    runner.gate.clear()
    engine = start_engine(runner, {"max_num_seqs": 2}, max_waiting_requests=1)
    admitted = [engine.submit(request()) for _ in range(3)]
    lease = CountingLease()
    with pytest.raises(OverloadedError, match="3 requests are waiting"):
        engine.submit(request(lease=lease))
    assert lease.num_releases == 1
    runner.gate.set()
    await asyncio.gather(*map(consume, admitted))


async def test_an_idle_engine_takes_whatever_comes_together_and_lets_nobody_queue_behind_it(
    start_engine: StartEngine,
) -> None:
    runner = FakeRunner()
    engine = start_engine(runner, {"max_num_seqs": 2}, max_waiting_requests=0, max_waiting_tokens=1)
    await consume(engine.submit(request(n=4)))
    runner.gate.clear()
    together = engine.submit_all([request(n=2), request(), request(n=3)])
    with pytest.raises(OverloadedError, match="6 requests are waiting"):
        engine.submit(request())
    runner.gate.set()
    await asyncio.gather(*map(consume, together))
    assert (engine.num_running, engine.num_waiting) == (0, 0)


async def test_requests_that_come_together_behind_others_are_queued_all_or_none(start_engine: StartEngine) -> None:
    runner = FakeRunner()
    engine = start_engine(runner, {"max_num_seqs": 1}, max_waiting_requests=2)
    runner.gate.clear()
    first = engine.submit(request())
    await asyncio.to_thread(runner.entered.wait, 5)
    leases = [CountingLease() for _ in range(3)]
    with pytest.raises(OverloadedError, match="1 requests are waiting"):
        engine.submit_all([request(lease=lease) for lease in leases])
    assert [lease.num_releases for lease in leases] == [1, 1, 1]
    assert engine.num_running + engine.num_waiting == 1
    pair = engine.submit_all([request(), request()])
    runner.gate.set()
    await asyncio.gather(*map(consume, [first, *pair]))


async def test_the_queue_fills_behind_running_sequences_and_counts_each_once(start_engine: StartEngine) -> None:
    runner = FakeRunner()
    engine = start_engine(runner, {"max_num_seqs": 1}, max_waiting_requests=2)
    runner.gate.clear()
    handles = [engine.submit(request())]
    await asyncio.to_thread(runner.entered.wait, 5)
    handles += [engine.submit(request()), engine.submit(request())]
    with pytest.raises(OverloadedError):
        engine.submit(request())
    assert engine.num_running + engine.num_waiting == 3
    runner.gate.set()
    await asyncio.gather(*map(consume, handles))
    assert (engine.num_running, engine.num_waiting) == (0, 0)


async def test_tokens_beyond_the_queue_are_refused_unless_nobody_waits(start_engine: StartEngine) -> None:
    runner = FakeRunner()
    runner.gate.clear()
    engine = start_engine(runner, max_waiting_tokens=20)
    alone = engine.submit(request(30, max_tokens=30))
    with pytest.raises(OverloadedError, match="60 tokens are waiting"):
        engine.submit(request(1, max_tokens=1))
    runner.gate.set()
    await consume(alone)


# Calls between steps


async def test_call_between_steps_runs_on_the_engine_thread_between_steps(start_engine: StartEngine) -> None:
    runner = FakeRunner(delay_s=0.002)
    engine = start_engine(runner)
    handle = engine.submit(request(max_tokens=50))
    await anext(handle)
    idents = [await asyncio.wrap_future(engine.call_between_steps(threading.get_ident)) for _ in range(3)]
    assert set(idents) == runner.threads
    handle.abort()
    await consume(handle)
    assert await asyncio.wrap_future(engine.call_between_steps(lambda: 5)) == 5, "also while it is idle"


async def test_an_exception_of_a_call_goes_to_its_future_only(start_engine: StartEngine) -> None:
    engine = start_engine()

    def fail() -> None:
        raise EngineError("mine")

    with pytest.raises(EngineError, match="mine"):
        await asyncio.wrap_future(engine.call_between_steps(fail))
    assert engine.is_alive


async def test_a_cancelled_call_is_not_run(start_engine: StartEngine) -> None:
    runner, calls = FakeRunner(), list[int]()
    engine = start_engine(runner)
    runner.gate.clear()
    handle = engine.submit(request())
    await asyncio.to_thread(runner.entered.wait, 5)
    assert engine.call_between_steps(lambda: calls.append(1)).cancel()
    runner.gate.set()
    await consume(handle)
    assert calls == []


async def test_calls_made_before_start_run_at_start() -> None:
    engine = AsyncEngine(build_engine())
    future = engine.call_between_steps(lambda: 7)
    engine.start()
    assert await asyncio.wrap_future(future) == 7
    engine.stop()


# Drain, stop, death


async def test_drain_lets_running_requests_finish_and_refuses_new_ones(start_engine: StartEngine) -> None:
    engine = start_engine(FakeRunner(delay_s=0.002))
    consumer = asyncio.create_task(consume(engine.submit(request(max_tokens=10))))
    await asyncio.sleep(0)
    draining = asyncio.create_task(engine.drain(timeout_s=10))
    await asyncio.sleep(0)
    assert engine.is_draining
    assert engine.is_alive
    with pytest.raises(NotReadyError, match="draining"):
        engine.submit(request())
    await draining
    assert (await consumer)[0][-1].finish_reason is FinishReason.LENGTH


async def test_drain_aborts_what_does_not_finish_in_time(start_engine: StartEngine) -> None:
    engine = start_engine(FakeRunner(delay_s=0.005), {"max_num_seqs": 1})
    leases = [CountingLease(), CountingLease()]
    consumers = [asyncio.create_task(consume(engine.submit(request(max_tokens=90, lease=lease)))) for lease in leases]
    await asyncio.sleep(0.02)
    await engine.drain(timeout_s=0.02)
    for events in await asyncio.gather(*consumers):
        assert events[0][-1].finish_reason is FinishReason.ABORT
    assert [lease.num_releases for lease in leases] == [1, 1]


async def test_drain_ends_behind_what_was_sent_before_its_end(start_engine: StartEngine) -> None:
    engine = start_engine()
    opened = threading.Event()
    engine.call_between_steps(lambda: opened.wait(5))
    draining = asyncio.create_task(engine.drain(timeout_s=10))
    await asyncio.sleep(0)
    is_done = engine.call_between_steps(lambda: not engine._idle_futures)
    opened.set()
    assert not await asyncio.wrap_future(is_done)
    await draining


async def test_drain_of_an_idle_engine_returns_at_once(start_engine: StartEngine) -> None:
    engine = start_engine()
    async with asyncio.timeout(5):
        await engine.drain(timeout_s=60)
        engine.stop()
        await engine.drain(timeout_s=60)


async def test_stop_ends_pending_handles_with_an_error_and_fails_calls(start_engine: StartEngine) -> None:
    runner = FakeRunner()
    engine = start_engine(runner, {"max_num_seqs": 1})
    runner.gate.clear()
    leases = [CountingLease() for _ in range(3)]
    handles = [engine.submit(request(lease=leases[0]))]
    await asyncio.to_thread(runner.entered.wait, 5)
    stopping = asyncio.create_task(asyncio.to_thread(engine.stop))
    await asyncio.sleep(0.02)
    handles += [engine.submit(request(lease=lease, n=2)) for lease in leases[1:]]  # behind the stop message
    call = engine.call_between_steps(lambda: 1)
    runner.gate.set()
    await stopping
    for handle in handles:
        for found in (await consume(handle)).values():
            assert (found[-1].finish_reason, found[-1].error) == (FinishReason.ERROR, "the server is shutting down")
    with pytest.raises(NotReadyError):
        call.result(timeout=5)
    with pytest.raises(NotReadyError):
        engine.call_between_steps(lambda: 1).result(timeout=5)
    with pytest.raises(NotReadyError):
        engine.submit(request())
    assert [lease.num_releases for lease in leases] == [1, 1, 1]
    engine.stop()


async def test_death_of_the_engine_thread_ends_every_handle(
    start_engine: StartEngine, caplog: pytest.LogCaptureFixture
) -> None:
    runner = FakeRunner(delay_s=0.002)
    engine = start_engine(runner, {"max_num_seqs": 2})
    leases = [CountingLease() for _ in range(4)]
    handles = [engine.submit(request(max_tokens=100, lease=lease)) for lease in leases]
    await anext(handles[0])
    runner.fail = lambda _: SystemExit("out of luck")
    for handle in handles:
        (found,) = (await consume(handle)).values()
        assert (found[-1].finish_reason, found[-1].error) == (FinishReason.ERROR, "the engine stopped (SystemExit)")
    await until(lambda: not engine.is_alive)
    with pytest.raises(NotReadyError):
        engine.submit(request())
    assert [lease.num_releases for lease in leases] == [1] * 4
    assert "the engine thread died" in caplog.text


async def test_a_bug_in_the_scheduler_still_ends_every_handle(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start_engine(FakeRunner(delay_s=0.002))
    handles = [engine.submit(request(max_tokens=100)) for _ in range(2)]
    await anext(handles[0])
    scheduler = engine._engine.scheduler
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "update", None)  # every use raises
        patch.setattr(scheduler, "fail", None)
        for handle in handles:
            (found,) = (await consume(handle)).values()
            assert found[-1].error == "the engine stopped (TypeError)"
        await until(lambda: not engine.is_alive)
    scheduler.fail(scheduler.sequence_ids, "clean up for the fixture")
    engine._publish_load()


@pytest.mark.parametrize("seed", range(3))
async def test_random_clients_that_leave_or_fail_give_everything_back(start_engine: StartEngine, seed: int) -> None:
    rng = random.Random(seed)

    def fail(batch: ScheduledBatch) -> Exception | None:
        return EngineError("row", sequence_ids=[batch.rows[0].sequence.id]) if rng.random() < 0.02 else None

    engine = start_engine(FakeRunner(fail=fail, delay_s=0.0003), {"num_blocks": 17, "max_num_seqs": 4})
    leases: list[CountingLease] = []

    async def client(patience_s: float | None, num_prompt: int, n: int) -> None:
        leases.append(CountingLease())
        handle = engine.submit(request(num_prompt, n=n, max_tokens=12, lease=leases[-1]))
        try:
            async with asyncio.timeout(patience_s):
                assert len(await consume(handle)) == n
        except TimeoutError:
            await handle.aclose()

    clients = [client(rng.choice([None, 0.001, 0.02]), rng.randint(1, 30), rng.choice([1, 1, 3])) for _ in range(40)]
    await asyncio.gather(*clients)
    await engine.drain(timeout_s=10)
    assert [lease.num_releases for lease in leases] == [1] * len(leases)
