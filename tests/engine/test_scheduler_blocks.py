"""Scheduling rules about blocks: prefix cache, siblings and preemption."""

from typing import Any

import pytest

from server.engine.engine import Engine
from server.engine.sequence import FinishReason, SamplingParams, Sequence, TokenEvent
from server.engine.waiting_queue import TURN
from server.routing.plan_course import PlanCourse, PlanSpan
from server.routing.policy import GatePlan, Policy
from tests.engine.fakes import (
    FakeRunner,
    build_engine,
    last_batch,
    make_sequence,
    run_to_end,
    scripted,
    tokens_of,
)


def step(engine: Engine) -> list[TokenEvent]:
    return engine.step()[0]


# Prefix cache


def test_an_equal_prompt_takes_all_full_blocks_but_the_last_token_from_the_cache() -> None:
    runner = FakeRunner()
    engine = build_engine(runner)
    engine.add(make_sequence(8))
    run_to_end(engine)
    again = make_sequence(8)
    engine.add(again)
    _, stats = engine.step()
    assert last_batch(runner) == {again.id: 4}, "the last of two full blocks holds the token to compute"
    assert (stats.num_cached_tokens, stats.num_prompt_tokens) == (4, 4)
    assert run_to_end(engine)[again.id][-1].num_cached_tokens == 4


def test_output_blocks_are_cached_too() -> None:
    engine = build_engine(FakeRunner(scripted([50, 51, 52, 53])))
    first = make_sequence(6, max_tokens=8)
    engine.add(first)
    run_to_end(engine)
    follow_up = Sequence(1, [*first.token_ids, 1], SamplingParams(max_tokens=1))
    engine.add(follow_up)
    run_to_end(engine)
    assert follow_up.num_cached_tokens == 12  # 13 of 14 tokens were computed: three blocks of four


def test_blocks_are_published_only_after_they_were_computed() -> None:
    runner = FakeRunner()
    engine = build_engine(runner, max_num_batched_tokens=8)
    engine.add(make_sequence(16))
    engine.add(make_sequence(16))
    step(engine)  # 8 tokens of the first
    step(engine)
    second = next(iter(last_batch(runner).items()))
    assert second[1] == 8
    run_to_end(engine)
    assert runner.num_tokens_computed >= 16


@pytest.mark.parametrize(
    "changes",
    [
        {"cache_salt": "mine"},
        {"plan": GatePlan(Policy.PINNED, b"other adapter", weights=((1, 1.0),))},
        {"prompt_logprobs": 0},
        {"first_token": 1},
    ],
    ids=["salt", "plan", "prompt_logprobs", "tokens"],
)
def test_nothing_is_taken_from_the_cache_by(changes: dict[str, Any]) -> None:
    engine = build_engine()
    engine.add(make_sequence(12))
    run_to_end(engine)
    other = make_sequence(12, **changes)
    engine.add(other)
    run_to_end(engine)
    assert other.num_cached_tokens == 0


def test_nothing_is_taken_from_the_cache_where_tokens_follow_another_plan() -> None:
    """A prompt gate's decisions change K/V, and so does where they end."""
    other = GatePlan(Policy.PINNED, b"other adapter", weights=((1, 1.0),))
    engine = build_engine()
    courses = [PlanCourse(()), PlanCourse((PlanSpan(12, other),)), PlanCourse((PlanSpan(3, other),))]
    sequences = [Sequence(id_, list(range(12)), SamplingParams(max_tokens=1), course=course)
                 for id_, course in enumerate([*courses, *courses])]  # fmt: skip
    for sequence in sequences:
        engine.add(sequence)
        run_to_end(engine)
    assert [sequence.num_cached_tokens for sequence in sequences] == [0, 0, 0, 8, 8, 8]


def test_with_prefix_caching_off_nothing_is_reused() -> None:
    runner = FakeRunner()
    engine = build_engine(runner, prefix_caching=False)
    for _ in range(2):
        engine.add(make_sequence(12, max_tokens=1))
        run_to_end(engine)
    assert runner.num_tokens_computed == 24


def test_siblings_wait_for_their_leaders_prompt_and_share_its_blocks() -> None:
    runner = FakeRunner()
    engine = build_engine(runner, max_num_batched_tokens=8)
    leader = make_sequence(17)
    siblings = [make_sequence(17, leader=leader) for _ in range(3)]
    for each in (leader, *siblings):
        engine.add(each)
    assert engine.scheduler.num_waiting == 4
    for _ in range(3):
        step(engine)
        assert engine.scheduler.num_running == 1
        assert engine.scheduler.num_waiting == 3
    assert leader.num_output_tokens == 1
    step(engine)
    assert last_batch(runner) == {each.id: 1 for each in (leader, *siblings)}
    assert {sibling.block_table[0] for sibling in siblings} == {leader.block_table[0]}
    run_to_end(engine)


@pytest.mark.parametrize("end", ["abort", "fail"])
def test_siblings_of_a_leader_that_ended_early_go_on(end: str) -> None:
    engine = build_engine(max_num_batched_tokens=8)
    leader = make_sequence(17)
    siblings = [make_sequence(17, leader=leader) for _ in range(2)]
    for each in (leader, *siblings):
        engine.add(each)
    step(engine)
    if end == "abort":
        engine.abort(leader.id)
    else:
        engine.scheduler.fail([leader.id], "broken")
    events = run_to_end(engine)
    assert all(events[sibling.id][-1].finish_reason is FinishReason.LENGTH for sibling in siblings)


def test_a_sibling_can_be_aborted_while_it_is_held() -> None:
    engine = build_engine(max_num_batched_tokens=8)
    leader = make_sequence(17)
    siblings = [make_sequence(17, leader=leader) for _ in range(2)]
    for each in (leader, *siblings):
        engine.add(each)
    step(engine)
    engine.abort(siblings[0].id)
    assert engine.scheduler.num_waiting == 1
    events = run_to_end(engine)
    assert events[siblings[0].id][-1].finish_reason is FinishReason.ABORT
    assert events[siblings[1].id][-1].finish_reason is FinishReason.LENGTH


# Preemption


def test_the_latest_sequence_is_preempted_and_emits_no_token_twice() -> None:
    runner = FakeRunner(scripted(list(range(20))))
    engine = build_engine(runner, num_blocks=6)  # 5 blocks of 4 tokens
    first, second = make_sequence(7, max_tokens=12), make_sequence(7, first_token=20, max_tokens=8)
    engine.add(first)
    engine.add(second)
    events = run_to_end(engine)
    assert (first.num_preemptions, second.num_preemptions) == (0, 1)
    assert second.num_counted_tokens > 7
    assert tokens_of(events[first.id]) == list(range(12))
    assert tokens_of(events[second.id]) == list(range(8))


def test_a_lower_priority_is_preempted_although_it_came_first() -> None:
    engine = build_engine(num_blocks=6)
    low, high = make_sequence(7, max_tokens=12, priority=1), make_sequence(7, first_token=20, max_tokens=12)
    engine.add(low)
    step(engine)
    engine.add(high)
    run_to_end(engine)
    assert high.num_preemptions == 0
    assert low.num_preemptions >= 1


def test_an_overdue_sequence_is_not_preempted_for_urgent_ones() -> None:
    engine = build_engine(num_blocks=11)  # 10 blocks of 4 tokens, of which each may want 8
    plain = make_sequence(8, max_tokens=24, arrival_s=0)
    engine.add(plain)
    preemptions, num_urgent = [0], 0
    while not plain.is_finished:
        assert num_urgent < 10 * TURN
        if engine.scheduler.num_waiting < 3:
            num_urgent += 1
            engine.add(make_sequence(8, first_token=num_urgent, max_tokens=24, arrival_s=num_urgent, priority=-1))
        step(engine)
        preemptions.append(plain.num_preemptions)
        assert not plain.is_overdue or preemptions[-1] == preemptions[-2]
    assert plain.is_overdue
    assert plain.num_preemptions > 0
    run_to_end(engine)


def test_a_preempted_sequence_resumes_before_new_ones_of_its_priority() -> None:
    runner = FakeRunner()
    engine = build_engine(runner, num_blocks=6)
    first, second = make_sequence(7, max_tokens=12), make_sequence(7, first_token=20, max_tokens=12)
    for each in (first, second):
        engine.add(each)
    while not second.num_preemptions:
        step(engine)
    newcomer = make_sequence(2, first_token=40, arrival_s=0.0)  # even one that claims to be the oldest
    engine.add(newcomer)
    while not second.block_table:
        assert newcomer.num_computed_tokens == 0
        step(engine)
    run_to_end(engine)


def test_a_preempted_sequence_may_be_served_by_the_cache_but_reports_only_its_first_admission() -> None:
    runner = FakeRunner()
    engine = build_engine(runner, num_blocks=8)
    first, second = make_sequence(7, max_tokens=18), make_sequence(11, first_token=20, max_tokens=10)
    for each in (first, second):
        engine.add(each)
    events = run_to_end(engine)
    assert second.num_preemptions == 1
    assert {event.num_cached_tokens for event in events[second.id]} == {0}
    computed = sum(count for batch in runner.batches for id_, count in batch if id_ == second.id)
    assert computed < 2 * (11 + 9), "part of it came back from the cache"
