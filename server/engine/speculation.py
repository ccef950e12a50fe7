"""Which rows of a step get drafts, and what becomes of them. No torch here."""

from server.engine.block_pool import BlockPool
from server.engine.drafts import Drafter
from server.engine.output import may_end
from server.engine.sequence import ScheduledSequence, Sequence, StepOutput

MAX_SPECULATIVE_TOKENS = 16
"""Tokens of a step up to which it gets drafts: a few cost hardly more than one, for which all weights must be read too;
with more, the products themselves take the time, and a wrong draft is paid for."""


class Speculation:
    """Adds at most `limit` drafts to a row; 0 turns it off. `longest`: most tokens of a sequence with its prompt."""

    def __init__(self, pool: BlockPool, limit: int, longest: int) -> None:
        self._pool = pool
        self._limit = limit
        self._longest = longest

    def with_drafts(self, rows: list[ScheduledSequence], budget: int, *, num_running: int) -> list[ScheduledSequence]:
        """The rows, with at most `budget` guesses in all where the next token needs nothing but the greatest logit.

        Nobody loses blocks for a guess, and none is made that could not be taken.
        """
        room = min(budget, MAX_SPECULATIVE_TOKENS - sum(row.num_tokens for row in rows)) if self._limit else 0
        if room <= 0:
            return rows
        drafted = []
        for row in rows:
            sequence = row.sequence
            drafts = self._draft(sequence, room) if row.samples else []
            missing = self._pool.num_missing(sequence.num_tokens + len(drafts), sequence.block_table)
            if missing > self._pool.num_free - num_running:
                drafts, missing = [], 0
            sequence.block_table += self._pool.allocate(missing)
            sequence.draft_token_ids = drafts
            drafted.append(ScheduledSequence(sequence, row.num_tokens + len(drafts)))
            room -= len(drafts)
        return drafted

    def judge(self, row: ScheduledSequence, output: StepOutput) -> int:
        """How many of a row's drafts were wrong; its drafter learns it."""
        if not row.num_drafts or output.error is not None:
            return row.num_drafts
        num_right = len(output.token_ids) - 1
        assert row.sequence.drafter is not None
        row.sequence.drafter.judge(row.num_drafts, num_right, self._limit)
        return row.num_drafts - num_right

    def _draft(self, sequence: Sequence, room: int) -> list[int]:
        most = min(
            room,
            self._limit,
            sequence.params.max_tokens - sequence.num_output_tokens - 1,
            self._longest - sequence.num_tokens - 1,
        )
        if most <= 0 or not sequence.num_output_tokens or not sequence.is_plainly_greedy:
            return []
        drafter = sequence.drafter = sequence.drafter or Drafter()
        drafter.tell(sequence.tokens_between(drafter.num_tokens, sequence.num_tokens))
        drafts = drafter.draft(most)
        # What ends the sequence is said by the step itself, so that nothing behind the end is computed or counted.
        ends = next((place for place, token in enumerate(drafts) if may_end(sequence, token)), len(drafts))
        return drafts[:ends]
