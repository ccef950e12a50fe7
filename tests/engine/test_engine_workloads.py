"""Random workloads on tiny pools: whatever is batched, chunked, preempted or cached, each sequence is as if alone.

The fake runner checks in every step that each sequence reads only K/V of its own prefix, plan and salt.
"""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from server.engine.sequence import FinishReason, SamplingParams, ScheduledBatch, Sequence, TokenEvent
from server.errors import EngineError
from server.routing.policy import BASE_PLAN, GatePlan, Policy
from tests.engine.fakes import CountingLease, FakeRunner, build_engine, run_to_end, tokens_of

PLANS = (BASE_PLAN, GatePlan(Policy.PINNED, b"one", weights=((1, 1.0),)))
MAX_TOKENS_OF_POOL = 40  # 10 blocks of 4

requests = st.fixed_dictionaries(
    {
        # Few distinct prompts that share prefixes, so that the cache is hit.
        "prompt": st.tuples(st.integers(0, 2), st.integers(1, 24)),
        "plan": st.integers(0, 1),
        "salt": st.sampled_from((None, None, "salt")),
        "priority": st.sampled_from((0, 0, 0, -1, 1)),
        "max_tokens": st.integers(0, 14),
        "min_tokens": st.integers(0, 6),
        "temperature": st.sampled_from((0.0, 1.0)),
        "seed": st.integers(0, 3),
        "prompt_logprobs": st.sampled_from((None, None, None, 1)),
        "arrives": st.integers(0, 25),
        "n": st.sampled_from((1, 1, 1, 3)),
        "aborted_after": st.sampled_from((None, None, None, 1, 4)),
    }
)
limits = st.fixed_dictionaries(
    {
        "max_num_seqs": st.integers(1, 6),
        "max_num_batched_tokens": st.integers(1, 24),
        "prefix_caching": st.booleans(),
        "max_model_len": st.sampled_from((33, 100)),
    }
)


def build(request: dict[str, Any], first_id: int) -> list[Sequence]:
    head, length = request["prompt"]
    sequences: list[Sequence] = []
    for index in range(request["n"]):
        params = SamplingParams(
            temperature=request["temperature"],
            seed=request["seed"] + index,
            max_tokens=request["max_tokens"],
            min_tokens=request["min_tokens"],
            prompt_logprobs=request["prompt_logprobs"],
            stop_token_ids=(11, 12),
            logprobs=0,
        )
        sequence = Sequence(
            first_id + index,
            [head, *range(length - 1)],
            params,
            plan=PLANS[request["plan"]],
            lease=CountingLease(),
            priority=request["priority"],
            cache_salt=request["salt"],
            eos_token_ids=frozenset({13}),
            leader=sequences[0] if sequences else None,
        )
        sequences.append(sequence)
    return sequences


def essence(events: list[TokenEvent]) -> tuple[Any, ...]:
    """What a client sees of a sequence, however it was scheduled."""
    prompt_logprobs = [event.prompt_logprobs for event in events if event.prompt_logprobs is not None]
    logprobs = [logprob for event in events for logprob in event.logprobs]
    return tokens_of(events), logprobs, prompt_logprobs, events[-1].finish_reason, events[-1].stop_reason


def alone(request: dict[str, Any], index: int, max_model_len: int) -> tuple[Any, ...]:
    """The same sequence with nobody beside it, in one prefill, without a cache, and plenty of blocks."""
    sequence = build({**request}, 0)[index]
    sequence.leader = None
    length = min(max_model_len, MAX_TOKENS_OF_POOL)
    engine = build_engine(num_blocks=99, max_num_batched_tokens=512, max_model_len=length, prefix_caching=False)
    engine.add(sequence)
    return essence(run_to_end(engine)[sequence.id])


@hypothesis_settings(max_examples=120)
@given(workload=st.lists(requests, min_size=1, max_size=9), limits=limits)
def test_alone_equals_batched_chunked_preempted_and_cached(
    workload: list[dict[str, Any]], limits: dict[str, Any]
) -> None:
    engine = build_engine(FakeRunner(), num_blocks=MAX_TOKENS_OF_POOL // 4 + 1, **limits)
    groups = [build(request, 10 * position) for position, request in enumerate(workload)]
    pending = sorted(zip(workload, groups, strict=True), key=lambda pair: pair[0]["arrives"])
    events: dict[int, list[TokenEvent]] = {}
    for clock in range(3000):
        while pending and pending[0][0]["arrives"] <= clock:
            for sequence in pending.pop(0)[1]:
                engine.add(sequence)
        for request, group in zip(workload, groups, strict=True):
            if request["aborted_after"] is not None and clock == request["arrives"] + request["aborted_after"]:
                engine.abort(group[-1].id)
        for event in engine.step()[0] if engine.has_work else []:
            events.setdefault(event.sequence_id, []).append(event)
        if not pending and not engine.has_work:
            break
    assert not run_to_end(engine)
    for request, group in zip(workload, groups, strict=True):
        for index, sequence in enumerate(group):
            found = events[sequence.id]
            assert sum(event.finish_reason is not None for event in found) == 1
            assert isinstance(sequence.lease, CountingLease)
            assert sequence.lease.num_releases == 1
            expected = alone(request, index, limits["max_model_len"])
            if found[-1].finish_reason is FinishReason.ABORT:
                assert tokens_of(found) == expected[0][: len(tokens_of(found))]
            else:
                assert essence(found) == expected


def test_the_workloads_do_preempt_and_hit_the_cache() -> None:
    """Guards the test above: a seeded workload of its shape exercises what it is about."""
    rng = random.Random(0)
    engine = build_engine(FakeRunner(), num_blocks=11, max_num_seqs=6, max_num_batched_tokens=12)
    for index in range(12):
        prompt = [index % 3, *range(rng.randint(4, 12))]
        engine.add(Sequence(index, prompt, SamplingParams(temperature=0, max_tokens=12)))
    num_preempted = num_cached = 0
    while engine.has_work:
        _, stats = engine.step()
        num_preempted += stats.num_preempted
        num_cached += stats.num_cached_tokens
    assert num_preempted >= 3
    assert num_cached > 10


@pytest.mark.parametrize("seed", range(5))
def test_failing_steps_end_their_own_sequences_only_and_leak_nothing(seed: int) -> None:
    rng = random.Random(seed)

    def fail(batch: ScheduledBatch) -> Exception | None:
        draw = rng.random()
        if draw < 0.05:
            return RuntimeError("batch")
        return EngineError("row", sequence_ids=[batch.rows[-1].sequence.id]) if draw < 0.15 else None

    runner = FakeRunner(fail=fail, row_error=lambda _: "poisoned" if rng.random() < 0.02 else None)
    engine = build_engine(runner, num_blocks=11, max_num_seqs=4, max_num_batched_tokens=9)
    sequences = {
        index: Sequence(
            index,
            [index % 3, *range(rng.randint(0, 20))],
            SamplingParams(temperature=1.0, seed=index, max_tokens=8),
            lease=CountingLease(),
        )
        for index in range(30)
    }
    for sequence in sequences.values():
        engine.add(sequence)
    events = run_to_end(engine)
    reasons = {index: found[-1].finish_reason for index, found in events.items()}
    assert set(reasons) == set(sequences)
    assert set(reasons.values()) == {FinishReason.ERROR, FinishReason.LENGTH}
    for index, sequence in sequences.items():
        assert isinstance(sequence.lease, CountingLease)
        assert sequence.lease.num_releases == 1
        if reasons[index] is FinishReason.LENGTH:
            engine = build_engine(num_blocks=99)
            twin = Sequence(0, list(sequence.prompt_token_ids), sequence.params)
            engine.add(twin)
            assert tokens_of(run_to_end(engine)[0]) == tokens_of(events[index])
