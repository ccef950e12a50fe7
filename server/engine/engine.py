"""One step at a time: schedule, run the model, update. Not thread-safe: `AsyncEngine` calls it from its one thread.

Knows no asyncio and no text.
"""

import logging
import time

from server.engine.layout import num_recomputed
from server.engine.scheduler import Scheduler
from server.engine.sequence import Runner, RunResult, ScheduledBatch, Sequence, TokenEvent
from server.engine.step_stats import RoutingStats, StepStats
from server.errors import EngineError

logger = logging.getLogger(__name__)


class Engine:
    """A scheduler and a model runner, and what happens when the latter fails."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self.scheduler = scheduler
        self._runner = runner
        self._unreported: list[TokenEvent] = []  # terminal events of aborts, for the next step

    @property
    def has_work(self) -> bool:
        """Whether `step` would compute or report anything."""
        return bool(self._unreported) or self.scheduler.num_running + self.scheduler.num_waiting > 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises InvalidRequestError or ContextLengthError; then its lease stays the caller's."""
        self.scheduler.add(sequence)

    def abort(self, sequence_id: int) -> None:
        """End a sequence; its terminal event comes with the next step. No-op if it has ended already."""
        event = self.scheduler.abort(sequence_id)
        if event is not None:
            self._unreported.append(event)

    def fail_all(self, error: str) -> list[TokenEvent]:
        """End every sequence with `error`; returns all terminal events that no step has reported."""
        events, self._unreported = self._unreported, []
        return events + self.scheduler.fail(self.scheduler.sequence_ids, error)

    def step(self) -> tuple[list[TokenEvent], StepStats]:
        """Compute the next tokens of as many sequences as fit. Never raises because of what the runner did."""
        started_s = time.perf_counter()
        events, self._unreported = self._unreported, []
        batch = self.scheduler.schedule()
        num_prompt_tokens = num_drafted = num_accepted = 0
        routing = RoutingStats()
        if batch.rows:
            try:
                result = self._runner.run(batch)
            except Exception as error:  # whatever it is, it must not take the other requests down
                events += self._fail(batch, error)
            else:
                num_prompt_tokens, routing = _num_prompt_tokens(batch), result.routing
                num_drafted, num_accepted = _num_drafts(batch, result)
                events += self.scheduler.update(batch, result.outputs)
        stats = StepStats(
            step_s=time.perf_counter() - started_s,
            num_prompt_tokens=num_prompt_tokens,
            num_generated_tokens=sum(len(event.token_ids) for event in events),
            num_cached_tokens=batch.num_cached_tokens,
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            num_preempted=batch.num_preempted,
            kv_usage_ratio=self.scheduler.kv_usage_ratio,
            num_drafted_tokens=num_drafted,
            num_accepted_tokens=num_accepted,
            routing=routing,
        )
        return events, stats

    def _fail(self, batch: ScheduledBatch, error: Exception) -> list[TokenEvent]:
        """End the sequences to blame, or the whole batch if none is named. The others are computed again.

        Clients see our own errors' messages; of any other only the class, since its text may hold paths or addresses.
        """
        in_batch = {row.sequence.id: row.sequence.request_id for row in batch.rows}
        guilty = in_batch
        message = f"the model step failed ({type(error).__name__})"
        if isinstance(error, EngineError):
            guilty = {id_: in_batch[id_] for id_ in error.sequence_ids if id_ in in_batch} or in_batch
            message = error.message
        logger.error("a model step failed; requests ended: %s", ", ".join(guilty.values()), exc_info=error)
        return self.scheduler.fail(guilty, message)


def _num_prompt_tokens(batch: ScheduledBatch) -> int:
    """Prompt tokens computed in this step: neither cached ones nor what is recomputed after a preemption."""
    remaining = ((row, row.sequence.num_prompt_tokens - row.sequence.num_computed_tokens) for row in batch.rows)
    return sum(max(0, min(row.num_tokens, prompt_tokens) - num_recomputed(row)) for row, prompt_tokens in remaining)


def _num_drafts(batch: ScheduledBatch, result: RunResult) -> tuple[int, int]:
    """Drafts that were computed, and those of them that were right."""
    pairs = [(row, output) for row, output in zip(batch.rows, result.outputs, strict=True) if row.num_drafts]
    return sum(row.num_drafts for row, _ in pairs), sum(max(0, len(output.token_ids) - 1) for _, output in pairs)
