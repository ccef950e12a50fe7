"""Rates while all requests decode, gaps around a registration, and the summaries made of them."""

import asyncio
import time

import pytest

from benchmarks.loads import Loader, steady_rate
from benchmarks.registration import gaps_ms
from benchmarks.scaling import adapters_ratios
from benchmarks.serving import summarised_http
from benchmarks.step_cost import EngineTimer
from server.bench.load import Answer, Load
from server.errors import LoraMixerError
from tests.bench_fakes import FakeTarget


def test_the_steady_rate_counts_only_while_everyone_decodes() -> None:
    early = Answer(0.0, (1.0, 2.0, 3.0, 4.0))
    late = Answer(0.0, (2.5, 3.5, 4.5, 5.5))
    # Between 2.5 s and 4.0 s: 3.0 and 4.0 of the first, 3.5 of the second.
    assert steady_rate(Load(5.5, (early, late))) == 3 / 1.5


def test_requests_that_never_overlap_have_no_steady_rate() -> None:
    with pytest.raises(LoraMixerError, match="generate more tokens"):
        steady_rate(Load(9.0, (Answer(0.0, (1.0, 2.0)), Answer(0.0, (3.0, 4.0)))))


async def test_a_cached_load_shares_its_salt_with_the_run_before_and_others_do_not() -> None:
    target = FakeTarget()
    loader = Loader(target)
    for is_cached in (True, False):
        target.jobs.clear()
        await asyncio.gather(loader.run("base", 2, 5, 3, "warm"))
        target.jobs.clear()
        with pytest.raises(LoraMixerError, match="never decoded"):  # the fake emits all tokens at one instant
            await loader.rate("base", 2, prompt_tokens=5, new_tokens=3, is_cached=is_cached)
        assert (len({job.salt for job in target.jobs}) == 1) is is_cached


async def test_a_failed_request_ends_the_measurement() -> None:
    with pytest.raises(LoraMixerError, match="2 of 2 base requests failed: 2 tokens instead of 3"):
        await Loader(FakeTarget(missing_tokens=1)).run("base", 2, 5, 3, "salt")


def test_gaps_that_overlap_the_window_count() -> None:
    answer = Answer(0.0, (1.0, 1.1, 1.6, 1.7))
    assert gaps_ms([answer], 1.2, 1.5) == [pytest.approx(500.0)]
    assert len(gaps_ms([answer], 0.0, 9.0)) == 3
    assert gaps_ms([answer], 5.0, 6.0) == []


def test_many_adapters_are_compared_at_equal_concurrency() -> None:
    curves = {
        "8 adapters": [{"x": 1, "tok_s": 10.0}, {"x": 8, "tok_s": 100.0}],
        "64 adapters": [{"x": 8, "tok_s": 75.0}],
    }
    assert adapters_ratios(curves) == [{"concurrency": 8, "ratio": 0.75, "target": 0.8, "met": False}]
    assert adapters_ratios({}) == []


def test_the_http_ratio_is_taken_within_each_repeat() -> None:
    repeats = [
        {"in_process_tok_s": 100.0, "http_tok_s": 90.0},
        {"in_process_tok_s": 50.0, "http_tok_s": 50.0},
    ]
    assert summarised_http(repeats, 32)["ratio"] == {"median": 0.95, "min": 0.9, "max": 1.0}


def test_the_timer_counts_steps_of_a_running_scheduler() -> None:
    from types import SimpleNamespace
    from typing import Any, cast

    from tests.api.fakes import Harness

    engine: Any = Harness().engine
    engine._engine._runner = SimpleNamespace(_outputs=lambda: time.sleep(0.01), run=None)
    timer = EngineTimer()
    timer.attach(cast("Any", SimpleNamespace(engine=engine)))
    engine._engine.step()
    engine._engine._runner._outputs()
    assert timer.num_steps == 1
    assert timer.per_step_ms(timer.sampling_s) >= 10
    assert timer.per_step_ms(timer.scheduling_s) > 0
    timer.reset()
    assert timer.per_step_ms(timer.scheduling_s) == 0
