"""The step: events, statistics, and what a failing runner does to whom."""

import logging
from typing import Any

import pytest

from server.engine.sequence import FinishReason, SamplingParams, ScheduledBatch, Sequence
from server.engine.step_stats import RoutingStats
from server.errors import EngineError
from tests.engine.fakes import CountingLease, FakeRunner, build_engine, run_to_end, tokens_of


def sequence(id_: int, num_prompt: int = 5, **fields: Any) -> Sequence:
    prompt = [(10 * id_ + position) % 64 for position in range(num_prompt)]
    params = SamplingParams(temperature=0, max_tokens=4)
    return Sequence(id_, prompt, params, lease=CountingLease(), request_id=f"request-{id_}", **fields)


def lease_releases(sequence: Sequence) -> int:
    assert isinstance(sequence.lease, CountingLease)
    return sequence.lease.num_releases


def test_an_idle_engine_has_no_work_and_steps_to_nothing() -> None:
    engine = build_engine()
    assert not engine.has_work
    events, stats = engine.step()
    assert events == []
    assert (stats.num_running, stats.num_generated_tokens, stats.kv_usage_ratio) == (0, 0, 0.0)


def test_step_counts_what_it_did() -> None:
    routing = RoutingStats(gate_mass=((1, 3.0),), entropies=(0.5,))
    engine = build_engine(FakeRunner(stats=routing), num_blocks=11, max_num_seqs=1)
    engine.add(sequence(1))
    engine.add(sequence(2))
    _, stats = engine.step()
    assert (stats.num_prompt_tokens, stats.num_generated_tokens) == (5, 1)
    assert (stats.num_running, stats.num_waiting, stats.num_preempted) == (1, 1, 0)
    assert stats.kv_usage_ratio == pytest.approx(0.2)
    assert stats.routing == routing
    assert stats.step_s > 0
    _, stats = engine.step()
    assert (stats.num_prompt_tokens, stats.num_generated_tokens) == (0, 1)


def test_prompt_tokens_are_counted_once_however_often_they_are_computed() -> None:
    engine = build_engine(num_blocks=6)  # 5 blocks of 4 tokens: too few for both
    params = SamplingParams(temperature=0, max_tokens=8)
    both = [Sequence(id_, list(range(10 * id_, 10 * id_ + 7)), params) for id_ in (1, 2)]
    for each in both:
        engine.add(each)
    num_counted = 0
    while engine.has_work:
        _, stats = engine.step()
        num_counted += stats.num_prompt_tokens + stats.num_cached_tokens
    assert sum(each.num_preemptions for each in both) >= 1
    assert num_counted == 14


def test_a_failing_step_ends_its_batch_with_an_error_and_the_engine_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def fail(batch: ScheduledBatch) -> Exception | None:
        first = any(row.sequence.id == 1 for row in batch.rows)
        return RuntimeError("/home/secret at 0xdeadbeef") if first else None

    engine = build_engine(FakeRunner(fail=fail), max_num_seqs=2)
    doomed, mate, waiting = sequence(1), sequence(2), sequence(3)
    for each in (doomed, mate, waiting):
        engine.add(each)
    with caplog.at_level(logging.ERROR, "server.engine.engine"):
        events = run_to_end(engine)
    for each in (doomed, mate):
        assert [event.finish_reason for event in events[each.id]] == [FinishReason.ERROR]
        assert events[each.id][0].error == "the model step failed (RuntimeError)"
        assert lease_releases(each) == 1
    assert len(tokens_of(events[waiting.id])) == 4
    assert "request-1, request-2" in caplog.text


def test_an_error_that_names_its_sequence_spares_the_batch_mates() -> None:
    def fail(batch: ScheduledBatch) -> Exception | None:
        guilty = [row.sequence.id for row in batch.rows if row.sequence.id == 1 and row.sequence.num_output_tokens == 2]
        return EngineError("logits of sequence 1 are not finite", sequence_ids=guilty) if guilty else None

    engine = build_engine(FakeRunner(fail=fail))
    guilty, mate = sequence(1), sequence(2)
    engine.add(guilty)
    engine.add(mate)
    events = run_to_end(engine)
    assert events[guilty.id][-1].error == "logits of sequence 1 are not finite"
    assert len(tokens_of(events[guilty.id])) == 2
    lonely = build_engine()
    lonely.add(sequence(2))
    assert tokens_of(events[mate.id]) == tokens_of(run_to_end(lonely)[2])


def test_a_row_error_ends_that_row_and_its_blocks_are_not_published() -> None:
    runner = FakeRunner(row_error=lambda sequence: "not finite" if sequence.id == 1 else None)
    engine = build_engine(runner)
    doomed, mate = sequence(1, num_prompt=9), sequence(2)
    engine.add(doomed)
    engine.add(mate)
    events = run_to_end(engine)
    assert events[doomed.id][-1].error == "not finite"
    assert len(tokens_of(events[mate.id])) == 4
    twin = Sequence(3, list(doomed.prompt_token_ids), doomed.params)
    engine.add(twin)
    run_to_end(engine)
    assert twin.num_cached_tokens == 0


def test_only_an_exception_is_survived() -> None:
    engine = build_engine(FakeRunner(fail=lambda _: SystemExit()))
    engine.add(sequence(1))
    with pytest.raises(SystemExit):
        engine.step()


def test_fail_all_ends_running_and_waiting_ones_and_reports_earlier_aborts() -> None:
    engine = build_engine(max_num_seqs=1)
    all_three = [sequence(id_) for id_ in (1, 2, 3)]
    for each in all_three:
        engine.add(each)
    engine.step()
    engine.abort(3)
    events = engine.fail_all("shutting down")
    assert [(event.sequence_id, event.finish_reason, event.error) for event in events] == [
        (3, FinishReason.ABORT, None),
        (1, FinishReason.ERROR, "shutting down"),
        (2, FinishReason.ERROR, "shutting down"),
    ]
    assert [lease_releases(each) for each in all_three] == [1, 1, 1]
    assert not engine.has_work
