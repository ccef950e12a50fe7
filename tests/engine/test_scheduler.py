"""Scheduling rules one by one: budgets, order, admission and ends. Whole workloads: `test_engine_workloads.py`."""

import pytest

from server.engine.engine import Engine
from server.engine.sequence import FinishReason, TokenEvent
from server.engine.waiting_queue import TURN
from server.errors import ContextLengthError, InvalidRequestError
from tests.engine.fakes import (
    CountingLease,
    FakeRunner,
    build_engine,
    fake_logprobs,
    last_batch,
    make_sequence,
    run_to_end,
    scripted,
    tokens_of,
)


def step(engine: Engine) -> list[TokenEvent]:
    return engine.step()[0]


# Budgets and order


def test_a_long_prompt_is_computed_in_chunks_and_then_samples() -> None:
    runner = FakeRunner()
    engine = build_engine(runner, max_num_batched_tokens=8)
    long = make_sequence(20, max_tokens=2)
    engine.add(long)
    run_to_end(engine)
    assert [count for batch in runner.batches for _, count in batch] == [8, 8, 4, 1]


def test_decodes_progress_in_every_step_while_a_long_prompt_prefills() -> None:
    runner = FakeRunner()
    engine = build_engine(runner, max_num_batched_tokens=8)
    short, long = make_sequence(3, max_tokens=12), make_sequence(60, first_token=7)
    engine.add(short)
    step(engine)
    engine.add(long)
    while long.num_computed_tokens < long.num_prompt_tokens and not short.is_finished:
        tokens_before = short.num_output_tokens
        step(engine)
        assert short.num_output_tokens == tokens_before + 1
        assert last_batch(runner)[long.id] in (7, 60 % 7)
    run_to_end(engine)


def test_decodes_are_scheduled_before_a_prompt_of_higher_priority() -> None:
    runner = FakeRunner()
    engine = build_engine(runner, max_num_batched_tokens=8)
    short, urgent = make_sequence(3, max_tokens=6), make_sequence(60, first_token=9, priority=-1)
    engine.add(short)
    step(engine)
    engine.add(urgent)
    for _ in range(4):
        step(engine)
        assert last_batch(runner) == {short.id: 1, urgent.id: 7}
    run_to_end(engine)


def test_waiting_sequences_start_by_priority_then_arrival() -> None:
    runner = FakeRunner()
    engine = build_engine(runner, max_num_seqs=1)
    low, first, second, high = (make_sequence(priority=p, arrival_s=a) for p, a in ((5, 0), (0, 1), (0, 2), (-1, 3)))
    for each in (low, second, first, high):
        engine.add(each)
    run_to_end(engine)
    started = list(dict.fromkeys(id_ for batch in runner.batches for id_, _ in batch))
    assert started == [high.id, first.id, second.id, low.id]


def test_urgent_requests_without_end_starve_nobody() -> None:
    engine = build_engine(max_num_seqs=1)
    plain, last = make_sequence(arrival_s=0, max_tokens=2), make_sequence(arrival_s=0.5, priority=2**31 - 1)
    engine.add(plain)
    engine.add(last)
    num_urgent = 0
    while not last.is_finished:
        assert num_urgent < 3 * TURN, "a turn for each, and what ran before the first"
        if engine.scheduler.num_waiting < 4:
            num_urgent += 1
            engine.add(make_sequence(arrival_s=num_urgent, priority=-(2**31) + 1, max_tokens=1))
        step(engine)
    assert plain.is_finished
    run_to_end(engine)


def test_seven_of_eight_admissions_go_by_priority() -> None:
    runner = FakeRunner()
    engine = build_engine(runner, max_num_seqs=1)
    plain = [make_sequence(arrival_s=index, max_tokens=1) for index in range(20)]
    urgent = [make_sequence(arrival_s=100 + index, priority=-1, max_tokens=1) for index in range(20)]
    for each in (*plain, *urgent):
        engine.add(each)
    run_to_end(engine)
    started = list(dict.fromkeys(id_ for batch in runner.batches for id_, _ in batch))
    assert [started.index(plain[0].id), started.index(plain[1].id)] == [TURN, 2 * TURN]
    assert [id_ for id_ in started if id_ in {each.id for each in urgent}] == [each.id for each in urgent]


def test_no_step_exceeds_the_sequence_and_token_budgets() -> None:
    runner = FakeRunner()
    engine = build_engine(runner, max_num_seqs=3, max_num_batched_tokens=10)
    for index in range(7):
        engine.add(make_sequence(5 + index, first_token=index))
    run_to_end(engine)
    assert max(len(batch) for batch in runner.batches) == 3
    assert max(sum(count for _, count in batch) for batch in runner.batches) <= 10


def test_fewer_tokens_than_seats_starve_nobody() -> None:
    runner = FakeRunner()
    engine = build_engine(runner, max_num_seqs=8, max_num_batched_tokens=2)
    for index in range(5):
        engine.add(make_sequence(3, first_token=index))
    assert engine.scheduler.max_num_seqs == 2, "what admission takes for seats"
    run_to_end(engine)
    assert max(len(batch) for batch in runner.batches) == 2


def test_waiting_accounts_count_prompt_and_max_tokens() -> None:
    engine = build_engine(max_num_seqs=1)
    engine.add(make_sequence(6, max_tokens=4))
    engine.add(make_sequence(7, max_tokens=5))
    assert (engine.scheduler.num_waiting, engine.scheduler.waiting_tokens) == (2, 22)
    step(engine)
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting, engine.scheduler.waiting_tokens) == (1, 1, 12)


# Admission


def test_a_prompt_that_could_never_fit_is_refused_and_keeps_its_lease() -> None:
    engine = build_engine(num_blocks=5, max_model_len=100)  # 4 blocks of 4 tokens
    assert engine.scheduler.max_sequence_tokens == 16
    lease = CountingLease()
    with pytest.raises(ContextLengthError, match="at most 15"):
        engine.add(make_sequence(16, lease=lease))
    with pytest.raises(InvalidRequestError, match="no tokens"):
        engine.add(make_sequence(0))
    assert not engine.has_work
    assert lease.num_releases == 0


def test_a_prompt_to_be_scored_only_may_fill_the_context() -> None:
    engine = build_engine(num_blocks=5)
    engine.add(make_sequence(16, max_tokens=0))
    run_to_end(engine)


def test_the_longest_sequence_that_fits_ends_with_length_at_the_limit() -> None:
    engine = build_engine(num_blocks=5, max_model_len=100)
    longest = make_sequence(15, max_tokens=50)
    engine.add(longest)
    (events,) = run_to_end(engine).values()
    assert len(tokens_of(events)) == 1
    assert events[-1].finish_reason is FinishReason.LENGTH


def test_max_model_len_ends_a_sequence_with_length() -> None:
    engine = build_engine(max_model_len=10)
    engine.add(make_sequence(6, max_tokens=50))
    (events,) = run_to_end(engine).values()
    assert len(tokens_of(events)) == 4
    assert events[-1].finish_reason is FinishReason.LENGTH


def test_nobody_is_admitted_into_the_last_blocks_that_running_sequences_will_soon_want() -> None:
    engine = build_engine(num_blocks=6)  # 5 blocks of 4 tokens
    running, newcomer = make_sequence(11, max_tokens=5), make_sequence(8, first_token=30)
    engine.add(running)
    step(engine)
    engine.add(newcomer)  # wants the 2 blocks that are left, and the running one is about to want one of them
    events = run_to_end(engine)
    assert newcomer.num_preemptions == 0
    assert len(tokens_of(events[newcomer.id])) == 4


# Ends


def test_eos_ends_with_stop_and_no_stop_reason_and_stays_in_the_tokens() -> None:
    engine = build_engine(FakeRunner(scripted([5, 9, 7])))
    engine.add(make_sequence(max_tokens=10, eos_token_ids=frozenset({9})))
    (events,) = run_to_end(engine).values()
    assert tokens_of(events) == [5, 9]
    assert (events[-1].finish_reason, events[-1].stop_reason) == (FinishReason.STOP, None)


def test_a_stop_token_is_the_stop_reason_even_with_ignore_eos() -> None:
    engine = build_engine(FakeRunner(scripted([9, 8, 7])))
    engine.add(make_sequence(max_tokens=10, eos_token_ids=frozenset({9}), ignore_eos=True, stop_token_ids=(7,)))
    (events,) = run_to_end(engine).values()
    assert tokens_of(events) == [9, 8, 7]
    assert (events[-1].finish_reason, events[-1].stop_reason) == (FinishReason.STOP, 7)


@pytest.mark.parametrize(("min_tokens", "num_tokens"), [(0, 1), (1, 1), (2, 3), (3, 3), (4, 5)])
def test_stop_tokens_count_only_from_min_tokens_on(min_tokens: int, num_tokens: int) -> None:
    engine = build_engine(FakeRunner(scripted([9, 8])))
    engine.add(make_sequence(max_tokens=10, eos_token_ids=frozenset({9}), min_tokens=min_tokens))
    (events,) = run_to_end(engine).values()
    assert len(tokens_of(events)) == num_tokens


def test_max_tokens_ends_with_length() -> None:
    engine = build_engine(FakeRunner(scripted([1])))
    engine.add(make_sequence(max_tokens=3))
    (events,) = run_to_end(engine).values()
    assert tokens_of(events) == [1, 1, 1]
    assert events[-1].finish_reason is FinishReason.LENGTH


def test_a_stop_token_as_the_last_allowed_one_is_a_stop() -> None:
    engine = build_engine(FakeRunner(scripted([1, 9])))
    engine.add(make_sequence(max_tokens=2, eos_token_ids=frozenset({9})))
    (events,) = run_to_end(engine).values()
    assert events[-1].finish_reason is FinishReason.STOP


def test_max_tokens_zero_scores_the_prompt_and_samples_nothing() -> None:
    engine = build_engine(max_num_batched_tokens=4)
    engine.add(make_sequence(10, max_tokens=0, prompt_logprobs=2))
    (events,) = run_to_end(engine).values()
    assert len(events) == 1
    assert events[0].token_ids == ()
    assert events[0].finish_reason is FinishReason.LENGTH
    assert events[0].prompt_logprobs == (None, *(fake_logprobs(token, 2) for token in range(1, 10)))


def test_prompt_logprobs_come_whole_and_once_with_the_first_token() -> None:
    engine = build_engine(max_num_batched_tokens=4)
    engine.add(make_sequence(10, prompt_logprobs=0))
    (events,) = run_to_end(engine).values()
    assert events[0].prompt_logprobs == (None, *(fake_logprobs(token, 0) for token in range(1, 10)))
    assert all(event.prompt_logprobs is None for event in events[1:])


def test_preemption_in_the_middle_of_a_prompt_does_not_repeat_prompt_logprobs() -> None:
    engine = build_engine(num_blocks=11, max_num_batched_tokens=5)
    hungry, scored = make_sequence(3, max_tokens=34), make_sequence(30, first_token=9, prompt_logprobs=1, max_tokens=1)
    engine.add(hungry)
    step(engine)
    engine.add(scored)
    while not scored.num_preemptions:
        step(engine)
        assert scored.num_output_tokens == 0
    assert len(scored.prompt_logprobs) > 1
    events = run_to_end(engine)
    assert events[scored.id][0].prompt_logprobs == (None, *(fake_logprobs(9 + i, 1) for i in range(1, 30)))


def test_a_one_token_prompt_has_one_empty_prompt_logprob() -> None:
    engine = build_engine()
    engine.add(make_sequence(1, prompt_logprobs=0))
    (events,) = run_to_end(engine).values()
    assert events[0].prompt_logprobs == (None,)


def test_logprobs_and_routing_stand_beside_their_token() -> None:
    engine = build_engine(FakeRunner(scripted([3, 4])))
    engine.add(make_sequence(max_tokens=2, logprobs=1))
    (events,) = run_to_end(engine).values()
    assert [event.logprobs for event in events] == [(fake_logprobs(3, 1),), (fake_logprobs(4, 1),)]
    assert all(event.routing == () for event in events)


def test_abort_frees_blocks_and_lease_once_wherever_the_sequence_stands() -> None:
    engine = build_engine(max_num_seqs=1)
    leases = [CountingLease(), CountingLease()]
    running, waiting = (make_sequence(lease=lease) for lease in leases)
    engine.add(running)
    engine.add(waiting)
    step(engine)
    for each in (running, waiting, running):
        engine.abort(each.id)
    events = run_to_end(engine)
    assert [events[each.id][-1].finish_reason for each in (running, waiting)] == [FinishReason.ABORT] * 2
    assert [lease.num_releases for lease in leases] == [1, 1]
    engine.abort(running.id)
    assert not engine.has_work
