"""Scripted stand-ins for what surrounds the engine: a runner that checks the scheduler's work, and a counting lease."""

import itertools
import threading
import time
import zlib
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from typing import Any

from server.engine.block_pool import BlockPool
from server.engine.engine import Engine
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.sequence import (
    RunResult,
    SamplingParams,
    ScheduledBatch,
    ScheduledSequence,
    Sequence,
    StepOutput,
    TokenEvent,
    TokenLogprobs,
    TokenRouting,
)
from server.engine.step_stats import RoutingStats

VOCAB_SIZE = 64


def hashed_token(sequence: Sequence) -> int:
    """A token that depends on all tokens, the plan, and on the sequence's own random numbers when it is seeded."""
    content = repr((sequence.token_ids, sequence.plan.fingerprint)).encode()
    drawn = sequence.rng.random() if sequence.params.temperature > 0 and sequence.params.seed is not None else 0.0
    return (zlib.crc32(content) + int(drawn * 1e6)) % VOCAB_SIZE


def scripted(token_ids: ListLike[int]) -> Callable[[Sequence], int]:
    """`next_token` that emits these tokens, over and over, to every sequence."""
    return lambda sequence: token_ids[sequence.num_output_tokens % len(token_ids)]


class FakeRunner:
    """A `Runner` without a model, which remembers what every K/V slot holds and refuses to read anything else.

    `next_token` decides what is sampled. `delay_s` is slept in every step; while `gate` is not set, steps block.
    `fail` may return an exception to raise for a batch, `row_error` an error for one row.
    """

    def __init__(
        self,
        next_token: Callable[[Sequence], int] = hashed_token,
        *,
        block_size: int = 4,
        delay_s: float = 0.0,
        fail: Callable[[ScheduledBatch], BaseException | None] = lambda _: None,
        row_error: Callable[[Sequence], str | None] = lambda _: None,
        routing: Callable[[Sequence], TokenRouting] | None = None,
        stats: RoutingStats | None = None,
    ) -> None:
        self.next_token = next_token
        self.block_size = block_size
        self.delay_s = delay_s
        self.fail = fail
        self.row_error = row_error
        self.routing = routing
        self.stats = stats or RoutingStats()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        """Set when a step has begun."""
        self.batches: list[list[tuple[int, int]]] = []
        """Per step, (sequence id, tokens) of every row."""
        self.threads: set[int] = set()
        self._written: dict[tuple[int, int], int] = {}

    def run(self, batch: ScheduledBatch) -> RunResult:
        self.threads.add(threading.get_ident())
        self.batches.append([(row.sequence.id, row.num_tokens) for row in batch.rows])
        self.entered.set()
        assert self.gate.wait(timeout=30), "a test closed the gate and never opened it"
        if self.delay_s:
            time.sleep(self.delay_s)
        self._check_tables(batch)
        for row in batch.rows:
            self._write(row)
        if (error := self.fail(batch)) is not None:
            raise error
        return RunResult([self._output(row) for row in batch.rows], self.stats)

    @property
    def num_tokens_computed(self) -> int:
        return sum(count for rows in self.batches for _, count in rows)

    def _check_tables(self, batch: ScheduledBatch) -> None:
        assert batch.rows, "an empty batch is not run"
        ids = [row.sequence.id for row in batch.rows]
        assert len(set(ids)) == len(ids), "a sequence stands in the batch twice"
        holders: dict[int, int] = {}
        for row in batch.rows:
            table = row.sequence.block_table
            assert 0 not in table, "the scratch block is nobody's"
            assert len(set(table)) == len(table), "a block stands in a table twice"
            for block in table:
                holders[block] = holders.get(block, 0) + 1
        for row in batch.rows:
            start = row.sequence.num_computed_tokens
            stop = start + row.num_tokens
            assert row.num_tokens > 0, "a row computes something"
            num_tokens = row.sequence.num_tokens + len(row.sequence.draft_token_ids)
            assert stop <= num_tokens, "only known and drafted tokens are computed"
            assert stop <= len(row.sequence.block_table) * self.block_size, "the block table covers the tokens"
            for index in range(start // self.block_size, (stop - 1) // self.block_size + 1):
                assert holders[row.sequence.block_table[index]] == 1, "a block that is written is in one table only"

    def _write(self, row: ScheduledSequence) -> None:
        """Write content at the new positions; it depends on the whole prefix, as K/V does. Check what is read."""
        sequence = row.sequence
        content = zlib.crc32(repr((sequence.plan.fingerprint, sequence.cache_salt)).encode())
        for position, token in enumerate(sequence.tokens_between(0, sequence.num_computed_tokens + row.num_tokens)):
            content = zlib.crc32(repr((position, token)).encode(), content)
            slot = sequence.block_table[position // self.block_size], position % self.block_size
            if position >= sequence.num_computed_tokens:
                self._written[slot] = content
            assert self._written.get(slot) == content, f"position {position} reads K/V of something else"

    def _output(self, row: ScheduledSequence) -> StepOutput:
        sequence = row.sequence
        if (error := self.row_error(sequence)) is not None:
            return StepOutput(error=error)
        scored: tuple[TokenLogprobs, ...] = ()
        if (num_top := sequence.params.prompt_logprobs) is not None:
            start = sequence.num_computed_tokens + 1
            targets = sequence.prompt_token_ids[start : start + row.num_tokens]
            scored = tuple(fake_logprobs(token, num_top) for token in targets)
        if not row.samples:
            return StepOutput(prompt_logprobs=scored)
        said = self._said(sequence)
        num_top = sequence.params.logprobs
        return StepOutput(
            token_ids=tuple(said),
            logprobs=None if num_top is None else fake_logprobs(said[0], num_top),
            routing=(self.routing(sequence),) * len(said) if self.routing and sequence.params.trace_routing else (),
            prompt_logprobs=scored,
        )

    def _said(self, sequence: Sequence) -> list[int]:
        """The next token, and those behind drafts that are right."""
        said = [self.next_token(sequence)]
        for draft in sequence.draft_token_ids:
            if draft != said[-1]:
                break
            sequence.output_token_ids.append(draft)
            said.append(self.next_token(sequence))
        del sequence.output_token_ids[sequence.num_output_tokens - len(said) + 1 :]
        return said


def fake_logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    """The token itself is likeliest, its successors follow."""
    top = tuple(((token_id + offset) % VOCAB_SIZE, -0.5 - offset) for offset in range(num_top))
    return TokenLogprobs(token_id, -0.5, top, rank=1)


class CountingLease:
    """Counts releases: exactly one is right."""

    def __init__(self) -> None:
        self.num_releases = 0

    def release(self) -> None:
        self.num_releases += 1


def build_engine(runner: FakeRunner | None = None, *, num_blocks: int = 65, **limits: int | bool) -> Engine:
    """An engine over a fresh pool of `num_blocks` - 1 usable blocks; `limits` override generous defaults."""
    runner = runner or FakeRunner()
    defaults: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 128}
    pool = BlockPool(num_blocks, runner.block_size)
    return Engine(Scheduler(SchedulerLimits(**{**defaults, **limits}), pool), runner)


def run_to_end(engine: Engine, max_steps: int = 5000) -> dict[int, list[TokenEvent]]:
    """Step until nothing is left; events by sequence, each list ending with its only terminal event."""
    events: dict[int, list[TokenEvent]] = {}
    for _ in range(max_steps):
        if not engine.has_work:
            break
        for event in engine.step()[0]:
            events.setdefault(event.sequence_id, []).append(event)
    assert not engine.has_work, "the engine makes no progress"
    for found in events.values():
        assert [event.finish_reason is not None for event in found] == [False] * (len(found) - 1) + [True]
    assert engine.scheduler.kv_usage_ratio == 0
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting, engine.scheduler.waiting_tokens) == (0, 0, 0)
    return events


def tokens_of(events: ListLike[TokenEvent]) -> list[int]:
    """All tokens of one sequence's events."""
    return [token for event in events for token in event.token_ids]


_sequence_ids = itertools.count(1000)


def make_sequence(num_prompt: int = 6, *, first_token: int = 0, **fields: Any) -> Sequence:
    """A greedy sequence with a prompt of counting tokens; keyword arguments go to params or to the sequence."""
    names = SamplingParams.__dataclass_fields__
    params = {"temperature": 0.0, "max_tokens": 4, **{k: v for k, v in fields.items() if k in names}}
    others = {k: v for k, v in fields.items() if k not in names}
    prompt = [(first_token + position) % 64 for position in range(num_prompt)]
    return Sequence(next(_sequence_ids), prompt, SamplingParams(**params), **others)


def last_batch(runner: FakeRunner) -> dict[int, int]:
    """Tokens per sequence id in the latest step."""
    return dict(runner.batches[-1])
