"""Who computes how many tokens in the next step, and what a step's results mean for each sequence. No torch here.

Knows sequences and blocks; not the model, threads or text. There is no prefill or decode state: a sequence has tokens,
some of them computed, and a step computes the next few of them.
"""

from bisect import insort
from collections.abc import Iterable
from collections.abc import Sequence as ListLike
from dataclasses import dataclass

from server.engine.block_pool import BlockPool, block_hash, root_hash
from server.engine.output import collect_prompt_logprobs, event_of, take
from server.engine.sequence import (
    FinishReason,
    ScheduledBatch,
    ScheduledSequence,
    Sequence,
    SequenceStatus,
    StepOutput,
    TokenEvent,
)
from server.engine.speculation import Speculation
from server.engine.waiting_queue import WaitingQueue, urgency
from server.errors import ContextLengthError, InvalidRequestError


@dataclass(frozen=True)
class SchedulerLimits:
    """Budgets of one step and of one sequence; see `config.ServerSettings` for the fields of the same name."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    """Most tokens of prompt plus output."""
    prefix_caching: bool = True
    speculative_tokens: int = 0
    """Most drafts of one sequence in one step; 0: none."""


class Scheduler:
    """Waiting queue, running list and the rules between them.

    Blocks for all known tokens of a sequence are taken when it is admitted, so only output can run out of blocks; then
    the last of the running sequences gives its blocks back and is computed anew later (its K/V only: tokens already
    sampled stay). Since the first of the running ones is preempted last and fits alone, it always progresses. Others
    may be more urgent, but who has waited longest is overdue in time (`WaitingQueue`), and then goes before them.
    """

    def __init__(self, limits: SchedulerLimits, pool: BlockPool) -> None:
        self._limits = limits
        self._pool = pool
        # One token a step is the least a running sequence needs: more sequences than tokens would starve some.
        self.max_num_seqs = min(limits.max_num_seqs, limits.max_num_batched_tokens)
        self._sequences: dict[int, Sequence] = {}
        self._running: list[Sequence] = []  # by (urgency, arrival): the last one is preempted first
        self._waiting = WaitingQueue()
        self._speculation = Speculation(pool, limits.speculative_tokens, self.max_sequence_tokens)
        self._num_preempted = 0
        self._num_cached_tokens = 0

    @property
    def max_sequence_tokens(self) -> int:
        """Longest prompt plus output that a sequence can reach: the model's limit or what the whole pool holds."""
        return min(self._limits.max_model_len, self._pool.num_usable * self._pool.block_size)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens plus max_tokens of the sequences that wait."""
        return self._waiting.num_tokens

    @property
    def sequence_ids(self) -> tuple[int, ...]:
        """Every sequence that was added and has not ended."""
        return tuple(self._sequences)

    @property
    def kv_usage_ratio(self) -> float:
        return self._pool.usage_ratio

    def check_fits(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Raise InvalidRequestError for an empty prompt, ContextLengthError for one that leaves no room for output."""
        if num_prompt_tokens == 0:
            raise InvalidRequestError("the prompt has no tokens; send at least one", param="prompt")
        room = self.max_sequence_tokens - (1 if max_tokens > 0 else 0)
        if num_prompt_tokens > room:
            message = f"the prompt has {num_prompt_tokens} tokens, but at most {room} fit; shorten it"
            raise ContextLengthError(message, param="prompt")

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. Raises what `check_fits` raises, and then its lease stays the caller's."""
        self.check_fits(sequence.num_prompt_tokens, sequence.params.max_tokens)
        self._sequences[sequence.id] = sequence
        leader = self._sequences.get(sequence.leader.id) if sequence.leader is not None else None
        if leader is not None and _is_in_prompt(leader) and self._reads_cache(sequence):
            self._waiting.hold(sequence, leader)
        else:
            self._waiting.push(sequence)

    def abort(self, sequence_id: int) -> TokenEvent | None:
        """End a sequence at its client's wish. None if it has ended already."""
        sequence = self._sequences.get(sequence_id)
        return (
            None if sequence is None else self._finish(sequence, event_of(sequence, finish_reason=FinishReason.ABORT))
        )

    def fail(self, sequence_ids: Iterable[int], error: str) -> list[TokenEvent]:
        """End sequences because of an error; those that have ended already are skipped."""
        live = [self._sequences[id_] for id_ in sequence_ids if id_ in self._sequences]
        return [self._finish(seq, event_of(seq, finish_reason=FinishReason.ERROR, error=error)) for seq in live]

    def schedule(self) -> ScheduledBatch:
        """Choose the next step's rows and give them blocks: decodes, then running prompts, then new admissions."""
        self._num_preempted = self._num_cached_tokens = 0
        for sequence in self._running:
            sequence.draft_token_ids = []  # a step that failed may have left some
        rows: list[ScheduledSequence] = []
        budget = self._limits.max_num_batched_tokens
        # A stable sort: by rank within the decodes and within the prompts.
        for sequence in sorted(self._running, key=lambda sequence: sequence.num_uncomputed_tokens > 1):
            num_tokens = min(sequence.num_uncomputed_tokens, budget)
            # Preempted ones are no longer running. They are never in `rows`: they rank behind the one that grew, and
            # prompts, which come later, do not grow.
            if sequence.status is SequenceStatus.RUNNING and num_tokens > 0 and self._grow(sequence, num_tokens):
                rows.append(ScheduledSequence(sequence, num_tokens))
                budget -= num_tokens
        while budget > 0 and (admitted := self._admit_next()) is not None:
            rows.append(ScheduledSequence(admitted, min(admitted.num_uncomputed_tokens, budget)))
            budget -= rows[-1].num_tokens
        rows = self._speculation.with_drafts(rows, budget, num_running=len(self._running))
        return ScheduledBatch(tuple(rows), self._num_preempted, self._num_cached_tokens)

    def update(self, batch: ScheduledBatch, outputs: ListLike[StepOutput]) -> list[TokenEvent]:
        """Apply a step's outputs, one per row: record K/V as computed, append tokens, end what is finished."""
        assert len(outputs) == len(batch.rows), "the runner answers every row"
        events = []
        for row, output in zip(batch.rows, outputs, strict=True):
            samples, sequence = row.samples, row.sequence
            num_computed = row.num_tokens - self._speculation.judge(row, output)
            sequence.draft_token_ids = []
            if output.error is not None:  # its K/V of this step may be unusable: nothing is published
                events += self.fail([sequence.id], output.error)
                continue
            collect_prompt_logprobs(sequence, output)
            event = take(sequence, output, self.max_sequence_tokens) if samples else None
            # What an end has cut off is not known, whether or not it was computed.
            self._mark_computed(sequence, min(num_computed, sequence.num_uncomputed_tokens))
            if event is not None:
                events.append(event if event.finish_reason is None else self._finish(sequence, event))
        return events

    # Blocks

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make the block table cover the next tokens, preempting from the back. False: `sequence` itself had to go."""
        missing = self._pool.num_missing(sequence.num_computed_tokens + num_tokens, sequence.block_table)
        while missing > self._pool.num_free:
            last = self._running[-1]
            self._preempt(last)
            if last is sequence:
                return False
        sequence.block_table += self._pool.allocate(missing)
        return True

    def _admit_next(self) -> Sequence | None:
        """Move the first waiting sequence to the running ones, with blocks for all its known tokens, if it fits now."""
        sequence = self._waiting.first
        if sequence is None or len(self._running) >= self.max_num_seqs:
            return None
        hits = self._cached_prefix(sequence)
        missing = self._pool.num_missing(sequence.num_tokens, hits)
        # Each running sequence may want a block soon: without this headroom a newcomer would often be preempted at
        # once. With nothing running all blocks are free, and `check_fits` has seen that it fits.
        if self._running and missing + len(self._running) > self._pool.num_free - self._pool.num_free_among(hits):
            return None
        self._pool.acquire(hits)
        sequence.block_table = hits + self._pool.allocate(missing)
        sequence.num_computed_tokens = len(hits) * self._pool.block_size
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self._num_cached_tokens += sequence.num_cached_tokens
        self._waiting.admit_first()
        sequence.status = SequenceStatus.RUNNING
        insort(self._running, sequence, key=_rank)
        return sequence

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        sequence.num_counted_tokens = max(sequence.num_counted_tokens, sequence.num_computed_tokens)
        self._free_blocks(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_preemptions += 1
        self._waiting.push(sequence)
        self._num_preempted += 1

    def _free_blocks(self, sequence: Sequence) -> None:
        self._pool.free(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed_tokens = 0

    # Prefix cache

    def _reads_cache(self, sequence: Sequence) -> bool:
        """Prompt logprobs need every prompt position computed; once they are complete, the cache may serve a resume."""
        wants_positions = sequence.params.prompt_logprobs is not None
        has_positions = len(sequence.prompt_logprobs) == sequence.num_prompt_tokens
        return self._limits.prefix_caching and (not wants_positions or has_positions)

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        """Cached blocks of the longest known prefix, short of the last token: that one is always computed."""
        if not self._reads_cache(sequence):
            return []
        num_blocks = (sequence.num_tokens - 1) // self._pool.block_size
        return self._pool.match(self._hashes(sequence, num_blocks)[:num_blocks])

    def _hashes(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        """Content hashes of at least the first `num_blocks` full blocks; each is computed once per sequence."""
        hashes, size = sequence.block_hashes, self._pool.block_size
        for index in range(len(hashes), num_blocks):
            parent = hashes[-1] if hashes else root_hash(sequence.plan.fingerprint, sequence.cache_salt)
            tokens = sequence.tokens_between(index * size, (index + 1) * size)
            hashes.append(block_hash(parent, tokens, sequence.gates_between(index * size, (index + 1) * size)))
        return hashes

    def _mark_computed(self, sequence: Sequence, num_tokens: int) -> None:
        """Count tokens as computed, publish the blocks they filled, and let siblings go when a prompt is complete."""
        first_block = sequence.num_computed_tokens // self._pool.block_size
        sequence.num_computed_tokens += num_tokens
        if self._limits.prefix_caching:
            num_full = sequence.num_computed_tokens // self._pool.block_size
            hashes = self._hashes(sequence, num_full)
            for index in range(first_block, num_full):
                self._pool.publish(sequence.block_table[index], hashes[index])
        if not _is_in_prompt(sequence):
            self._waiting.let_go(sequence)

    def _finish(self, sequence: Sequence, event: TokenEvent) -> TokenEvent:
        """The one place where a sequence ends, whatever the reason: frees its blocks, releases its lease."""
        del self._sequences[sequence.id]
        (self._running if sequence.status is SequenceStatus.RUNNING else self._waiting).remove(sequence)
        self._free_blocks(sequence)
        sequence.status = SequenceStatus.FINISHED
        self._waiting.let_go(sequence)
        sequence.lease.release()
        return event


def _rank(sequence: Sequence) -> tuple[float, float, int]:
    return urgency(sequence), sequence.arrival_s, sequence.id


def _is_in_prompt(sequence: Sequence) -> bool:
    return sequence.num_computed_tokens < sequence.num_prompt_tokens
