"""Drafts: where they come from, and that nobody can tell from the tokens whether there were any."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from server.engine.block_pool import BlockPool
from server.engine.drafts import LONGEST_PAUSE, NGRAM, SHORTEST, Drafter
from server.engine.sequence import FinishReason, SamplingParams, ScheduledBatch, ScheduledSequence, Sequence
from server.engine.speculation import MAX_SPECULATIVE_TOKENS, Speculation
from server.errors import EngineError
from tests.engine.fakes import FakeRunner, build_engine, run_to_end, tokens_of

GREEDY = SamplingParams(temperature=0.0, max_tokens=40)


def parrot(sequence: Sequence) -> int:
    """Says 0 to 6 over and over, with a slip at every eleventh token: drafts are right, wrong and cut off."""
    position = sequence.num_output_tokens
    return 20 + position % 5 if position % 11 == 10 else position % 7


def events_of(engine: Any, *sequences: Sequence) -> tuple[dict[int, Any], int, int, int]:
    """Events by sequence, steps, drafts and right drafts."""
    for sequence in sequences:
        engine.add(sequence)
    events: dict[int, Any] = {sequence.id: [] for sequence in sequences}
    num_steps = num_drafted = num_accepted = 0
    while engine.has_work:
        found, stats = engine.step()
        num_steps += 1
        num_drafted += stats.num_drafted_tokens
        num_accepted += stats.num_accepted_tokens
        assert stats.num_generated_tokens == sum(len(event.token_ids) for event in found)
        for event in found:
            events[event.sequence_id].append(event)
    return events, num_steps, num_drafted, num_accepted


def test_a_draft_is_what_followed_the_same_tokens_last_time() -> None:
    drafter = Drafter()
    drafter.tell([1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8])
    assert drafter.draft(8) == [], "3, 6, 7 and 8 have stood there once"
    drafter.tell([1, 2, 3])
    assert drafter.draft(8) == [6, 7]
    assert drafter.draft(1) == [6]


def test_a_text_that_repeats_itself_is_expected_to_go_on() -> None:
    drafter = Drafter()
    drafter.tell([5, 1, 2, 3, 1, 2, 3])
    drafter.judge(2, 2, 8)
    drafter.judge(4, 4, 8)
    assert drafter.draft(8) == [1, 2, 3, 1, 2, 3, 1, 2]


def test_few_tokens_have_no_past() -> None:
    drafter = Drafter()
    for token in range(NGRAM):
        drafter.tell([token])
        assert drafter.draft(8) == []


def test_drafts_grow_while_they_are_right_and_pause_while_they_are_not() -> None:
    drafter = Drafter()
    drafter.tell([0, 1, 2, 3] * 10)
    lengths = []
    for _ in range(4):
        lengths.append(len(drafter.draft(8)))
        drafter.judge(lengths[-1], lengths[-1], 8)
    assert lengths == [SHORTEST, 4, 8, 8]
    drafter.judge(8, 3, 8)
    assert len(drafter.draft(8)) == 3, "as many as were right, at once"
    pauses = []
    for _ in range(7):
        drafter.judge(2, 0, 8)
        pauses.append(next(step for step in range(100) if drafter.draft(8)))
    assert pauses == [1, 2, 4, 8, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]
    drafter.judge(2, 1, 8)
    assert drafter.draft(8), "one right token ends the pauses"


def test_several_tokens_a_step_are_the_tokens_of_several_steps() -> None:
    plain, steps, drafted, _ = events_of(build_engine(FakeRunner(parrot)), Sequence(0, [9], GREEDY))
    assert (steps, drafted) == (40, 0)
    events, fewer, drafted, accepted = events_of(
        build_engine(FakeRunner(parrot), speculative_tokens=4), Sequence(0, [9], GREEDY)
    )
    assert tokens_of(events[0]) == tokens_of(plain[0])
    assert fewer == steps - accepted
    assert 8 <= accepted < drafted


def test_an_end_among_right_drafts_ends_there() -> None:
    """Stop tokens and max_tokens are looked at token by token; what the model would have said next is nobody's."""
    script = [0, 1, 2, 3, 4, 5] * 3 + [0, 1, 2, 3, 50, 5]
    engine = build_engine(FakeRunner(lambda sequence: script[sequence.num_output_tokens]), speculative_tokens=8)
    params = SamplingParams(temperature=0.0, max_tokens=24, stop_token_ids=(50,))
    events, *_ = events_of(engine, Sequence(0, [9], params))
    assert tokens_of(events[0]) == script[:23]
    assert (events[0][-1].finish_reason, events[0][-1].stop_reason) == (FinishReason.STOP, 50)
    for max_tokens in range(1, 24):
        engine = build_engine(FakeRunner(parrot), speculative_tokens=8)
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        events, *_ = events_of(engine, Sequence(0, [0, 1, 2, 3, 4, 5, 6], params))
        assert len(tokens_of(events[0])) == max_tokens
        assert events[0][-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("params", "ends"),
    [({}, True), ({"ignore_eos": True}, False), ({"stop_token_ids": (50,), "ignore_eos": True}, True)],
)
def test_nothing_is_computed_behind_a_token_that_ends_the_sequence(params: dict[str, Any], ends: bool) -> None:
    """The text has the end in it, and something behind, which a draft would go on with, and statistics would count."""
    script = [0, 1, 2, 3, 4, 50, 60, 61, 62, 63]
    engine = build_engine(FakeRunner(lambda sequence: (script * 3)[sequence.num_output_tokens]), speculative_tokens=8)
    sampling = SamplingParams(temperature=0.0, max_tokens=25, **params)
    sequence = Sequence(0, script * 3, sampling, eos_token_ids=frozenset({50}))
    events, _, drafted, accepted = events_of(engine, sequence)
    assert tokens_of(events[0]) == (script * 3)[: 6 if ends else 25]
    assert drafted > 0
    assert len(tokens_of(events[0])) == len(events[0]) + accepted, "every draft that was counted as right was used"


def test_the_context_limit_holds_with_drafts() -> None:
    engine = build_engine(FakeRunner(parrot), speculative_tokens=8, max_model_len=25)
    events, *_ = events_of(engine, Sequence(0, [0, 1, 2, 3, 4, 5, 6], GREEDY))
    assert len(tokens_of(events[0])) == 18


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0, "seed": 3},
        {"logprobs": 0},
        {"repetition_penalty": 1.1},
        {"logit_bias": ((3, 1.0),)},
        {"min_tokens": 40},
    ],
)
def test_only_what_is_plainly_greedy_gets_drafts(params: dict[str, Any]) -> None:
    engine = build_engine(FakeRunner(parrot), speculative_tokens=8)
    sequence = Sequence(
        0, [9], SamplingParams(**{"temperature": 0.0, "max_tokens": 40, **params}), eos_token_ids=frozenset({63})
    )
    _, steps, drafted, _ = events_of(engine, sequence)
    assert (steps, drafted) == (40, 0)


def test_a_full_step_gets_no_drafts() -> None:
    runner = FakeRunner(parrot)
    engine = build_engine(runner, num_blocks=400, max_num_seqs=MAX_SPECULATIVE_TOKENS, speculative_tokens=8)
    events_of(engine, *(Sequence(index, [index], GREEDY) for index in range(MAX_SPECULATIVE_TOKENS)))
    assert all(sum(count for _, count in rows) <= MAX_SPECULATIVE_TOKENS for rows in runner.batches)
    runner = FakeRunner(parrot)
    engine = build_engine(runner, num_blocks=400, speculative_tokens=8)
    _, steps, drafted, _ = events_of(engine, *(Sequence(index, [index], GREEDY) for index in range(4)))
    assert max(sum(count for _, count in rows) for rows in runner.batches) <= MAX_SPECULATIVE_TOKENS
    assert drafted > 0
    assert steps < 40


def test_nobody_loses_blocks_for_a_draft() -> None:
    """A pool that just holds all tokens: without drafts nothing is preempted, and so with them."""
    sequences = [Sequence(index, [index], SamplingParams(temperature=0.0, max_tokens=19)) for index in range(4)]
    engine = build_engine(FakeRunner(parrot), num_blocks=4 * 5 + 1, speculative_tokens=8)
    for sequence in sequences:
        engine.add(sequence)
    num_preempted = 0
    while engine.has_work:
        num_preempted += engine.step()[1].num_preempted
    assert num_preempted == 0


@pytest.mark.parametrize(("num_free", "gets_drafts"), [(2, False), (3, True)])
def test_drafts_leave_a_block_for_every_running_sequence(num_free: int, gets_drafts: bool) -> None:
    sequence = Sequence(0, [9], GREEDY)
    sequence.output_token_ids = [position % 7 for position in range(14)]
    sequence.num_computed_tokens = 14
    pool = BlockPool(1 + 4 + num_free, 4)
    sequence.block_table = pool.allocate(4)  # of 16 tokens; with drafts it has 17 or more
    rows = Speculation(pool, 8, 100).with_drafts([ScheduledSequence(sequence, 1)], 64, num_running=2)
    assert bool(rows[0].num_drafts) is gets_drafts
    assert pool.num_free == num_free - gets_drafts


def test_drafts_of_a_step_that_failed_are_forgotten() -> None:
    """The error is another's; behind it a long prompt fills the steps, so that there is no room for drafts."""
    rows: list[tuple[int, int]] = []
    num_errors = 0

    def fail(batch: ScheduledBatch) -> Exception | None:
        nonlocal num_errors
        rows.extend((row.num_tokens, row.num_drafts) for row in batch.rows)
        if num_errors or not batch.rows[0].num_drafts:
            return None
        num_errors += 1
        return EngineError("the other's", sequence_ids=[1])

    engine = build_engine(FakeRunner(parrot, fail=fail), speculative_tokens=4, max_num_batched_tokens=32)
    for index in range(2):
        engine.add(Sequence(index, [9], GREEDY))
    while not num_errors:
        engine.step()
    engine.add(Sequence(2, [8] * 60, GREEDY))
    run_to_end(engine)
    assert all(num_drafts < num_tokens for num_tokens, num_drafts in rows)


@hypothesis_settings(max_examples=60)
@given(
    workload=st.lists(
        st.tuples(st.integers(1, 20), st.integers(0, 30), st.sampled_from((0, 0, -1)), st.sampled_from((1, 1, 2))),
        min_size=1,
        max_size=6,
    ),
    limits=st.fixed_dictionaries(
        {
            "num_blocks": st.integers(15, 40),
            "max_num_seqs": st.integers(1, 6),
            "max_num_batched_tokens": st.integers(1, 24),
            "prefix_caching": st.booleans(),
            "max_model_len": st.sampled_from((33, 56)),
            "speculative_tokens": st.integers(1, 8),
        }
    ),
)
def test_drafts_never_change_a_token(workload: list[tuple[int, int, int, int]], limits: dict[str, Any]) -> None:
    """Batched, chunked, preempted and cached, against each alone without drafts; the fake runner watches the K/V."""

    def build(index: int) -> Sequence:
        length, max_tokens, priority, step = workload[index]
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, stop_token_ids=(23,))
        return Sequence(index, [t * step % 7 for t in range(length)], params, priority=priority)

    engine = build_engine(FakeRunner(parrot), **limits)
    for index in range(len(workload)):
        engine.add(build(index))
    together = run_to_end(engine)
    longest = min(limits["max_model_len"], 4 * (limits["num_blocks"] - 1))
    for index in range(len(workload)):
        engine = build_engine(FakeRunner(parrot), num_blocks=99, max_model_len=longest)
        engine.add(build(index))
        alone = run_to_end(engine)[index]
        assert tokens_of(together[index]) == tokens_of(alone)
        assert together[index][-1].finish_reason is alone[-1].finish_reason
        assert together[index][-1].stop_reason == alone[-1].stop_reason
